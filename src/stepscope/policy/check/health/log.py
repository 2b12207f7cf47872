"""What a trainer's log says about the health of its run; every threshold is said in the finding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from stepscope.policy.check.findings import Finding
from stepscope.policy.sampling.drawn_by import DRIFT_LIMIT, OTHER_POLICY

Log = Sequence[Mapping[str, Any]]
"""``log_history``: one object for each time that something was logged."""

RECENT = 20
"""Logged values that count as the run's present state, and that a gradient's norm is held against."""

SPIKE = 5.0
"""Times the median of the norms before it that make a gradient norm a spike."""

FEWEST = 5
"""Norms before it that a spike needs."""

SHRUNK, GROWN = 0.3, 3.0
"""Last entropy over first: outside of these it has collapsed, or run away."""


@dataclass(frozen=True)
class Limit:
    """A logged figure and how large it may be on average over the last :data:`RECENT` values.

    Attributes:
        key: under which it is logged by TRL.
        name: in words.
        warn: above it a finding warns.
        fail: above it a finding fails; None where it never does.
        cure: what to do.
        around: from which value the distance counts.
        worst: the largest of the values counts, not their mean.
    """

    key: str
    name: str
    warn: float
    fail: float | None
    cure: str
    around: float = 0.0
    worst: bool = False


_SAMPLER = (
    "make the sampler compute as the trainer does (type, weights of this step), or correct by the ratio"
)

_GAP = "sampling/sampling_logp_difference"

LIMITS = (
    Limit(
        "completions/clipped_ratio", "share of truncated responses", 0.1, 0.9,
        "let responses be longer (max_completion_length), or see why they do not end",
    ),
    Limit(
        "frac_reward_zero_std", "share of groups without reward variance", 0.5, 0.95,
        "such groups teach nothing: take other problems, larger groups or resample them",
    ),
    Limit(
        f"{_GAP}/mean", "mean difference of log-probs, sampler to policy", DRIFT_LIMIT, OTHER_POLICY, _SAMPLER
    ),
    Limit(
        f"{_GAP}/max", "largest difference of log-probs, sampler to policy", 5.0, None, _SAMPLER, worst=True
    ),
    Limit(
        "sampling/importance_sampling_ratio/mean", "importance ratio of policy to sampler", 0.1, None,
        _SAMPLER, around=1.0,
    ),
)  # fmt: skip


def series(log: Log, key: str) -> list[tuple[int, float]]:
    """Step and value of every entry that has a number under a key, one for each step, the last."""
    found: dict[int, float] = {}
    for entry in log:
        step, value = entry.get("step"), entry.get(key)
        if type(step) is int and isinstance(value, int | float) and not isinstance(value, bool):
            found[step] = float(value)
    return sorted(found.items())


def log_findings(log: Log) -> list[Finding]:
    """Truncation, groups without variance, sampler against policy, gradient norms and entropy, as logged."""
    found = [_limited(limit, values) for limit in LIMITS if (values := series(log, limit.key))]
    if norms := series(log, "grad_norm"):
        found.append(_norms(norms))
    if entropies := series(log, "entropy"):
        found.append(_entropy(entropies))
    if found:
        return found
    what = (
        "the trainer's log has none of what GRPO logs (truncation, reward variance, gradient norm, entropy)"
    )
    return [Finding("warn", what, "set logging_steps; the checkpoints alone are looked at")]


def _limited(limit: Limit, values: Sequence[tuple[int, float]]) -> Finding:
    recent = values[-RECENT:]
    numbers = [value for _, value in recent]
    figure = max(numbers) if limit.worst else fmean(numbers)
    away = abs(figure - limit.around)
    bounds = f"warns {'beyond' if limit.around else 'above'} "
    bounds += f"{limit.around:g} +- {limit.warn:g}" if limit.around else f"{limit.warn:g}"
    bounds += f", fails above {limit.fail:g}" if limit.fail is not None else ""
    what = (
        f"{limit.name}: {figure:.3g} {'at most' if limit.worst else 'on average'} in "
        f"{_steps(recent)} ({limit.key}; {bounds})"
    )
    if not math.isfinite(away) or (limit.fail is not None and away > limit.fail):
        return Finding("fail", what, limit.cure)
    return Finding("warn", what, limit.cure) if away > limit.warn else Finding("ok", what)


def _steps(values: Sequence[tuple[int, float]]) -> str:
    first, last = values[0][0], values[-1][0]
    return f"step {last}" if first == last else f"{len(values)} logged steps {first} to {last}"


def _norms(values: Sequence[tuple[int, float]]) -> Finding:
    if broken := [step for step, value in values if not math.isfinite(value)]:
        what = f"gradient norm not finite at {_named(broken)}"
        return Finding("fail", what, "find the batch; go back to the checkpoint before")
    numbers = [value for _, value in values]
    spikes = [
        step
        for place, (step, value) in enumerate(values)
        if place >= FEWEST and value > SPIKE * median(numbers[max(0, place - RECENT) : place])
    ]
    rule = f"a spike is over {SPIKE:g} times the median of up to {RECENT} values before it"
    if spikes:
        what = f"gradient norm spikes at {_named(spikes)} ({rule})"
        return Finding("warn", what, "look at these batches; measure --update attributes a logged one")
    return Finding("ok", f"gradient norm without spikes, median {median(numbers):.3g} ({rule})")


def _named(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:10]))
    more = f" and {len(steps) - 10} more" if len(steps) > 10 else ""
    return f"step{'s' * (len(steps) > 1)} {shown}{more}"


def _entropy(values: Sequence[tuple[int, float]]) -> Finding:
    """The mean of the first tenth against that of the last."""
    few = max(1, len(values) // 10)
    first, last = (fmean(value for _, value in part) for part in (values[:few], values[-few:]))
    what = (
        f"entropy {first:.3g} at first, {last:.3g} at last ({_steps(values)}; warns below {SHRUNK:g} or "
        f"above {GROWN:g} times the first)"
    )
    if not (math.isfinite(first) and math.isfinite(last)):
        return Finding("fail", what, "the run has diverged: go back to an earlier checkpoint")
    if last < SHRUNK * first:
        return Finding("warn", what, "entropy collapses: measure which tokens and sequences lower it")
    if last > GROWN * first:
        return Finding("warn", what, "entropy runs away: measure which tokens and sequences raise it")
    return Finding("ok", what)
