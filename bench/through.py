"""Influence at fixed preconditioner and clipping, and through the optimizer: which predicts what, and where.

    python bench/through.py CHECKPOINT [CHECKPOINT ...] [--clip 0.1] [--fresh] [--json FILE]

For every checkpoint, as it is and with its gradient clipped at ``--clip``, in float64: the influence of the
whole batch either way, what the fixed one neglects, and how both agree with true changes of steps made
again: with the weight of a sequence changed by a thousandth, with a sequence left out, with a random half
    left out. ``--fresh`` adds
the first checkpoint's weights with AdamW's state at zero (the very first step).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepscope import load_task, sample_rollouts
from stepscope.measure.influence.attribution import InfluenceOptions, influences, neglected_share
from stepscope.measure.influence.validation import RemovalOptions, compare, remake_steps
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results.validation import Agreement


def states(options: argparse.Namespace) -> Iterator[tuple[str, Policy]]:
    """The policies to look at, by name."""
    for number, path in enumerate(options.checkpoints):
        policy = load_checkpoint(path, precision="float64")
        state = policy.optimizer
        assert state is not None
        if options.fresh and number == 0:
            zeros = {n: torch.zeros_like(t) for n, t in state.exp_avg.items()}
            steps = dict.fromkeys(state.steps, 0)
            yield (
                "t = 1",
                replace(policy, optimizer=replace(state, exp_avg=zeros, exp_avg_sq=zeros, steps=steps)),
            )
        age = max(state.steps.values()) + 1
        yield f"t = {age}", policy
        if options.clip:
            settings = replace(policy.settings, max_grad_norm=options.clip)
            yield f"t = {age}, clipped at {options.clip:g}", replace(policy, settings=settings)


def row(name: str, policy: Policy, options: argparse.Namespace) -> dict[str, Any]:
    task = load_task(policy.settings.task, template=policy.settings.prompt_template or None)
    update = sample_rollouts(policy, task, num_prompts=16, group_size=8, seed=0)
    probe = sample_rollouts(policy, task, num_prompts=options.probe, group_size=1, seed=1, split="test")
    step = reconstruct_step(policy, update, budget=Budget(max_sequences=64))
    ways = influences(
        policy,
        step,
        update,
        probe,
        budget=Budget(max_sequences=64),
        options=InfluenceOptions(baseline="position"),
    )
    remade = remake_steps(
        policy,
        step,
        probe,
        ways[0],
        budget=Budget(max_sequences=64, progress=True),
        options=RemovalOptions(num_subsets=options.subsets, num_single=options.singles),
    )
    fixed, optimizer = ways

    def figures(found: Agreement) -> dict[str, float]:
        return {
            "pearson": found.pearson.value,
            "pearson_stderr": found.pearson.stderr,
            "slope": found.slope,
            "error": found.error,
        }

    checked = [compare(remade, way) for way in ways]
    return {
        "state": name,
        "clip_coefficient": step.clip_coefficient,
        "sum_fixed": float(fixed.sequences.sum()),
        "sum_optimizer": float(optimizer.sequences.sum()),
        "neglected": neglected_share(fixed, optimizer).value,
        **{
            f"{kind}_{way.through}": figures(getattr(way, kind))
            for way in checked
            for kind in ("reweighted", "single", "half")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--clip", type=float, help="also clip the gradient here")
    parser.add_argument(
        "--fresh", action="store_true", help="also the very first step from the first weights"
    )
    parser.add_argument("--probe", type=int, default=256, help="probe prompts")
    parser.add_argument("--subsets", type=int, default=32, help="random halves")
    parser.add_argument(
        "--singles", type=int, default=32, help="sequences left out and reweighted one at a time"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(
        "| state | c | sum, total / reported | neglected | reweighted, r (slope) | one left out, r (slope) | "
        "half left out, r (error) |\n|---|---|---|---|---|---|---|"
    )
    for name, policy in states(options):
        found = row(name, policy, options)
        rows.append(found)

        def both(kind: str, second: str, found: dict[str, Any] = found) -> str:
            ways = (found[f"{kind}_{through}"] for through in ("fixed", "optimizer"))
            return " -> ".join(f"{way['pearson']:.3f} ({way[second]:.3f})" for way in ways)

        print(
            f"| {name} | {found['clip_coefficient']:.2f} | {found['sum_optimizer']:.3g} / "
            f"{found['sum_fixed']:.3g} | {found['neglected']:.0%} | {both('reweighted', 'slope')} | "
            f"{both('single', 'slope')} | {both('half', 'error')} |",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
