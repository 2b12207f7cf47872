"""A whole measurement in floors: one plain forward and backward pass over its own update and probe batch.

    python bench/whole.py CHECKPOINT [--config FILE] [--rounds 5] [--threads 1] [section.field=value ...]

The floor is the model's own forward pass on padded micro-batches of the same size, the sum of the responses'
log-probs and its gradient, the best of a few rounds. Stages are those of ``measure --profile``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from stepscope.config import MeasureConfig, load_config
from stepscope.pipeline import run_measure
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.forward import forward_inputs
from stepscope.policy.passes import Budget, by_length, cut, gather, widths
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.results.profile import Profile
from stepscope.runs import PROFILE, read_record


def floor(policy: Policy, batches: list[Rollouts], size: int) -> float:
    """Seconds of one plain forward and backward over the batches."""
    micro_batches = []
    for batch in batches:
        order = by_length(batch)
        pieces = cut(widths(batch, order), Budget(max_sequences=size))
        micro_batches += [gather(policy, batch, order[piece]) for piece in pieces]
    begin = time.perf_counter()
    for batch in micro_batches:
        length = batch.response_ids.shape[1]
        logits = policy.model(**forward_inputs(policy.model, batch, positions=length + 1)).logits
        said = torch.log_softmax(logits[:, -length - 1 : -1], -1)
        said = said.gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
        value = (said * batch.response_mask).sum()
        torch.autograd.grad(value, list(policy.parameters.values()))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        values = {"checkpoint": str(options.checkpoint), "out": f"{folder}/run", "profile": True}
        config = load_config(MeasureConfig, options.config, options.overrides, values)
        begin = time.perf_counter()
        out = run_measure(config)
        wall = time.perf_counter() - begin
        profile = read_record(Profile, out / PROFILE)
        batches = [
            Rollouts.from_parquet(out / f"{name}.parquet", out / f"{name}_tokens.parquet")
            for name in ("update", "probe")
        ]
    policy = load_checkpoint(options.checkpoint, precision=config.precision)
    unit = min(floor(policy, batches, config.batch_size) for _ in range(options.rounds))
    print(f"floor {unit:.3f} s over {sum(len(b) for b in batches)} sequences; whole {wall / unit:.1f} floors")
    print("| stage | floors | of these in passes |\n|---|---|---|")
    for stage in dict.fromkeys(row.stage for row in profile.rows):
        rows = [row for row in profile.rows if row.stage == stage]
        whole, passes = (sum(r.seconds for r in rows if r.passes or not only) for only in (False, True))
        print(f"| {stage} | {whole / unit:.1f} | {passes / unit:.1f} |")


if __name__ == "__main__":
    main()
