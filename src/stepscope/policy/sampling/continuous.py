"""Sampling by transformers' continuous batching: sequences that end make room for others at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import GenerationConfig

from stepscope.errors import BatchError, MeasurementError
from stepscope.policy.forward import base_model, plain_experts, vocabulary_size
from stepscope.policy.passes import Budget
from stepscope.policy.sampling.base import (
    Convention,
    Request,
    Response,
    Sampler,
    checked_response,
    plain,
)
from stepscope.policy.state import Policy

PAGE = 32
"""Tokens of a page of the cache, where its size is ours to choose."""


@dataclass(frozen=True, kw_only=True)
class ContinuousSampler(Sampler):
    """``generate_batch`` with the policy's own weights, adapters in place.

    One seed makes all responses of a request together, so the same request gives the same responses, and a
    part of it others. Its log-probs are those of what it draws from, in float32.
    """

    conventions: ClassVar[tuple[Convention, ...]] = ("processed",)

    @property
    def name(self) -> str:
        """What it is called in messages and records."""
        return "continuous"

    def sample(self, policy: Policy, request: Request, budget: Budget) -> list[Response]:
        """The responses, in the order of the request.

        Raises:
            BatchError: a response is missing or failed.
            MeasurementError: the model has no continuous batching.
        """
        model: Any = base_model(policy.model)
        if not hasattr(model, "generate_batch"):
            raise MeasurementError(
                f"{type(model).__name__}: has no continuous batching; use the transformers sampler"
            )
        drawn = plain(self.decoding, self.name)
        pad = policy.tokenizer.pad_token_id
        config = GenerationConfig(
            do_sample=True,
            temperature=drawn.own_temperature(request.temperature),
            top_p=drawn.top_p,
            top_k=drawn.top_k,
            min_p=drawn.min_p or None,
            max_new_tokens=request.max_tokens,
            eos_token_id=list(request.ends) or None,
            pad_token_id=pad if pad is not None else (request.ends or (0,))[0],
        )
        seed = int(np.random.SeedSequence(request.randomness.ravel().tolist()).generate_state(1)[0])
        devices = [policy.device] if policy.device.type == "cuda" else []
        # its loop runs in a thread of its own, where the rules for float64 do not reach: it computes in the
        # model's type with the float32 parts that the model's code has
        with torch.no_grad(), torch.random.fork_rng(devices), plain_experts(model), _quiet():
            found = model.generate_batch(
                [list(ids) for ids in request.prompts],
                generation_config=config,
                continuous_batching_config=self._sizes(request, budget, policy.device.type, seed),
                progress_bar=False,
            )
        answers = list(found.values())
        failed = next((str(a.error) for a in answers if a.error is not None), "")
        if failed or len(answers) < len(request):
            raise BatchError(
                f"continuous batching: {len(answers)} of {len(request)} responses came back"
                f"{f', one with the error {failed}' if failed else ''}; use the transformers sampler"
            )
        size = vocabulary_size(policy.model)
        return [
            checked_response(
                list(answer.generated_tokens),
                list(answer.logprobs),
                request,
                where=f"continuous batching, response {i}",
                vocabulary=size,
            )
            for i, answer in enumerate(answers)
        ]

    @staticmethod
    def _sizes(request: Request, budget: Budget, device: str, seed: int) -> Any:
        """On a GPU the cache takes what memory is left; elsewhere what the sequences at hand can fill."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        shared: dict[str, Any] = {"return_logprobs": True, "seed": seed, "auto_switch_to_flash": False}
        if device == "cuda":
            return ContinuousBatchingConfig(**shared)
        at_once = min(len(request), budget.max_sequences)
        longest = max(map(len, request.prompts)) + request.max_tokens
        return ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=at_once * (-(-longest // PAGE) + 1),
            max_batch_tokens=max(longest, at_once),
            max_requests_per_batch=at_once,
            use_async_batching=False,
            use_cuda_graph=False,
            **shared,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the loop's own log is kept off the terminal; what goes wrong is in the answers."""
    log = logging.getLogger("ContinuousBatchingLogger")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
