"""How two evaluations differ, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.evaluation.rows import prompt_ratios
from stepscope.results.evaluation import (
    Evaluated,
    EvaluationChange,
    EvaluationRow,
    PromptResult,
    Transitions,
)
from stepscope.stats import Estimate, paired_ratio_difference


def compared(before: EvaluationRow, after: EvaluationRow) -> EvaluationChange:
    """Both transitions and differences of two evaluations.

    Raises:
        MeasurementError: they share no prompt.
    """
    return EvaluationChange(
        before=Evaluated(before.step, before.checkpoint),
        after=Evaluated(after.step, after.checkpoint),
        transitions=transitions(before, after),
        differences=differences(before, after),
    )


def transitions(before: EvaluationRow, after: EvaluationRow) -> Transitions:
    """Sort the prompts that two evaluations share by how often they were solved before and after.

    Raises:
        MeasurementError: they share no prompt.
    """
    pairs = list(zip(*_shared(before, after), strict=True))
    counts = np.zeros((3, 3), dtype=np.int64)
    for first, second in pairs:
        counts[_state(first), _state(second)] += 1
    return Transitions(
        counts=tuple((never, sometimes, always) for never, sometimes, always in counts.tolist()),
        gained=tuple(b.prompt_id for a, b in pairs if not a.num_correct and b.num_correct),
        lost=tuple(b.prompt_id for a, b in pairs if a.num_correct and not b.num_correct),
    )


def differences(before: EvaluationRow, after: EvaluationRow) -> dict[str, Estimate]:
    """Change of every figure but the quantiles, over the prompts that two evaluations share.

    The error is that of the difference itself: what prompts have in common before and after cancels.

    Returns:
        Column of ``eval.parquet`` to after minus before; ``pass_at_k`` for the k that both have.

    Raises:
        MeasurementError: they share no prompt.
    """
    first, second = _shared(before, after)
    ks = sorted(set(before.pass_at) & set(after.pass_at))
    old, new = prompt_ratios(first, ks), prompt_ratios(second, ks)
    return {
        name: paired_ratio_difference(
            old[name][:2],
            new[name][:2],
            np.arange(len(first)),
            unit=unit,
            method="difference over the same prompts, clustered by prompt",
        )
        for name, (_, _, unit) in new.items()
    }


def _shared(
    before: EvaluationRow, after: EvaluationRow
) -> tuple[Sequence[PromptResult], Sequence[PromptResult]]:
    """The results of the prompts that both have, in one order."""
    old = {p.prompt_id: p for p in before.prompts}
    second = [p for p in after.prompts if p.prompt_id in old]
    if not second:
        raise MeasurementError(
            f"the evaluations of step {before.step} and step {after.step} share no prompt; "
            "evaluate both with the same task, split and seed"
        )
    return [old[p.prompt_id] for p in second], second


def _state(result: PromptResult) -> int:
    """0 never, 1 sometimes, 2 always."""
    return 0 if result.num_correct == 0 else 2 if result.num_correct == result.num_samples else 1
