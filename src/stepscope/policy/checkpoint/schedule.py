"""The learning rate of the next step, as a checkpoint's scheduler has it.

The Trainer saves after ``scheduler.step()``, so the rates in ``optimizer.pt`` are those of the next step and
``scheduler.pt`` says the same (``_last_lr``); the rate that it logs beside the step is the one before. A loop
of one's own may save the optimizer first and step the scheduler then: its optimizer has the rates of the step
that was taken, and its scheduler those of the next.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.pickles import read_tensors
from stepscope.policy.numerics.finiteness import real_number
from stepscope.policy.optim.base import OptimizerState

SCHEDULER_FILE = "scheduler.pt"
"""Name of the scheduler's state inside a checkpoint folder."""


@reads_foreign
def scheduled_rates(folder: Path) -> tuple[float, ...] | None:
    """(group,) learning rates of the next step; None where there is no scheduler, or one that keeps none.

    Raises:
        CheckpointError: the file is damaged, holds more than plain data, or a rate that is none.
    """
    file = folder / SCHEDULER_FILE
    if not file.is_file():
        return None
    state = read_tensors(file)
    rates = state.get("_last_lr") if isinstance(state, dict) else None
    if not isinstance(rates, list | tuple):
        return None
    found = tuple(real_number(rate, "_last_lr", str(file)) for rate in rates)
    if wrong := [rate for rate in found if not 0 <= rate < math.inf]:
        raise CheckpointError(f"{file}: learning rate {wrong[0]}, expected 0 or more; copy the file again")
    return found


def at_scheduled_rates(state: OptimizerState, folder: Path) -> OptimizerState:
    """The state with the scheduler's learning rates; each group remembers its own where it differs.

    Args:
        state: as the optimizer's file has it.
        folder: the checkpoint.

    Raises:
        CheckpointError: as :func:`scheduled_rates`, or the scheduler is of another number of groups.
    """
    rates = scheduled_rates(folder)
    if rates is None:
        return state
    if len(rates) != len(state.groups):
        raise CheckpointError(
            f"{folder / SCHEDULER_FILE}: learning rates of {len(rates)} parameter groups, and the optimizer "
            f"has {len(state.groups)}; copy the file that belongs to this checkpoint, or remove it if the "
            "rates in the optimizer's file are those of the next step"
        )
    groups = tuple(
        group if group.lr == rate else replace(group, lr=rate, saved_lr=group.lr)
        for group, rate in zip(state.groups, rates, strict=True)
    )
    return replace(state, groups=groups)
