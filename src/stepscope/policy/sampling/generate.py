"""Sampling by transformers' ``generate``: seed-exact, and the sampler unless another one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from stepscope.errors import MeasurementError
from stepscope.policy.forward import base_model, plain_experts
from stepscope.policy.group import current
from stepscope.policy.numerics.precision import matching_precision
from stepscope.policy.passes import Budget, in_pieces
from stepscope.policy.profiler import generating
from stepscope.policy.sampling.base import Decoding, Request, Response, Sampler
from stepscope.policy.sharding import resharded, sharded
from stepscope.policy.state import Policy


@dataclass(frozen=True, kw_only=True)
class TransformersSampler(Sampler):
    """Every token by inverting the distribution function at a uniform number of its own.

    The numbers belong to a sequence and a position: the responses do not depend on how many are generated at
    a time (beyond round-off), policies that differ little give responses that differ little, and no global
    random state is touched. The weights are the policy's, so there are no log-probs of its own to be told.
    """

    @property
    def name(self) -> str:
        """What it is called in messages and records."""
        return "transformers"

    def randomness(self, generator: np.random.Generator, count: int, length: int) -> npt.NDArray[Any]:
        """(seq, tok) uniform multiples of 2^-52 below 1: times a number they stay below that number."""
        return generator.integers(1 << 52, size=(count, length)) / float(1 << 52)

    def sample(self, policy: Policy, request: Request, budget: Budget) -> list[Response]:
        """The responses, in the order of the request."""
        widths = [(len(ids), request.max_tokens) for ids in request.prompts]

        def some(rows: slice) -> list[Response]:
            chosen = request.part(rows)
            if sharded(policy.model) is not None:
                return _together(policy, chosen, self.decoding)
            return _generated(policy, chosen, self.decoding)

        found = in_pieces(policy, widths, some, budget=budget, use="generation", what="sampling")
        return [response for rows in found for response in rows]


def _together(policy: Policy, request: Request, decoding: Decoding) -> list[Response]:
    """Each process of a group in lockstep generates a part; all get all of it."""
    group = current()
    size = -(-len(request) // group.size)
    own = request.part(slice(group.rank * size, (group.rank + 1) * size))
    mine = len(own)
    if mine == 0:
        own = request.part(slice(0, 1))  # for the others' sake
    found = _generated(policy, own, decoding)[:mine]
    return [response for part in group.gather(found) for response in part]


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token: the first at which the distribution function exceeds the uniform number given."""

    def __init__(self, uniforms: Tensor, width: int) -> None:
        self.uniforms = uniforms
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = scores.double().softmax(-1).cumsum(-1)
        if not bool(below[:, -1].isfinite().all()):
            raise MeasurementError(
                f"the model's logits for response token {input_ids.shape[1] - self.width} are not finite, so "
                "nothing can be sampled; load it at a wider precision (float32, float64)"
            )
        column = input_ids.shape[1] - self.width
        level = self.uniforms[:, column : column + 1] * below[:, -1:]
        token = torch.searchsorted(below, level, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _generated(policy: Policy, request: Request, decoding: Decoding) -> list[Response]:
    """Responses to some prompts at once, each cut after its first end-of-sequence token."""
    ends = list(request.ends)
    pad = policy.tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    width = max(map(len, request.prompts))
    input_ids = torch.full((len(request), width), pad, dtype=torch.long)
    attention = torch.zeros_like(input_ids)
    for row, ids in enumerate(request.prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention[row, width - len(ids) :] = 1
    model: Any = base_model(policy.model)
    kept = model.generation_config
    cool = TemperatureLogitsWarper(decoding.own_temperature(request.temperature))
    draws = LogitsProcessorList([cool, *decoding.warpers()])
    draws.append(_Draw(torch.from_numpy(request.randomness).to(policy.device), width))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=request.max_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=policy.tokenizer.bos_token_id,
    )
    most = int(attention.sum()) + len(request) * request.max_tokens
    try:
        with (
            torch.no_grad(),
            matching_precision(model),
            plain_experts(model),
            resharded(model),
            generating(len(request), most),
        ):
            output: Tensor = model.generate(
                input_ids=input_ids.to(policy.device),
                attention_mask=attention.to(policy.device),
                logits_processor=draws,
                generation_config=model.generation_config,
                synced_gpus=sharded(model) is not None,
            )
    finally:
        model.generation_config = kept
    stops = set(ends)
    found = []
    for row in output[:, width:].tolist():
        length = next((k + 1 for k, token in enumerate(row) if token in stops), len(row))
        found.append(Response(tuple(row[:length])))
    return found
