"""The record of a training: what every optimizer step was made of, in files.

    RUN/record/record.json                the optimizer, the trainer's settings, what is recorded how often
    RUN/record/start.safetensors          parameters and moments before the first step recorded
    RUN/record/steps/000012/step.json     figures of the step
                           /sequences.parquet, tokens.parquet    its batch, with the token weights
                           /gradient.safetensors                 the gradient that the optimizer took
                           /state.safetensors                    now and then: parameters and moments after it

A step's folder gets its name when all of it is on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stepscope.results.records import Record
from stepscope.stats import Number

FOLDER = "record"
RECORD = "record.json"
START = "start.safetensors"
STEPS = "steps"
FIGURES = "step.json"
SEQUENCES = "sequences.parquet"
TOKENS = "tokens.parquet"
GRADIENT = "gradient.safetensors"
STATE = "state.safetensors"
PARTIAL = ".partial"
"""Ends the name of a step's folder while it is written."""


def step_folder(record: Path, index: int) -> Path:
    """Where a step lies in the folder of a record."""
    return record / STEPS / f"{index:06d}"


@dataclass(frozen=True)
class RecordedGroup(Record):
    """A parameter group of AdamW: what stays the same over a training.

    Attributes:
        names: of its parameters, in the optimizer's order.
        betas: b1, b2.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        foreach: which of torch's implementations took the steps; they differ in rounding. None for torch's
            choice.
        fused: likewise.
    """

    names: tuple[str, ...]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    foreach: bool | None = None
    fused: bool | None = None


@dataclass(frozen=True)
class RunRecord(Record):
    """``record.json``: what holds for all steps of a recorded training.

    Attributes:
        groups: parameter groups.
        first_step: number of the first step recorded; 1 is the training's first.
        planned_steps: number of the training's last step, as its settings have it.
        state_every: a step whose number is a multiple has parameters and moments after it beside its
            gradient; 0 where none has.
        max_grad_norm: clipping threshold; 0 for none.
        temperature: of sampling.
        max_response_tokens: longest response.
        num_iterations: optimizer steps on a batch.
        loss_type: TRL's name of the loss.
        beta: weight of the KL penalty.
        device: type of the device that the optimizer worked on.
        torch: version.
        complete: the training has ended and all of its steps from the first on are here.
        fault: why nothing is recorded from some step on; empty where there is no such step.
    """

    format_version: ClassVar[int] = 1

    groups: tuple[RecordedGroup, ...]
    first_step: int
    planned_steps: int
    state_every: int
    max_grad_norm: float
    temperature: float
    max_response_tokens: int
    num_iterations: int
    loss_type: str
    beta: float
    device: str
    torch: str
    complete: bool = False
    fault: str = ""


@dataclass(frozen=True)
class StepFigures(Record):
    """``step.json``: figures of one optimizer step.

    Attributes:
        step: its number; 1 is the training's first.
        lrs: learning rate of every group in it.
        grad_norm: norm of the gradient before it was clipped.
        clip_coefficient: c, by which clipping has multiplied the gradient.
        gradient_error: relative difference between the gradient and sum_ik w_ik grad l_ik (and the part that
            went through entropies), computed once for a training; nan where it was not.
    """

    step: int
    lrs: tuple[float, ...]
    grad_norm: float
    clip_coefficient: float
    gradient_error: Number
