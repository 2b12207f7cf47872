"""What each estimator buys: standard error at equal samples and at equal time, on a checkpoint.

    python bench/estimators.py CHECKPOINT --task arithmetic [--probe 256] [--lr-factor 1]

The reference is the customary way: for the true change the whole response's self-normalised importance
weight on every position; for the linear change entropy-to-go with H_k as baseline, which is the rung
``none``. Ratios of variances come with a 95 % interval from a bootstrap over prompts, paired by sequence.
Equal time charges each estimator the passes it needs; ``best`` pays for the hidden states and all rungs.
Prints a Markdown table and, with ``--json``, writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stepscope.measure.quantity.base import make_quantity, unit_of
from stepscope.measure.quantity.baselines import LADDER, fit_baseline, length_baseline
from stepscope.measure.quantity.estimators import (
    Probe,
    Sampled,
    linear,
    per_decision,
    regression,
    self_normalised,
    whole_sequence,
)
from stepscope.measure.quantity.values import derivatives, hidden_states, response_mask, values_at
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.pipeline.inputs.tasks import open_task
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.stats import bootstrap

TRUE = "true change"
LINEAR = "linear change"
PIONEER = {TRUE: "whole_sequence", LINEAR: "none"}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def variance(influence: np.ndarray, clusters: np.ndarray) -> float:
    sums = np.bincount(clusters, weights=influence)
    return float((sums**2).sum()) / len(influence) ** 2


def read(folder: Path, name: str) -> Rollouts:
    return Rollouts.from_parquet(folder / f"{name}.parquet", folder / f"{name}_tokens.parquet")


def sample(policy: Policy, options: argparse.Namespace) -> tuple[Rollouts, Rollouts]:
    task = open_task(options.task, policy)
    update = sample_rollouts(
        policy,
        task,
        num_prompts=options.update,
        group_size=policy.settings.group_size,
        seed=0,
        options=SamplingOptions(resample=20),
    )
    probe = sample_rollouts(
        policy,
        task,
        num_prompts=options.probe,
        group_size=1,
        seed=1,
        options=SamplingOptions(exclude=frozenset(update.prompt_ids)),
    )
    return update, probe


def measure(options: argparse.Namespace) -> dict[str, Any]:
    policy = load_checkpoint(options.checkpoint, precision=options.precision)
    if options.measurement:
        update, probe = (read(options.measurement, name) for name in ("update", "probe"))
    else:
        update, probe = sample(policy, options)
    step = reconstruct_step(policy, update)
    lr = (options.lr or step.lr) * options.lr_factor
    size = {"budget": Budget(max_sequences=options.batch)}
    quantity = make_quantity(options.quantity, probe)
    base, forward_time = timed(lambda: values_at(policy, probe, [quantity], **size))
    moved, moved_time = timed(lambda: values_at(policy, probe, [quantity], step.direction, lr, **size))
    (first,), jvp_time = timed(lambda: derivatives(policy, probe, [quantity], step.direction, **size))
    features, hidden_time = timed(lambda: hidden_states(policy, probe, **size))
    mask, clusters = response_mask(probe), probe.prompt_index
    zeros = np.zeros(mask.shape)
    ahead = length_baseline(mask, clusters)
    at = Probe(base.quantity(0), mask, clusters, options.normalisation == "per_token", True, zeros, ahead)
    here, there = first.quantity(0), moved.quantity(0)
    rows: list[tuple[str, str, Sampled, float]] = []
    two = forward_time + moved_time
    for name, estimator in (
        ("whole_sequence", whole_sequence),
        ("self_normalised", self_normalised),
        ("regression", regression),
    ):
        found, seconds = timed(lambda e=estimator: e(at, there))
        rows.append((TRUE, name, found, two + seconds))
    for kind in (*LADDER, "best"):
        fitted, seconds = timed(lambda k=kind: fit_baseline(k, at, here, features=features))
        seconds += hidden_time * (kind in ("ridge", "best"))
        with_it = at.with_baseline(fitted.values)
        label = f"best ({fitted.kind})" if kind == "best" else kind
        choosing = jvp_time * (kind == "best")
        rows.append((TRUE, f"per_decision, {label}", per_decision(with_it, there), two + seconds + choosing))
        rows.append((LINEAR, label, linear(with_it, here).scaled(lr), jvp_time + seconds))
    best = at.with_baseline(fitted.values)
    excess = per_decision(best, there).plus(linear(best, here), -lr)
    rows.append((TRUE, "true minus linear, paired", excess, two + jvp_time + seconds))
    table = []
    for what, name, found, seconds in rows:
        reference, cost = next((f, s) for w, n, f, s in rows if (w, n) == (what, PIONEER[what]))

        def ratio(chosen: np.ndarray, found: Sampled = found, reference: Sampled = reference) -> float:
            fresh = np.unique(clusters[chosen], return_inverse=True)[1]
            return variance(reference.influence[chosen], fresh) / variance(found.influence[chosen], fresh)

        spread = bootstrap(ratio, clusters, num_resamples=400, seed=0)
        gain = variance(reference.influence, clusters) / variance(found.influence, clusters)
        table.append(
            {
                "what": what,
                "estimator": name,
                "value": found.value,
                "stderr": at.estimate(found, unit="", method="").stderr,
                "variance_ratio": gain,
                "variance_ratio_low": spread.low,
                "variance_ratio_high": spread.high,
                "seconds": seconds,
                "variance_ratio_at_equal_time": gain * cost / seconds,
            }
        )
    return {
        "checkpoint": str(options.checkpoint),
        "quantity": options.quantity,
        "unit": unit_of(quantity, options.normalisation),
        "precision": options.precision,
        "lr": lr,
        "num_prompts": probe.num_prompts,
        "mean_tokens": float(probe.num_tokens.mean()),
        "rows": table,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['checkpoint']}: {result['quantity']}, {result['unit']}, lr {result['lr']:.1e}, "
        f"{result['num_prompts']} prompts, {result['mean_tokens']:.1f} tokens on average, "
        f"{result['precision']}",
        "",
        "| change | estimator | value | standard error | variance of the customary / its own | s "
        "| the same at equal time |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        low, high = row["variance_ratio_low"], row["variance_ratio_high"]
        lines.append(
            f"| {row['what']} | {row['estimator']} | {row['value']:.3e} | {row['stderr']:.2e} "
            f"| {row['variance_ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['seconds']:.2f} | {row['variance_ratio_at_equal_time']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Standard errors of the estimators on a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", default="", help="task of the probe; the checkpoint's own by default")
    parser.add_argument("--measurement", type=Path, help="folder of `stepscope measure`: use its batches")
    parser.add_argument("--quantity", default="entropy", choices=("entropy", "reward", "length", "logprob"))
    parser.add_argument("--normalisation", default="per_token", choices=("per_token", "per_seq"))
    parser.add_argument("--update", type=int, default=16, help="prompts of the update batch")
    parser.add_argument("--probe", type=int, default=256, help="prompts of the probe batch")
    parser.add_argument("--lr", type=float, default=0.0, help="the checkpoint's own by default")
    parser.add_argument("--lr-factor", type=float, default=1.0, help="multiplies the learning rate")
    parser.add_argument("--precision", default="float32", choices=("float32", "float64"))
    parser.add_argument("--batch", type=int, default=32, help="sequences in a micro-batch")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    result = measure(options)
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
