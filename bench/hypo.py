"""DPO, HyPO and Dr. GRPO from one start at equal samples, and with pairs that cover only some of the prompts.

    python bench/hypo.py --base runs/demo/base --out runs/hypo_bench

For every seed the start answers 288 prompts 8 times. ``equal``: DPO on the pairs of all of them (2304
responses), HyPO on those of the first 128 with 2 samples to each of a step's 16 prompts (1024 + 1280), Dr.
GRPO with 18 steps of 128. ``all``, ``part``, ``easy``: DPO and HyPO on the same pairs, of 128 prompts, of
16, and 128 pairs whose prompt the start solves 6 times of 8 or more; ``task`` has HyPO's samples on prompts
of the whole task in place of those of the pairs. Every end is judged on the same held-out prompts: reward,
reverse KL to the start (sums over the vocabulary), entropy. After 20 of 40 steps the next step's influence
on the entropy is split into chosen, rejected and sampled responses. ``results.json`` has all figures; what
is there is not made again. Intervals are 95 % t-intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from objectives import interval
from stepscope.config import TrainConfig, load_config
from stepscope.measure.influence.attribution import influence
from stepscope.measure.quantity.kinds.kl import Reference
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.pipeline import run_train
from stepscope.pipeline.inputs.update_files import update_from_file
from stepscope.policy.checkpoint.load import load_checkpoint, load_model
from stepscope.policy.forward import TokenBatch, forward
from stepscope.policy.loss.settings import NEXT_BATCH, StepSettings
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.rollouts import sample_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.tasks import load_task
from stepscope.training.preferences.pairs import keep_pairs, pairs_from_rollouts

CONFIGS = Path(__file__).parents[1] / "configs"
TASK = "arithmetic"
DPO, HYPO = "hypo.kl_weight=0", "hypo.kl_weight={weight}"
METHODS: dict[str, tuple[str, list[str]]] = {
    "equal_dpo": ("equal", [DPO]),
    "all_dpo": ("all", [DPO]),
    "all_hypo": ("all", [HYPO]),
    "part_dpo": ("part", [DPO]),
    "part_hypo": ("part", [HYPO]),
    "part_hypo_task": ("part", [HYPO, "hypo.kl_prompts=task"]),
    "easy_dpo": ("easy", [DPO]),
    "easy_hypo": ("easy", [HYPO]),
    "dr_grpo": ("", ["rl.num_iterations=1", "rl.max_resample=0", "rl.steps=18", "rl.save_every=18"]),
}
"""Pairs and changes to the configuration, by name; without pairs that is ``configs/objectives.yaml``."""

SOLVED_OFTEN = 6
BUDGET = Budget(max_sequences=128)


def answered(base: Path, seed: int, prompts: int) -> Rollouts:
    """The start's responses, of which all pairs of a seed are made."""
    settings = StepSettings(max_response_tokens=40)
    policy = Policy(*load_model(str(base), dtype=torch.float32, device="cpu"), settings)
    return sample_rollouts(
        policy, load_task(TASK), num_prompts=prompts, group_size=8, seed=seed, budget=BUDGET
    )


def make_pairs(base: Path, seed: int, out: Path) -> None:
    """A file of pairs for every condition."""
    if (out / "easy.parquet").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    rollouts = answered(base, seed, 288)
    index = rollouts.prompt_index
    right = np.bincount(index, rollouts.correct)
    chosen = {
        "equal": index >= 0,
        "all": index < 128,
        "part": index < 16,
        "easy": right[index] >= SOLVED_OFTEN,
    }
    for name, rows in chosen.items():
        pairs = pairs_from_rollouts(rollouts.select(np.flatnonzero(rows)), per_prompt=2, seed=seed)
        keep_pairs(pairs[:128] if name == "easy" else pairs, out / f"{name}.parquet")


def judged(checkpoint: Path, base: Path, prompts: int) -> dict[str, float]:
    """Reward, entropy and reverse KL to the start, on held-out prompts that all trainings share."""
    policy = load_checkpoint(checkpoint, precision="float32", require_optimizer=False)
    rollouts = sample_rollouts(
        policy, load_task(TASK), num_prompts=prompts, group_size=4, seed=11, split="test", budget=BUDGET
    )
    reference = Reference(load_model(str(base), dtype=torch.float32, device="cpu")[0], 1.0)

    def read(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            outputs = forward(
                policy.model, batch, temperature=1.0, readings={"kl": reference.divergence(batch)}
            )
        return outputs.read["kl"].double()

    rows = sweep_rows(policy, rollouts, read, budget=BUDGET)
    return {
        "reward": float(rollouts.rewards.mean()),
        "kl": float(np.mean([float(row.sum()) for row in rows])),
        "entropy": float(rollouts.entropy_per_seq.sum() / rollouts.num_tokens.sum()),
        "length": float(rollouts.num_tokens.mean()),
        "formatted": float(1 - rollouts.truncated.mean()),
    }


def pushed(checkpoint: Path, base: Path, prompts: int) -> dict[str, float]:
    """First-order effect of the next step's batch on the entropy (nats/token), by kind of response."""
    policy = load_checkpoint(checkpoint, precision="float32")
    update = update_from_file(policy, checkpoint / NEXT_BATCH, step=None, budget=BUDGET).rollouts
    reference = Policy(load_model(str(base), dtype=torch.float32, device="cpu")[0], None, policy.settings)
    step = reconstruct_step(policy, update, reference=reference, budget=BUDGET)
    probe = sample_rollouts(
        policy, load_task(TASK), num_prompts=prompts, group_size=1, seed=12, split="test", budget=BUDGET
    )
    found = influence(policy, step, update, probe, quantity="entropy", budget=BUDGET)
    pair = np.array(["pair/" in name for name in update.prompt_ids])
    kinds = {
        "chosen": pair & (update.rewards > 0),
        "rejected": pair & (update.rewards == 0),
        "sampled": ~pair,
    }
    return {name: float(step.lr * found.sequences[rows].sum()) for name, rows in kinds.items()}


def of_method(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What one training came to."""
    pairs, changes = METHODS[name]
    run = given.out / name / f"seed-{seed}"
    start = [f"model.source={given.base}", "sft=null", f"seed={seed}", f"out={run}"]
    if pairs:
        start.append(f"hypo.pairs={given.out / 'pairs' / f'seed-{seed}' / pairs}.parquet")
        start.append("hypo.save_every=20")
    config = "hypo.yaml" if pairs else "objectives.yaml"
    own = [change.format(weight=given.weight) for change in changes]
    last = run_train(load_config(TrainConfig, CONFIGS / config, [*own, *start]), resume=True)
    found: dict[str, Any] = {"end": judged(last, given.base, given.prompts)}
    if pairs:
        found["pushed"] = pushed(last.with_name("step-20"), given.base, given.prompts)
    return found


def table(results: dict[str, Any], names: Sequence[str]) -> str:
    """Markdown: mean and interval over seeds."""
    columns = ["reward", "kl", "entropy", "length"]
    lines = ["| | " + " | ".join([*columns, "chosen", "rejected", "sampled"]) + " |"]
    lines.append("|---" * 8 + "|")
    for name in names:
        own = [found for key, found in results.items() if key.split("/")[0] == name]
        cells = [_cell([found["end"][column] for found in own]) for column in columns]
        if all("pushed" in found for found in own):
            cells += [
                _cell([1e4 * f["pushed"][kind] for f in own]) for kind in ("chosen", "rejected", "sampled")
            ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    mean, half = interval(np.array(values))
    return f"{mean:.3g} ± {half:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("runs/demo/base"))
    parser.add_argument("--out", type=Path, default=Path("runs/hypo_bench"))
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts of a judgement")
    parser.add_argument("--weight", type=float, default=0.1, help="kl_weight of HyPO")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for seed in given.seeds:
        make_pairs(given.base, seed, given.out / "pairs" / f"seed-{seed}")
        for name in given.only:
            if (key := f"{name}/{seed}") not in results:
                results[key] = of_method(name, seed, given)
                file.write_text(json.dumps(results, indent=1))
                print(key, results[key], flush=True)
    if "start" not in results:
        results["start"] = {
            "end": judged(given.base.parent / "checkpoints" / "step-0", given.base, given.prompts)
        }
        file.write_text(json.dumps(results, indent=1))
    print(table(results, ["start", *given.only]))


if __name__ == "__main__":
    main()
