"""The batch of the step under way, as TRL's loss sees it: sequences, log-probs and token weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy.texts import ResponseText
from stepscope.results import FloatArray, Rollouts


@dataclass(frozen=True)
class SeenSequence:
    """One sequence of the step under way.

    Attributes:
        prompt_ids: of its prompt.
        response_ids: of the response tokens that are in the loss.
        logprobs: (tok,) their log-probs.
        entropies: (tok,) entropies before them.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: FloatArray
    entropies: FloatArray


@dataclass(frozen=True)
class Captured(SeenSequence):
    """One sequence as the loss saw it.

    Attributes:
        weights: (tok,) token weights -dLoss/dl that the loss sent back.
        entropy_weights: (tok,) -dLoss/dH, where it sent some back to the entropies, too (a bonus).
    """

    weights: FloatArray
    entropy_weights: FloatArray | None = None


C = TypeVar("C", bound=Captured)


@dataclass
class MicroBatch:
    """What one forward pass of the loss gave; all (seq, pos) but for the weights that backward adds.

    Position j of ``logprobs``, ``entropies`` and ``scored`` belongs to token j + 1 of ``ids``.
    """

    ids: Tensor
    attention: Tensor
    scored: Tensor
    logprobs: Tensor
    entropies: Tensor
    weights: Tensor | None = None
    entropy_weights: Tensor | None = None

    def take_gradient(self, gradient: Tensor) -> None:
        """Keep dLoss/dlogprob, with its sign turned."""
        self.weights = -gradient.detach()

    def take_entropy_gradient(self, gradient: Tensor | None) -> None:
        """Keep dLoss/dentropy, with its sign turned; data parallelism sends back none where none is used."""
        if gradient is not None:
            self.entropy_weights = -gradient.detach()

    def sequences(self) -> list[tuple[int, Captured]]:
        """The sequences that are in the loss, without padding, each with its row."""
        assert self.weights is not None
        ids, attention, scored = (v.cpu().numpy() for v in (self.ids, self.attention, self.scored))
        per_token = [numbers(v) for v in (self.logprobs, self.entropies, self.weights)]
        bonus = None if self.entropy_weights is None else numbers(self.entropy_weights)
        found = []
        start = int(scored.any(0).argmax()) + 1
        for row, mask in enumerate(scored):
            if not mask.any():  # taken out of the loss
                continue
            logprobs, entropies, weights = (values[row][mask] for values in per_token)
            captured = Captured(
                prompt_ids=tuple(ids[row, :start][attention[row, :start]].tolist()),
                response_ids=tuple(ids[row, 1:][mask].tolist()),
                logprobs=logprobs,
                entropies=entropies,
                weights=weights,
                entropy_weights=None if bonus is None else bonus[row][mask],
            )
            found.append((row, captured))
        return found


@dataclass
class BatchRecorder:
    """Reads the batch off the forward and backward passes of the loss, without a hand in either.

    TRL computes its loss from ``log_probs`` that the model's own forward returns. A hook keeps them, and a
    hook on their gradient keeps the token weights w_ik = -dLoss/dl_ik: exact for every loss, clipping, mask
    and scaling, because they are what the loss itself sent back.

    Attributes:
        model: the model that is trained, without wrappers.
        seen: the micro-batches so far.
    """

    model: nn.Module
    seen: list[MicroBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start to record."""
        self._handle = self.model.register_forward_hook(self._keep, with_kwargs=True)

    def stop(self) -> None:
        """Record no more."""
        self._handle.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        logprobs = getattr(output, "log_probs", None)
        if logprobs is None or not logprobs.requires_grad:
            return
        micro = MicroBatch(
            ids=kwargs["input_ids"],
            attention=kwargs["attention_mask"].bool(),
            scored=output.label_mask,
            logprobs=logprobs.detach(),
            entropies=output.entropy.detach(),
        )
        logprobs.register_hook(micro.take_gradient)
        if output.entropy.requires_grad:
            output.entropy.register_hook(micro.take_entropy_gradient)
        self.seen.append(micro)

    def gather(self) -> list[Captured]:
        """The sequences of the whole step, those of all processes; every process has to call this."""
        return gathered([s for micro in self.seen if micro.weights is not None for _, s in micro.sequences()])


def gathered(own: list[C]) -> list[C]:
    """The sequences of all processes; every process has to call this.

    Weights are divided by the number of processes, since their gradients are averaged.
    """
    if not torch.distributed.is_initialized() or (world := torch.distributed.get_world_size()) == 1:
        return own
    return [
        replace(
            sequence,
            weights=sequence.weights / world,
            entropy_weights=None if (bonus := sequence.entropy_weights) is None else bonus / world,
        )
        for sequence in gather_object(own)
    ]


def numbers(values: Tensor) -> FloatArray:
    """An array in float64."""
    return np.asarray(values.double().cpu().numpy(), dtype=np.float64)


def as_rollouts(
    sequences: Sequence[SeenSequence],
    tokenizer: Any,
    read: ResponseText,
    *,
    temperature: float,
    max_response_tokens: int,
) -> Rollouts:
    """The sequences as an update batch; rewards and advantages are not known.

    Responses are as ``read`` reads them. Equal prompts form a group.

    Raises:
        MeasurementError: nothing was captured, so the loss does not use the log-probs of TRL's model output.
    """
    if not sequences:
        raise MeasurementError(
            "the loss took no log-probs from the model's output, so the batch of the step cannot be seen; "
            "train with TRL's GRPOTrainer, or set noise=False and top_tokens=0"
        )
    count = len(sequences)
    asked = list(dict.fromkeys(s.prompt_ids for s in sequences))
    prompts = dict(zip(asked, tokenizer.batch_decode([list(ids) for ids in asked]), strict=True))
    responses = {ids: read.whole(ids) for ids in {s.response_ids for s in sequences}}
    return Rollouts(
        prompt_ids=tuple(" ".join(map(str, s.prompt_ids)) for s in sequences),
        prompts=tuple(prompts[s.prompt_ids] for s in sequences),
        responses=tuple(responses[s.response_ids] for s in sequences),
        prompt_token_ids=tuple(s.prompt_ids for s in sequences),
        response_token_ids=tuple(s.response_ids for s in sequences),
        rewards=np.full(count, np.nan),
        correct=np.zeros(count, dtype=np.bool_),
        truncated=np.zeros(count, dtype=np.bool_),
        logprobs=tuple(s.logprobs for s in sequences),
        entropies=tuple(s.entropies for s in sequences),
        temperature=temperature,
        max_response_tokens=max_response_tokens,
    )
