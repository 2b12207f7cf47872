"""A recorded training as a path: states are replayed towards the end and kept, since a ledger goes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from stepscope.errors import MeasurementError
from stepscope.measure.ledger.adjoint import TakenStep
from stepscope.measure.ledger.path import PathStep
from stepscope.policy import vectors
from stepscope.policy.optim.adamw import AdamWState
from stepscope.policy.recorded import RecordedTraining, TrainingState
from stepscope.policy.vectors import ParameterVector

MOVED_TOGETHER = 3
"""Vectors of a state: parameters and two moments."""


@dataclass
class RecordedPath:
    """The steps of a record after ``start`` up to ``stop``; see :class:`stepscope.measure.ledger.path.Path`.

    Attributes:
        training: the record.
        start: number of the last step before the path; place 0 is after it.
        stop: number of the path's last step.
        memory_bytes: for states that are kept between two that are on disk.
    """

    training: RecordedTraining
    start: int
    stop: int
    memory_bytes: int = 2**30
    _states: dict[int, TrainingState] = field(default_factory=dict)
    _step: tuple[int, PathStep] | None = None

    def __post_init__(self) -> None:
        """Refuse steps that are not recorded.

        Raises:
            MeasurementError: naming those that are.
        """
        steps = self.training.steps
        if not steps[0] - 1 <= self.start < self.stop <= steps[-1]:
            raise MeasurementError(
                f"{self.training.folder.path}: the account was to go from step {self.start} to step "
                f"{self.stop}, and recorded is from {steps[0] - 1} to {steps[-1]}; choose --from and --to so"
            )

    def __len__(self) -> int:
        """Number of steps."""
        return self.stop - self.start

    @cached_property
    def room(self) -> int:
        """Most states that are kept."""
        first = self.training.state(self.start)
        size = MOVED_TOGETHER * sum(t.numel() * t.element_size() for t in first.parameters.values())
        return max(4, self.memory_bytes // max(size, 1))

    def parameters(self, place: int) -> ParameterVector:
        """Theta after step ``start + place``."""
        return self._state(self.start + place).parameters

    def step(self, place: int) -> PathStep:
        """The step from ``place`` to ``place`` + 1."""
        index = self.start + place + 1
        if self._step is None or self._step[0] != index:
            self._step = index, self._read(index)
        return self._step[1]

    def first_moment(self) -> tuple[ParameterVector, Mapping[str, int]]:
        """The optimizer's first moment at the start of the path, and its count of steps."""
        state = self._state(self.start)
        return state.exp_avg, state.steps

    def start_state(self) -> TrainingState:
        """Parameters and moments at the start of the path."""
        return self._state(self.start)

    def _read(self, index: int) -> PathStep:
        batch = self.training.folder.batch(index)
        gradient, after = self.training.gradient(index), self._state(index)
        clip = batch.figures.clip_coefficient
        return PathStep(
            number=index,
            taken=TakenStep(
                state=AdamWState(
                    groups=self.training.groups(batch.figures.lrs, gradient),
                    exp_avg=after.exp_avg,
                    exp_avg_sq=after.exp_avg_sq,
                    steps=after.steps,
                ),
                clip=clip,
                max_norm=self.training.folder.record.max_grad_norm,
                ascent=vectors.zeros_like(after.exp_avg) | vectors.scale(gradient, -1 / clip),
            ),
            update=batch.rollouts,
            token_weights=batch.token_weights,
            entropy_weights=batch.entropy_weights,
        )

    def _state(self, index: int) -> TrainingState:
        """A state; where it has to be replayed, those on the way stay as far as there is room."""
        if index not in self._states:
            kept = index
            while self.training.folder.state(kept) is None and kept not in self._states:
                kept -= 1
            for at in range(max(kept, index - self.room + 1), index + 1):
                self._states[at] = self.training.state(at)
            if index < self.training.steps[-1] and self.training.folder.state(index + 1) is not None:
                self.training.state(index + 1)  # going back, no replay would come to a kept state otherwise
            while len(self._states) > self.room and (spare := self._spare(index)) is not None:
                del self._states[spare]
        return self._states[index]

    def _spare(self, index: int) -> int | None:
        """The state furthest from one that was asked for."""
        return max((at for at in self._states if at != index), key=lambda at: abs(at - index), default=None)
