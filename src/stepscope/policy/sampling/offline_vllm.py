"""Sampling by vLLM in this process (``vllm.LLM``)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from stepscope.errors import CheckpointError, ConfigError
from stepscope.policy.forward import base_model, vocabulary_size
from stepscope.policy.numerics.precision import type_name
from stepscope.policy.passes import Budget
from stepscope.policy.sampling.base import (
    Convention,
    Request,
    Response,
    Sampler,
    Truncation,
    checked_response,
    plain,
)
from stepscope.policy.sampling.weights import is_adapter, write_merged
from stepscope.policy.state import Policy

_ADAPTER = "policy"


@dataclass(frozen=True, kw_only=True)
class VllmSampler(Sampler):
    """A prompt of token ids and a seed per response; vLLM's log-probs are those of what it draws from.

    vLLM reads the policy's weights from a temporary folder, as they are in memory and with adapters merged,
    or, with ``adapter``, the base and the checkpoint's adapter as they are on disk. The engine is made for
    the first request and kept for more until :meth:`close`.

    Attributes:
        adapter: load an adapter beside its base instead of merged weights.
        options: further arguments of ``vllm.LLM``; ``dtype`` is the policy's type unless they say otherwise.
    """

    adapter: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    conventions: ClassVar[tuple[Convention, ...]] = ("processed",)
    order: ClassVar[tuple[Truncation, ...]] = ("min_p", "top_k", "top_p")

    @property
    def name(self) -> str:
        """What it is called in messages and records."""
        return "vllm"

    def sample(self, policy: Policy, request: Request, budget: Budget) -> list[Response]:
        """The responses, in the order of the request.

        Raises:
            ConfigError: vLLM is not installed, or does not take the options.
            BatchError: it gave no usable response.
        """
        drawn = plain(self.decoding, self.name)
        vllm = _vllm()
        llm = self._engine(policy)
        shared = {
            "temperature": drawn.own_temperature(request.temperature),
            "top_p": drawn.top_p,
            "top_k": drawn.top_k,
            "min_p": drawn.min_p,
            "max_tokens": request.max_tokens,
            "stop_token_ids": list(request.ends),
            "logprobs": 0,
            "detokenize": False,
        }
        parameters = [vllm.SamplingParams(seed=int(row[0]), **shared) for row in request.randomness]
        prompts = [{"prompt_token_ids": list(ids)} for ids in request.prompts]
        lora = None
        if self._with_adapter(policy):
            lora = vllm.lora.request.LoRARequest(_ADAPTER, 1, str(policy.path))
        outputs = llm.generate(prompts, parameters, use_tqdm=budget.progress, lora_request=lora)
        size = vocabulary_size(policy.model)
        found = []
        for i, output in enumerate(outputs):
            ids = list(output.outputs[0].token_ids)
            rows = output.outputs[0].logprobs or []
            said = [row[t].logprob for row, t in zip(rows, ids, strict=False) if row is not None and t in row]
            found.append(checked_response(ids, said, request, where=f"vllm: response {i}", vocabulary=size))
        return found

    def close(self) -> None:
        """Give back the engine's memory."""
        if (made := self._made) and (llm := made.pop("llm", None)) is not None:
            shutdown = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
            del llm
            if shutdown is not None:
                shutdown.shutdown()

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}

    def _with_adapter(self, policy: Policy) -> bool:
        return self.adapter and is_adapter(policy)

    def _engine(self, policy: Policy) -> Any:
        """The engine with this policy's weights."""
        if "llm" in self._made:
            return self._made["llm"]
        dtype = type_name(next(policy.model.parameters()).dtype)
        options: dict[str, Any] = {
            "dtype": "float32" if dtype == "float64" else dtype,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "skip_tokenizer_init": True,
            "seed": 0,
        }
        with tempfile.TemporaryDirectory(prefix="stepscope-vllm-") as folder:
            if self._with_adapter(policy):
                options |= {"model": _base(policy), "enable_lora": True, "max_lora_rank": _rank(policy)}
            else:
                write_merged(policy, Path(folder))
                options["model"] = folder
            try:
                self._made["llm"] = _vllm().LLM(**options | dict(self.options))
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"vllm: does not start ({' '.join(str(error).split())}); see its own log above, and "
                    "sampler.options"
                ) from error
        return self._made["llm"]


def _vllm() -> Any:
    try:
        import vllm
        import vllm.lora.request
    except ImportError as error:
        raise ConfigError(
            f"vllm: cannot be imported ({error}); pip install stepscope[vllm], or start a server and use the "
            "engine openai"
        ) from error
    return vllm


def _base(policy: Policy) -> str:
    name = getattr(getattr(base_model(policy.model), "config", None), "_name_or_path", "")
    if not name or policy.path is None:
        raise CheckpointError("vllm: this adapter has no base or no folder on disk; leave adapter out")
    return str(name)


def _rank(policy: Policy) -> int:
    """The smallest rank that vLLM offers and that takes in the adapter's."""
    model: Any = policy.model
    rank = max(int(config.r) for config in model.peft_config.values())
    offered = (8, 16, 32, 64, 128, 256, 320, 512)
    return next((size for size in offered if size >= rank), rank)
