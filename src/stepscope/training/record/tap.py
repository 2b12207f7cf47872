"""What TRL knows of the sequences in its loss: rewards, advantages, masks, the log-probs it divides by.

TRL tells callbacks none of it, and shuffles a generated batch before it cuts it into micro-batches. So three
of the trainer's methods are wrapped while it trains: the one that grades, the one that makes the batch, to
which the place of every sequence is added, so that TRL's own shuffling and cutting carry it along, and the
one that computes the loss, which gets the micro-batch as the loss sees it. What they return is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepscope.errors import ConfigError, MeasurementError
from stepscope.results import BoolArray, FloatArray
from stepscope.training.watching.capture import BatchRecorder, Captured, MicroBatch
from stepscope.training.watching.guest import Guest, weighted_rewards

PLACE = "stepscope_place"
"""Key of TRL's batches under which a sequence has its place in the generated batch of its process."""

_NEEDED = ("_calculate_rewards", "_generate_and_score_completions", "compute_loss")
_KEPT = (
    *(PLACE, "completion_ids", "completion_mask", "tool_mask", "advantages"),
    *("old_per_token_logps", "sampling_per_token_logps"),
)


@dataclass(frozen=True)
class Known:
    """What a trainer that has tasks knows of a response.

    Attributes:
        prompt_id: of its prompt.
        question: what was asked.
        correct: whether the answer is.
    """

    prompt_id: str
    question: str
    correct: bool


@runtime_checkable
class Knowing(Protocol):
    """A trainer whose rows are problems of a task."""

    def known_response(self, row: Mapping[str, Any], completion: str) -> Known:
        """What it knows of a completion to a row of its data."""


@dataclass(frozen=True)
class Graded:
    """A sequence of a generated batch.

    Attributes:
        reward: nan where no function gave one.
        advantage: of the whole response.
        group: number of its prompt's group in the generated batch, over all processes.
        known: by the trainer's task, or None.
    """

    reward: float
    advantage: float
    group: int
    known: Known | None


@dataclass(frozen=True)
class TrainedSequence(Captured):
    """A sequence as the loss saw it, with all that the trainer knows of it.

    Attributes:
        graded: reward, advantage, group.
        token_advantages: (tok,) where they differ within the response.
        old_logprobs: (tok,) log-probs that the loss divides by; None where these are ``logprobs``.
        sampler_logprobs: (tok,) as the engine that sampled gave them, or None.
        mask: (tok,) False where a tool or an environment wrote; None where the policy wrote all.
    """

    graded: Graded = field(kw_only=True)
    token_advantages: FloatArray | None = None
    old_logprobs: FloatArray | None = None
    sampler_logprobs: FloatArray | None = None
    mask: BoolArray | None = None


class TrainerTap:
    """Wraps the trainer's methods between :meth:`open` and :meth:`close`.

    Args:
        trainer: of TRL.
        guest: what goes wrong in a wrapper goes there.

    Raises:
        ConfigError: it has not the methods of TRL's GRPO trainer.
    """

    def __init__(self, trainer: Any, guest: Callable[[], Guest]) -> None:
        lacking = [name for name in _NEEDED if not callable(getattr(trainer, name, None))]
        if lacking:
            raise ConfigError(
                f"the trainer is {type(trainer).__name__}, which has no {lacking[0]}; record a training with "
                "TRL's GRPOTrainer, RLOOTrainer or one that derives from them"
            )
        if getattr(trainer, "aux_loss_enabled", False):
            raise ConfigError(
                "the loss has the router's balance in it (router_aux_loss_coef), which goes through no "
                "log-prob and is not recorded; set output_router_logits=False in the model's configuration"
            )
        self.trainer = trainer
        self.guest = guest
        self._recorder: BatchRecorder | None = None
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._completions: Sequence[Any] = ()
        self._rewards: Tensor | None = None
        self._graded: list[Graded] = []
        self._micro_batches: list[tuple[MicroBatch, int, Mapping[str, npt.NDArray[Any]]]] = []

    def open(self) -> None:
        """Wrap."""
        trainer = self.trainer
        for name, wrapper in zip(_NEEDED, (self._grading, self._generating, self._loss), strict=True):
            setattr(trainer, name, wrapper(getattr(trainer, name)))

    def close(self) -> None:
        """Give the trainer its own methods back."""
        self.stop()
        for name in _NEEDED:
            vars(self.trainer).pop(name, None)

    def watch(self, model: Any) -> None:
        """Begin with the loss of an optimizer step."""
        self.stop()
        self._recorder = BatchRecorder(model)

    def stop(self) -> None:
        """End with it."""
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder, self._micro_batches = None, []

    def sequences(self) -> list[TrainedSequence]:
        """The sequences of the step on this process, once the gradient is complete.

        Raises:
            MeasurementError: the loss took no log-probs from the model, or the trainer's batches are not as
                TRL makes them.
        """
        return [
            self._trained(captured, first + row, inputs)
            for micro, first, inputs in self._micro_batches
            if micro.weights is not None
            for row, captured in micro.sequences()
        ]

    def _trained(
        self, captured: Captured, row: int, inputs: Mapping[str, npt.NDArray[Any]]
    ) -> TrainedSequence:
        """A captured sequence with the trainer's part of it."""
        real = inputs["completion_mask"][row].astype(bool)
        if tuple(inputs["completion_ids"][row][real].tolist()) != captured.response_ids:
            raise MeasurementError("the loss looked at other tokens than those of the trainer's batch")
        advantages, tool = inputs["advantages"], inputs.get("tool_mask")
        mask = None if tool is None else tool[row][real].astype(bool)

        def per_token(name: str) -> FloatArray | None:
            values = inputs.get(name)
            return None if values is None else values[row][real].astype(np.float64)

        return TrainedSequence(
            **{f.name: getattr(captured, f.name) for f in fields(captured)},
            graded=self._graded[int(inputs[PLACE][row])],
            token_advantages=per_token("advantages") if advantages.ndim > 1 else None,
            old_logprobs=per_token("old_per_token_logps"),
            sampler_logprobs=per_token("sampling_per_token_logps"),
            mask=None if mask is None or mask.all() else mask,
        )

    def _grading(self, grade: Any) -> Any:
        def wrapped(inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
            rewards = grade(inputs, prompts, completions, ids)
            self._rows, self._completions, self._rewards = list(inputs), list(completions), rewards
            return rewards

        return wrapped

    def _generating(self, generate: Any) -> Any:
        def wrapped(inputs: Any) -> Any:
            batch = generate(inputs)
            if self.trainer.model.training:
                with self.guest():
                    self._graded = self._grades(batch)
                    ids = batch["completion_ids"]
                    batch[PLACE] = torch.arange(len(ids), device=ids.device)
            return batch

        return wrapped

    def _grades(self, batch: Mapping[str, Any]) -> list[Graded]:
        """What is known of each sequence of the batch that was just generated."""
        trainer, count = self.trainer, len(batch["completion_ids"])
        if "pixel_values" in batch:
            raise MeasurementError("the prompts have images, and a record has none; record a text model")
        assert self._rewards is not None
        first = trainer.accelerator.process_index * count
        rewards = weighted_rewards(trainer, self._rewards)[first : first + count]
        knows = isinstance(trainer, Knowing)
        return [
            Graded(
                float(reward),
                float(advantage),
                (first + place) // trainer.num_generations,
                trainer.known_response(row, completion) if knows else None,
            )
            for place, (reward, advantage, row, completion) in enumerate(
                zip(rewards, batch["advantages"].tolist(), self._rows, self._completions, strict=True)
            )
        ]

    def _loss(self, compute: Any) -> Any:
        def wrapped(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = len(self._recorder.seen) if self._recorder is not None else 0
            loss = compute(model, inputs, *args, **kwargs)
            if self._recorder is not None and self.trainer.model.training:
                with self.guest():
                    self._pair(self._recorder.seen[before:], inputs)
            return loss

        return wrapped

    def _pair(self, seen: Sequence[MicroBatch], inputs: Mapping[str, Any]) -> None:
        """Put what the loss looked at beside the batch that it was given."""
        if PLACE not in inputs:
            raise MeasurementError(
                "the trainer makes its batches in a way of its own, or made this one before the recorder "
                "came, so that sequences and rewards cannot be brought together; record a training with "
                "TRL's GRPOTrainer, and from its start"
            )
        kept = {name: _array(inputs[name]) for name in _KEPT if inputs.get(name) is not None}
        first = 0
        for micro in seen:
            self._micro_batches.append((micro, first, kept))
            first += len(micro.ids)
        if seen and first != len(kept["completion_ids"]):
            raise MeasurementError(
                f"the loss looked at {first} sequences of {len(kept['completion_ids'])} in the batch"
            )


def _array(values: Tensor) -> npt.NDArray[Any]:
    """A tensor as an array; numpy knows no bfloat16."""
    values = values.detach().cpu()
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
