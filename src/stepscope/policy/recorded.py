"""The steps of a recorded training with their vectors: states that are kept, and bitwise replay between them.

A step of AdamW is a function of parameters, moments and gradient, in elementwise operations, so that the
library's own ``step()`` on the recorded gradient gives what it gave in the training, bit for bit, given the
same kind of device and version. That is why a record has one vector for a step (the gradient), and not two
(parameters and second moment), beside whole states at every K-th step, which are where a replay begins and
what it is held against.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stepscope.errors import RunFolderError
from stepscope.policy import vectors
from stepscope.policy.optim.adamw import AdamWGroup, AdamWState
from stepscope.policy.vectors import ParameterVector
from stepscope.reading.recording import RecordFolder, find_record
from stepscope.results import Brief, FloatArray, Rollouts
from stepscope.results.recording import RECORD, RecordedGroup

_KINDS = ("parameters", "exp_avg", "exp_avg_sq")
_STEPS = "steps"

ROUND_OFF = 1e-3
"""Largest difference between a replay and a state that is kept, relative to the parameters' largest entry or
the moment's, that another device or version of torch may make; anything larger is a damaged record."""


@dataclass(frozen=True, repr=False)
class TrainingState(Brief):
    """Where an AdamW training stands between two steps.

    Attributes:
        parameters: those that are trained, by name.
        exp_avg: m, first moment.
        exp_avg_sq: v, second moment.
        steps: AdamW's count of steps taken, by parameter.
    """

    parameters: ParameterVector
    exp_avg: ParameterVector
    exp_avg_sq: ParameterVector
    steps: Mapping[str, int]

    def save(self, path: Path) -> None:
        """Write the vectors as one file of safetensors, whole or not at all."""
        named = {f"{kind}/{n}": t for kind in _KINDS for n, t in getattr(self, kind).items()}
        counts = {f"{_STEPS}/{n}": torch.tensor(count) for n, count in self.steps.items()}
        vectors.save(named | counts, path)

    @classmethod
    def load(cls, path: Path) -> TrainingState:
        """The state that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
            RunFolderError: it lacks a vector.
        """
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_KINDS, _STEPS)}
        for name, tensor in vectors.load(path).items():
            kind, _, own = name.partition("/")
            parts.setdefault(kind, {})[own] = tensor
        steps = {n: int(count) for n, count in parts.pop(_STEPS).items()}
        if parts.keys() != set(_KINDS) or not steps or any(p.keys() != steps.keys() for p in parts.values()):
            raise RunFolderError(
                f"{path}: not every parameter has {', '.join(_KINDS)} and {_STEPS} in it; restore the record "
                "from a copy"
            )
        return cls(**parts, steps=steps)

    def to(self, device: torch.device) -> TrainingState:
        """The same on a device."""
        moved = {kind: {n: t.to(device) for n, t in getattr(self, kind).items()} for kind in _KINDS}
        return TrainingState(**moved, steps=self.steps)

    def same(self, other: TrainingState) -> bool:
        """Whether another state is this one bit for bit."""
        return self.steps == other.steps and all(
            torch.equal(getattr(self, kind)[n], getattr(other, kind)[n])
            for kind in _KINDS
            for n in self.steps
        )

    def apart(self, other: TrainingState) -> float:
        """Largest difference from another state, relative to the largest entry of the same kind."""
        found = 0.0
        for kind in _KINDS:
            own, others = getattr(self, kind), getattr(other, kind)
            scale = max(float(t.abs().max()) for t in own.values())
            gap = max(float((t.double() - others[n].double()).abs().max()) for n, t in own.items())
            found = max(found, gap / scale if scale > 0 else gap)
        return found


@dataclass(frozen=True, repr=False)
class RecordedStep(Brief):
    """One optimizer step of a training with all that an account of it needs.

    Attributes:
        index: its number; 1 is the training's first.
        rollouts: the batch as the loss saw it; log-probs and entropies are those of the policy before the
            step.
        token_weights: per sequence (tok,) w = -dLoss/dl, over all micro-batches.
        entropy_weights: per sequence (tok,) -dLoss/dH, of an entropy bonus; None for none.
        grad_norm: norm of the gradient before it was clipped.
        clip_coefficient: c, by which clipping has multiplied it.
        groups: AdamW's settings by parameter group, with the learning rates of this step.
        before: parameters and moments before the step.
        gradient: c grad Loss, as the optimizer took it; parameters without one stay as they are.
        after: parameters and moments after the step.
    """

    index: int
    rollouts: Rollouts
    token_weights: tuple[FloatArray, ...]
    entropy_weights: tuple[FloatArray, ...] | None
    grad_norm: float
    clip_coefficient: float
    groups: tuple[AdamWGroup, ...]
    before: TrainingState
    gradient: ParameterVector
    after: TrainingState

    @property
    def optimizer(self) -> AdamWState:
        """AdamW's state before the step, of the parameters that have a gradient in it."""
        return AdamWState(
            groups=self.groups,
            steps={n: self.before.steps[n] for n in self.gradient},
            exp_avg={n: self.before.exp_avg[n] for n in self.gradient},
            exp_avg_sq={n: self.before.exp_avg_sq[n] for n in self.gradient},
        )


@dataclass
class RecordedTraining:
    """The steps of a recorded training, in any order; cheapest in rising order, one after another.

    Attributes:
        folder: the record on disk.
        device: where vectors are put and steps replayed; a replay is bitwise on the kind of device that the
            record names.
        exact: whether every replay so far that came to a kept state was that state bit for bit.
    """

    folder: RecordFolder
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exact: bool = True
    _at: tuple[int, TrainingState] | None = None

    @classmethod
    def load(cls, run: Path | str, *, device: str | torch.device = "cpu") -> RecordedTraining:
        """The record of a run, given its folder or the record's own.

        Raises:
            RunFolderError: there is none.
        """
        return cls(find_record(Path(run)), torch.device(device))

    @property
    def steps(self) -> range:
        """Numbers of the steps recorded."""
        return self.folder.steps

    def __iter__(self) -> Iterator[RecordedStep]:
        """The steps in rising order."""
        return map(self.step, self.steps)

    def step(self, index: int) -> RecordedStep:
        """A step with its batch and its vectors.

        Raises:
            RunFolderError: it is not recorded, or a file that it needs is damaged.
        """
        batch = self.folder.batch(index)
        before = self.state(index - 1)
        after = self.state(index)
        gradient = self.gradient(index)
        return RecordedStep(
            index=index,
            rollouts=batch.rollouts,
            token_weights=batch.token_weights,
            entropy_weights=batch.entropy_weights,
            grad_norm=batch.figures.grad_norm,
            clip_coefficient=batch.figures.clip_coefficient,
            groups=self.groups(batch.figures.lrs, gradient),
            before=before,
            gradient=gradient,
            after=after,
        )

    def state(self, index: int) -> TrainingState:
        """Parameters and moments after a step; ``first - 1`` is the start.

        Raises:
            RunFolderError: it is not recorded, or a replay does not come to the state that is kept.
        """
        if index < self.steps[0] - 1 or index > self.steps[-1]:
            self.folder.folder(index)  # says which steps there are
        return self._replayed(*self._nearest(index), index)

    def verify(self) -> bool:
        """Replay the whole training; whether it comes to every kept state bit for bit.

        Raises:
            RunFolderError: a state differs by more than round-off.
        """
        self.exact = True
        start = self.steps[0] - 1
        kept = self._kept(start)
        assert kept is not None
        self._replayed(start, kept, self.steps[-1])
        return self.exact

    def _replayed(self, at: int, state: TrainingState, index: int) -> TrainingState:
        """The state after step ``index``, from the one after step ``at``."""
        while at < index:
            at += 1
            figures, gradient = self.folder.figures(at), self.gradient(at)
            state = adamw_step(state, self.folder.record.groups, figures.lrs, gradient)
            state = self._held_against_the_kept(at, state)
        self._at = at, state
        return state

    def _nearest(self, index: int) -> tuple[int, TrainingState]:
        """The last state known at or before a step: kept, or the one that was asked for last.

        One step from the latter is always taken, so that whoever goes through a training checks it.
        """
        if self._at is not None and self._at[0] in (index - 1, index):
            return self._at
        at = index
        while (kept := self._kept(at)) is None:
            at -= 1
            if self._at is not None and self._at[0] == at:
                return self._at
        return at, kept

    def _kept(self, index: int) -> TrainingState | None:
        path = self.folder.state(index)
        if path is None:
            return None
        state = TrainingState.load(path)
        names = {n for group in self.folder.record.groups for n in group.names}
        if odd := sorted(names ^ state.parameters.keys()):
            raise RunFolderError(
                f"{path}: {odd[0]} is {'missing, and is' if odd[0] in names else 'there, and is not'} among "
                f"the parameters of {RECORD}; one of the two is of another record: restore them from a copy"
            )
        return state.to(self.device)

    def _held_against_the_kept(self, index: int, state: TrainingState) -> TrainingState:
        """The kept state in place of the replayed one, where there is one."""
        kept = self._kept(index)
        if kept is None or kept.same(state):
            return state
        apart = kept.apart(state)
        where = f"{self.folder.path}: the replay of step {index}"
        if not apart <= ROUND_OFF:
            raise RunFolderError(
                f"{where} is {apart:.2g} (relative) away from the state that is kept, expected the same; a "
                "file between them is damaged: restore the record from a copy, or record again"
            )
        record = self.folder.record
        if self.exact:
            warnings.warn(
                f"{where} is not bitwise the state that is kept ({apart:.1g} relative): it was recorded on "
                f"{record.device} with torch {record.torch}, and this is {self.device.type} with "
                f"{torch.__version__}",
                stacklevel=3,
            )
        self.exact = False
        return kept

    def gradient(self, index: int) -> ParameterVector:
        """The gradient that the optimizer took in a step, after clipping."""
        return self._here(vectors.load(self.folder.gradient(index)))

    def groups(self, lrs: Sequence[float], gradient: ParameterVector) -> tuple[AdamWGroup, ...]:
        """AdamW's settings in a step of these learning rates, of the parameters that have a gradient."""
        return tuple(
            AdamWGroup(
                names=tuple(n for n in group.names if n in gradient),
                lr=lr,
                weight_decay=group.weight_decay,
                betas=group.betas,
                eps=group.eps,
                foreach=group.foreach,
                fused=group.fused,
            )
            for group, lr in zip(self.folder.record.groups, lrs, strict=True)
        )

    def _here(self, vector: ParameterVector) -> ParameterVector:
        return {n: t.to(self.device) for n, t in vector.items()}


def adamw_step(
    state: TrainingState,
    groups: Sequence[RecordedGroup | AdamWGroup],
    lrs: Sequence[float],
    gradient: ParameterVector,
) -> TrainingState:
    """The state after ``torch.optim.AdamW`` has taken a step along a recorded gradient.

    Args:
        state: before the step; not changed.
        groups: settings of the parameter groups.
        lrs: learning rate of each in this step.
        gradient: clipped; parameters without one stay as they are.
    """
    moving = {n: t.clone().requires_grad_() for n, t in state.parameters.items()}
    shared = ("betas", "eps", "weight_decay", "foreach", "fused")
    optimizer = torch.optim.AdamW(
        [
            {"params": [moving[n] for n in group.names], "lr": lr, **{k: getattr(group, k) for k in shared}}
            for group, lr in zip(groups, lrs, strict=True)
        ]
    )
    fused = {n for group in groups if group.fused for n in group.names}
    for name, tensor in gradient.items():
        parameter = moving[name]
        parameter.grad = tensor
        count = torch.tensor(float(state.steps[name]))
        optimizer.state[parameter] = {
            "step": count.to(parameter.device) if name in fused else count,
            "exp_avg": state.exp_avg[name].clone(),
            "exp_avg_sq": state.exp_avg_sq[name].clone(),
        }
    optimizer.step()
    moments = {n: optimizer.state[moving[n]] for n in gradient}
    return TrainingState(
        parameters={n: t.detach() for n, t in moving.items()},
        exp_avg={n: moments[n]["exp_avg"] if n in moments else t for n, t in state.exp_avg.items()},
        exp_avg_sq={n: moments[n]["exp_avg_sq"] if n in moments else t for n, t in state.exp_avg_sq.items()},
        steps={n: count + (n in gradient) for n, count in state.steps.items()},
    )
