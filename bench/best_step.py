"""The predicted best learning rate at several batch sizes against line searches.

    python bench/best_step.py CHECKPOINT supervised [--seed 0] [--json FILE]
    python bench/best_step.py CHECKPOINT reward [--seed 0] [--json FILE] [--task arithmetic:test=8000]

Predicted by ``stepscope.measure.curvature.best_step`` from an update and a probe batch. Measured with other
batches: for each size, disjoint batches of a pool make steps along P times their gradient, P and clipping as
in the measured step, and with ``--own`` also AdamW's own step (momentum, decay, the batch's second moment
and clipping); the change is taken at several learning rates on a third set of prompts.
``supervised``: mean log-prob of demonstrations, given. ``reward``: mean reward of fresh responses, the same
uniform numbers at every learning rate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stepscope as ss
from stepscope.measure.curvature.best_step import best_step
from stepscope.measure.curvature.pairs import PairOptions, second_order_kernel
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.step.reconstruct import Step, assemble_step, weighted_logprobs
from stepscope.pipeline.inputs.tasks import task_to_measure
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.gradients.products import group_gradients
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts
from stepscope.results import FloatArray, Rollouts
from stepscope.results.best_step import StepTerms
from stepscope.stats import Estimate

SIZES = (4, 16, 64, 256)
REACHES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Learning rates of a line search, in units of the predicted best one."""
BUDGET = Budget(max_sequences=256)


def asked_besides(batch: Rollouts | None) -> ss.SamplingOptions:
    """None of a batch's questions."""
    return ss.SamplingOptions(exclude=frozenset() if batch is None else batch.asked)


def demonstrations(
    policy: Any, task: Any, count: int, seed: int, split: str, besides: Rollouts | None = None
) -> Rollouts:
    """Worked answers to some prompts, as a batch."""
    drawn = ss.sample_rollouts(
        policy, task, num_prompts=count, group_size=1, seed=seed, split=split, options=asked_besides(besides)
    )
    problems = {p.prompt_id: p for p in task.problems(split)}
    end = policy.tokenizer.eos_token_id
    texts = [task.demonstration(problems[i]) for i in drawn.prompt_ids]
    ids = tuple((*policy.tokenizer.encode(t, add_special_tokens=False), end) for t in texts)
    blank = replace(
        drawn,
        responses=tuple(texts),
        response_token_ids=ids,
        truncated=np.zeros(count, dtype=bool),
        logprobs=tuple(np.zeros(len(r)) for r in ids),
        entropies=tuple(np.zeros(len(r)) for r in ids),
        max_response_tokens=max(map(len, ids)),
    )
    logprobs, entropies = score_rollouts(policy, blank, budget=BUDGET)
    return replace(blank, logprobs=logprobs, entropies=entropies)


class Supervised:
    """Mean log-prob per token of demonstrations."""

    group_size, quantity, form = 1, "logprob", {"version": "fixed_prefix"}

    def __init__(self, policy: Any, task: Any, seed: int, update: int, probe: int, held: int) -> None:
        self.policy, self.task = policy, task
        self.update = demonstrations(policy, task, update, 10 * seed + 1, "train")
        self.probe = demonstrations(policy, task, probe, 10 * seed + 2, "test")
        self.held = demonstrations(policy, task, held, 10 * seed + 3, "test", self.probe)
        self.pool_seed = 10 * seed + 4

    def pool(self, count: int) -> Rollouts:
        return demonstrations(self.policy, self.task, count, self.pool_seed, "train", self.update)

    def weights(self, batch: Rollouts) -> tuple[FloatArray, ...]:
        """Of the mean over texts of the log-prob, over a fixed length."""
        length = float(self.update.num_tokens.mean())
        return tuple(np.full(n, 1 / (len(batch) * length)) for n in batch.num_tokens)

    def value(self) -> float:
        logprobs, _ = score_rollouts(self.policy, self.held, budget=BUDGET)
        return float(np.concatenate(logprobs).mean())


class Reward:
    """Mean reward of fresh responses."""

    group_size, quantity, form = 8, "reward", {"normalisation": "per_seq"}

    def __init__(self, policy: Any, task: Any, seed: int, update: int, probe: int, held: int) -> None:
        self.policy, self.task, self.held, self.seed = policy, task, held, seed
        sample = {"group_size": self.group_size, "split": "train"}
        self.update = ss.sample_rollouts(policy, task, num_prompts=update, seed=10 * seed + 1, **sample)
        self.probe = ss.sample_rollouts(
            policy, task, num_prompts=probe, group_size=1, seed=10 * seed + 2, split="test"
        )
        self.pool_seed = 10 * seed + 4

    def pool(self, count: int) -> Rollouts:
        return ss.sample_rollouts(
            self.policy,
            self.task,
            num_prompts=count,
            group_size=self.group_size,
            seed=self.pool_seed,
            options=asked_besides(self.update),
        )

    def weights(self, batch: Rollouts) -> tuple[FloatArray, ...]:
        """Dr. GRPO's: advantages over batch and a fixed length."""
        assert batch.advantages is not None
        length = self.policy.settings.max_response_tokens
        rows = zip(batch.num_tokens, batch.advantages, strict=True)
        return tuple(np.full(n, a / (len(batch) * length)) for n, a in rows)

    def value(self) -> float:
        fresh = ss.sample_rollouts(
            self.policy,
            self.task,
            num_prompts=self.held,
            group_size=1,
            seed=10 * self.seed + 3,
            split="test",
            options=asked_besides(self.probe),
            budget=BUDGET,
        )
        return float(fresh.rewards.mean())


def step_of(policy: Any, batch: Rollouts, weights: Sequence[FloatArray]) -> Step:
    ascent = gradient(policy, batch, weighted_logprobs(weights), budget=BUDGET)
    return assemble_step(policy, batch, weights, ascent, {})


def centre(terms: StepTerms, size: int, default: float) -> float:
    """The predicted best learning rate, resolved or not, where second order is against first."""
    slope, bend = terms.slope.value, terms.curvature.value + terms.noise.value / size
    return -slope / bend if slope * bend < 0 else default


def line(case: Any, direction: dict[str, Tensor], lrs: FloatArray, base: float) -> FloatArray:
    found = []
    for lr in lrs:
        with vectors.shifted(case.policy.parameters, direction, float(lr)):
            found.append(case.value() - base)
    return np.array(found)


def peak(lrs: FloatArray, curve: FloatArray) -> tuple[float, float]:
    """Where a curve through 0 is largest, and how large, by a parabola about its largest point."""
    xs, ys = np.r_[0.0, lrs], np.r_[0.0, curve]
    top = int(np.argmax(ys))
    if top in (0, len(xs) - 1):
        return float(xs[top]), float(ys[top])
    a, b, c = np.polyfit(xs[top - 1 : top + 2], ys[top - 1 : top + 2], 2)
    return float(-b / (2 * a)), float(c - b**2 / (4 * a))


def with_error(lrs: FloatArray, curves: FloatArray) -> dict[str, float]:
    """Peak of the mean curve, and its standard error by resampling the batches."""
    rng = np.random.default_rng(0)
    lr, gain = peak(lrs, curves.mean(0))
    again = np.array(
        [peak(lrs, curves[rng.integers(len(curves), size=len(curves))].mean(0)) for _ in range(200)]
    )
    error = again.std(0, ddof=1) if len(curves) > 1 else (float("nan"), float("nan"))
    return {"lr": lr, "lr_stderr": float(error[0]), "gain": gain, "gain_stderr": float(error[1])}


def number(value: Estimate) -> dict[str, Any]:
    return {
        "value": value.value,
        "stderr": value.stderr,
        "low": value.low,
        "high": value.high,
        "reason": value.reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("what", choices=["supervised", "reward"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", type=int, default=128, help="prompts of the measured update batch")
    parser.add_argument("--probe", type=int, default=1024, help="prompts of the probe")
    parser.add_argument("--held", type=int, default=512, help="prompts on which changes are measured")
    parser.add_argument("--pool", type=int, default=512, help="prompts that batches are made of")
    parser.add_argument("--batches", type=int, default=6, help="most batches of a size")
    parser.add_argument("--task", help="in place of the run's own, for more prompts than its splits have")
    parser.add_argument("--own", action="store_true", help="also AdamW's own steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy = ss.load_checkpoint(options.checkpoint)
    task = task_to_measure(options.task, policy)
    began = time.perf_counter()
    kind: Callable[..., Any] = Supervised if options.what == "supervised" else Reward
    case = kind(policy, task, options.seed, options.update, options.probe, options.held)
    step = step_of(policy, case.update, case.weights(case.update))
    P = step.metric()
    chosen = make_quantity(case.quantity, case.probe, policy=policy, **case.form)
    kernel = second_order_kernel(
        policy,
        step,
        case.probe,
        quantity=chosen,
        baseline="position",
        options=PairOptions(sketches=0),
        budget=Budget(max_sequences=64),
    )
    made = best_step(kernel, lr=step.lr, run_prompts=policy.settings.prompts_per_step)
    made_in = time.perf_counter() - began
    print(f"{options.what}, seed {options.seed}: predicted in {made_in:.0f} s, own lr {step.lr:g}")
    for name, value in (
        *vars(made.batch).items(),
        *((f"whole {n}", v) for n, v in vars(made.whole).items()),
        *made.kinds.items(),
    ):
        ends = f"({value.low:.4g} to {value.high:.4g})"
        print(f"  {name}: {value.value:.4g} ± {value.stderr:.2g} {ends} {value.reason}")
    print(made.advice, flush=True)

    pool = case.pool(options.pool)
    own = SequenceGradients(pool, weighted_logprobs(case.weights(pool)))
    groups = group_gradients(policy, own, pool.prompt_index, budget=BUDGET)
    base = case.value()
    shuffled = np.random.default_rng(options.seed).permutation(options.pool)
    rows = []
    for size in (s for s in SIZES if s <= options.pool):
        row = next(r for r in made.rows if r.prompts == size)
        lrs = np.array(REACHES) * centre(made.batch, size, 8 * step.lr)
        own_lrs = np.array(REACHES) * centre(made.whole, size, step.lr)
        curves, whole = [], []
        for b in range(min(options.batches, options.pool // size)):
            some = shuffled[b * size : (b + 1) * size]
            mean = {n: t[torch.from_numpy(some)].sum(0) * (options.pool / size) for n, t in groups.items()}
            curves.append(line(case, vectors.multiply(mean, P), lrs, base))
            if options.own:
                members = np.flatnonzero(np.isin(pool.prompt_index, some))
                batch = pool.select(members)
                direction = step_of(policy, batch, case.weights(batch)).direction
                whole.append(line(case, direction, own_lrs, base))
        found: dict[str, Any] = {
            "prompts": size,
            "batches": len(curves),
            "predicted_lr": number(row.lr),
            "predicted_gain": number(row.gain),
            "lr_whole": number(row.lr_whole),
            "gain_whole": number(row.gain_whole),
            "lrs": lrs.tolist(),
            "curve": np.mean(curves, 0).tolist(),
            "measured": with_error(lrs, np.array(curves)),
        }
        if whole:
            found |= {"own_lrs": own_lrs.tolist(), "own_curve": np.mean(whole, 0).tolist()}
            found["own"] = with_error(own_lrs, np.array(whole))
        rows.append(found)
        print(f"  B {size}")
        for name, lr, gain in (("measured", row.lr, row.gain), ("own", row.lr_whole, row.gain_whole)):
            print(
                f"    lr predicted {lr.value:.4g} ({lr.low:.3g} to {lr.high:.3g}), gain {gain.value:.4g} ± "
                f"{gain.stderr:.2g}; {name} {found.get(name)}; {lr.reason}",
                flush=True,
            )
    if options.json:
        whole_file = {
            "what": options.what,
            "seed": options.seed,
            "checkpoint": str(options.checkpoint),
            "batch": {n: number(v) for n, v in vars(made.batch).items()},
            "whole": {n: number(v) for n, v in vars(made.whole).items()},
            "kinds": {n: number(v) for n, v in made.kinds.items()},
            "advice": made.advice,
            "rows": rows,
            "seconds": time.perf_counter() - began,
        }
        options.json.write_text(json.dumps(whole_file, indent=1))


if __name__ == "__main__":
    main()
