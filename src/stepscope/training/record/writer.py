"""Writes the record of a training: a step appears whole or not at all, and is replaced when taken again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from stepscope.errors import RunFolderError
from stepscope.policy import vectors
from stepscope.policy.recorded import RecordedTraining, TrainingState
from stepscope.policy.vectors import ParameterVector
from stepscope.reading.recording import RecordFolder, recorded_steps
from stepscope.results.recording import (
    FIGURES,
    GRADIENT,
    PARTIAL,
    RECORD,
    SEQUENCES,
    START,
    STATE,
    STEPS,
    TOKENS,
    RunRecord,
    StepFigures,
    step_folder,
)
from stepscope.training.record.batch import StepBatch

_OWN = (
    "groups",
    "max_grad_norm",
    "temperature",
    "max_response_tokens",
    "num_iterations",
    "loss_type",
    "beta",
)
"""What a record's training cannot change on the way."""


class RecordWriter:
    """The record of one training under way.

    Attributes:
        folder: that ``record.json`` is in.
        record: what is in it.
        written: bytes so far, those of an interrupted run among them.
        checked: a step recorded has had a gradient, so that the first of them was held against its weights.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record
        self.written = 0
        self.checked = False

    def begin(self, done: int, state: TrainingState) -> None:
        """Start a record, or go on with that of an interrupted training.

        Args:
            done: optimizer steps that the training has behind it.
            state: parameters and moments as they are.

        Raises:
            RunFolderError: the folder holds a finished record, one that ends before ``done``, or that of
                another training.
        """
        if (self.folder / RECORD).is_file():
            self._go_on(RunRecord.read(self.folder / RECORD), done, state)
        else:
            self._start(done, state)
        self.written = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
        self.checked = any(
            StepFigures.read(step_folder(self.folder, at) / FIGURES).grad_norm > 0
            for at in recorded_steps(self.folder)
        )

    def _start(self, done: int, state: TrainingState) -> None:
        self._forget_from(0)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = replace(self.record, first_step=done + 1)
        state.save(self.folder / START)
        self.record.write(self.folder / RECORD)

    def _go_on(self, earlier: RunRecord, done: int, state: TrainingState) -> None:
        there = recorded_steps(self.folder)
        last = there[-1] if there else earlier.first_step - 1
        if earlier.complete and done < last:
            raise RunFolderError(
                f"{self.folder}: holds the record of a finished training of {last} steps; delete it, or give "
                "the recorder another folder"
            )
        if done < earlier.first_step:
            if done == earlier.first_step - 1 and not self._recorded(done, state).same(state):
                raise RunFolderError(
                    f"{self.folder}: holds the unfinished record of a training that began from another "
                    "state; delete it, or give the recorder another folder"
                )
            (self.folder / RECORD).unlink()
            self._start(done, state)
            return
        if done > last:
            raise RunFolderError(
                f"{self.folder}: the record ends with step {last}"
                f"{f' ({earlier.fault})' if earlier.fault else ''}, and the training goes on from step "
                f"{done}; move it elsewhere to record the rest by itself"
            )
        for name in _OWN:
            if (before := getattr(earlier, name)) != (now := getattr(self.record, name)):
                raise RunFolderError(
                    f"{self.folder}: {name} was {_short(before)} in the steps recorded and is {_short(now)}; "
                    "go on with the settings of that training, or give the recorder another folder"
                )
        self._forget_from(done + 1)
        if not self._recorded(done, state).same(state):
            raise RunFolderError(
                f"{self.folder}: the training goes on from another state than the one recorded after step "
                f"{done}; it is another training: give the recorder another folder"
            )
        self.record = replace(
            self.record, first_step=earlier.first_step, state_every=earlier.state_every, complete=False
        )
        self.record.write(self.folder / RECORD)

    def _recorded(self, done: int, like: TrainingState) -> TrainingState:
        """The recorded state after a step, where ``like`` is."""
        if not recorded_steps(self.folder):
            return TrainingState.load(self.folder / START).to(_device(like))
        return RecordedTraining(RecordFolder(self.folder), _device(like)).state(done)

    def _forget_from(self, index: int) -> None:
        """Remove what was being written, and steps from ``index`` on, the last first."""
        for partial in (self.folder / STEPS).glob(f"*{PARTIAL}"):
            shutil.rmtree(partial)
        for at in reversed(recorded_steps(self.folder)):
            if at >= index:
                whole = step_folder(self.folder, at)
                shutil.rmtree(whole.rename(_partial(whole)))

    def keeps_state(self, index: int) -> bool:
        """Whether parameters and moments after a step are kept."""
        every = self.record.state_every
        return bool(every) and index % every == 0

    def step(
        self,
        figures: StepFigures,
        batch: StepBatch,
        gradient: ParameterVector,
        state: TrainingState | None,
    ) -> None:
        """Add a step.

        Args:
            figures: of it.
            batch: that made it.
            gradient: as the optimizer took it.
            state: after it, where it is kept.
        """
        whole = step_folder(self.folder, figures.step)
        partial = _partial(whole)
        partial.mkdir(parents=True)
        figures.write(partial / FIGURES)
        batch.rollouts.to_parquet(
            partial / SEQUENCES,
            partial / TOKENS,
            tokens=batch.texts,
            token_weights=batch.token_weights,
            entropy_weights=batch.entropy_weights,
        )
        vectors.save(gradient, partial / GRADIENT)
        if state is not None:
            state.save(partial / STATE)
        self.written += sum(path.stat().st_size for path in partial.iterdir())
        partial.rename(whole)
        self.checked |= figures.grad_norm > 0

    def finish(self, index: int, state: TrainingState) -> None:
        """Keep the state after the last step, and say that the record is complete."""
        path = step_folder(self.folder, index) / STATE
        if not path.exists():
            state.save(path)
        self.record = replace(self.record, complete=True)
        self.record.write(self.folder / RECORD)

    def mark(self, fault: str) -> None:
        """Say why there are no more steps."""
        self.record = replace(self.record, fault=fault)
        self.record.write(self.folder / RECORD)


def live_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> TrainingState:
    """Parameters and moments of a running AdamW, not copied; zero where it has taken no step.

    Args:
        optimizer: without wrappers.
        names: of its parameters, by ``id``.
    """
    parameters, first, second, steps = {}, {}, {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name, entry = names[id(parameter)], optimizer.state.get(parameter, {})
            parameters[name] = parameter.detach()
            first[name] = entry.get("exp_avg", torch.zeros_like(parameters[name]))
            second[name] = entry.get("exp_avg_sq", torch.zeros_like(parameters[name]))
            steps[name] = int(entry.get("step", 0))
    return TrainingState(parameters, first, second, steps)


def _device(state: TrainingState) -> torch.device:
    return next(iter(state.parameters.values())).device


def _partial(whole: Path) -> Path:
    return whole.with_name(whole.name + PARTIAL)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
