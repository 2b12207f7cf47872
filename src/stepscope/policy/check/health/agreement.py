"""Do the checkpoints of a run agree with each other's settings and logs, and with what was logged?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

from stepscope.policy.check.findings import Finding
from stepscope.policy.check.health.log import Log, series
from stepscope.policy.loss.settings import StepSettings

SAME_RATE = 1e-6
"""Relative difference of learning rates that writing them as text may make."""

COMPARED = ("loss", "grad_norm", "learning_rate", "reward")
"""Keys whose values are compared where two logs have the same step."""


def settings_findings(settings: Sequence[tuple[str, StepSettings]]) -> list[Finding]:
    """Keys of the loss that differ from one checkpoint to the next.

    Args:
        settings: name of each checkpoint and what its step depends on, in order.
    """
    found = []
    for (old, before), (new, after) in pairwise(settings):
        changed = [
            f"{field.name} from {getattr(before, field.name)} to {getattr(after, field.name)}"
            for field in fields(StepSettings)
            if getattr(before, field.name) != getattr(after, field.name)
        ]
        if changed:
            what = f"between {old} and {new} loss settings change: {', '.join(changed)}"
            found.append(Finding("warn", what, "each is measured with its own; see whether it was meant so"))
    if not found and len(settings) > 1:
        found.append(Finding("ok", f"loss settings of {len(settings)} checkpoints agree"))
    return found


def length_findings(settings: StepSettings, log: Log) -> list[Finding]:
    """Whether a response was logged that is longer than the settings allow."""
    longest = max((value for _, value in series(log, "completions/max_length")), default=0.0)
    if longest <= settings.max_response_tokens:
        return []
    what = (
        f"a response of {longest:g} tokens was logged (completions/max_length), and max_response_tokens is "
        f"{settings.max_response_tokens}"
    )
    return [Finding("warn", what, "the settings are not those of the run; give loss.max_response_tokens")]


def rate_findings(rates: Sequence[tuple[str, int, float]], log: Log) -> list[Finding]:
    """The optimizer's learning rate against the one that was logged for its next step.

    The Trainer saves after ``scheduler.step()`` and logs the rate that a step was taken with, so the rate in
    a checkpoint is the one logged a step later; before transformers 4.50 it is the one logged beside it.

    Args:
        rates: name, step and learning rate of the first group of each checkpoint.
        log: of the last checkpoint.
    """
    logged = dict(series(log, "learning_rate"))
    found, agreeing = [], 0
    for name, step, rate in rates:
        if step + 1 not in logged:
            continue
        said = [logged[at] for at in (step + 1, step) if at in logged]
        if any(math.isclose(rate, value, rel_tol=SAME_RATE, abs_tol=0.0) for value in said):
            agreeing += 1
            continue
        what = (
            f"{name}: the optimizer's learning rate is {rate:g}, and step {step + 1} was logged with "
            f"{logged[step + 1]:g}"
        )
        cure = "the schedule was lost or changed at a resume; keep scheduler.pt beside optimizer.pt"
        found.append(Finding("warn", what, cure))
    if agreeing:
        count = f"{agreeing} of {len(rates)} checkpoints"
        found.append(Finding("ok", f"learning rates are those logged, as far as they were ({count})"))
    return found


def log_agreement(logs: Sequence[tuple[str, Log]]) -> list[Finding]:
    """Whether each log goes on from the one before it: a later checkpoint may be of an earlier run.

    Args:
        logs: name of each checkpoint and its log, in order.
    """
    found = []
    for (old, before), (new, after) in pairwise(logs):
        for key in COMPARED:
            earlier, later = dict(series(before, key)), dict(series(after, key))
            other = [s for s in sorted(earlier.keys() & later.keys()) if not _same(earlier[s], later[s])]
            if other:
                what = (
                    f"logs of {old} and {new} differ at step {other[0]}: {key} {earlier[other[0]]:g} and "
                    f"{later[other[0]]:g}"
                )
                cure = f"they are not of one run: one was left by a run before; remove {old} or {new}"
                found.append(Finding("warn", what, cure))
                break
    if not found and len(logs) > 1:
        found.append(Finding("ok", f"logs of {len(logs)} checkpoints go on from one another"))
    return found


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
