"""The sampler that a configuration asks for."""

from __future__ import annotations

from stepscope.config import SamplerConfig
from stepscope.policy.sampling.base import Decoding, Sampler
from stepscope.policy.sampling.continuous import ContinuousSampler
from stepscope.policy.sampling.generate import TransformersSampler
from stepscope.policy.sampling.offline_vllm import VllmSampler
from stepscope.policy.sampling.server import ServerSampler


def make_sampler(config: SamplerConfig) -> Sampler:
    """Who draws the responses, and how; nothing is loaded or asked before the first of them."""
    decoding = Decoding(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, min_p=config.min_p
    )
    match config.engine:
        case "transformers":
            return TransformersSampler(decoding=decoding)
        case "continuous":
            return ContinuousSampler(decoding=decoding)
        case "vllm":
            return VllmSampler(decoding=decoding, adapter=config.adapter, options=config.options)
        case "openai":
            assert config.url is not None
            return ServerSampler(
                decoding=decoding,
                url=config.url,
                model=config.model,
                api=config.api,
                key_variable=config.key_variable,
                concurrency=config.concurrency,
                timeout=config.timeout,
                retries=config.retries,
            )
