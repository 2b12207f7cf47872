"""Who draws the responses: the section ``sampler`` of ``stepscope measure`` and ``eval``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stepscope.addresses import NO_ADDRESS, is_address
from stepscope.config.base import Section


class SamplerConfig(Section):
    """Who draws the responses, and by which temperature and truncation; see docs/SAMPLERS.md.

    Attributes:
        engine: ``transformers`` (seed-exact), ``continuous`` (transformers' continuous batching), ``vllm``
            (in this process; ``pip install stepscope[vllm]``) or ``openai`` (a server with token ids and
            log-probs: vLLM, SGLang).
        temperature: of the sampling; null for the policy's own.
        top_p: only from the smallest set of tokens that holds so much probability.
        top_k: only from so many of the likeliest tokens; 0 for all.
        min_p: only from tokens with at least so much of the largest probability.
        url: of the server.
        model: name under which the server has the policy; null for the only one that it serves.
        api: ``completions`` or SGLang's own ``/generate``.
        key_variable: environment variable with the server's key, or null.
        concurrency: requests to the server at a time.
        timeout: seconds that an answer of the server may take.
        retries: times a request is sent again after an error that may pass.
        adapter: vLLM loads an adapter beside its base instead of merged weights.
        options: further arguments of ``vllm.LLM``, for example ``gpu_memory_utilization``.
    """

    engine: Literal["transformers", "continuous", "vllm", "openai"] = "transformers"
    temperature: float | None = Field(default=None, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    url: str | None = None
    model: str | None = None
    api: Literal["completions", "sglang"] = "completions"
    key_variable: str | None = None
    concurrency: int = Field(default=32, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    retries: int = Field(default=4, ge=0)
    adapter: bool = False
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_the_engine(self) -> SamplerConfig:
        if (self.engine == "openai") != (self.url is not None):
            raise ValueError("url is the address of a server: give it with engine=openai, and only there")
        if self.url is not None and not is_address(self.url):
            raise ValueError(f"url: {NO_ADDRESS}")
        if self.engine != "vllm" and (self.adapter or self.options):
            raise ValueError("adapter and options are vLLM's: give them with engine=vllm, and only there")
        return self
