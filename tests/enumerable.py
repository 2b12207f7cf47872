"""Policies so small that all their responses can be listed, and a step along a random direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.state import Policy

VOCABULARY = 5
EOS = 1
PROMPTS = ((2, 3), (4, 2, 3))
ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma3", "gpt2")

MIXTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8},
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "router_aux_loss_coef": 0.5}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 4}),
}


@dataclass(frozen=True)
class RandomStep:
    """All that the estimators ask of a step."""

    direction: dict[str, Tensor]
    lr: float


def enumerable_model(architecture: str, *, seed: int = 0, spread: float = 0.3) -> nn.Module:
    """A float64 model of two layers over five tokens, with weights large enough to be far from uniform."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": spread,
        "pad_token_id": None,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    model: nn.Module
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif architecture == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8, sliding_window=16))
    elif architecture in MIXTURES:
        config, kind, more = MIXTURES[architecture]
        model = kind(config(**shape, num_experts_per_tok=2, **more))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=32,
                initializer_range=spread,
                bos_token_id=None,
                eos_token_id=EOS,
            )
        )
    return lift_model(model.eval())


def enumerable_policy(
    architecture: str = "qwen2",
    *,
    lora: bool | dict[str, Any] = False,
    length: int = 3,
    seed: int = 0,
    temperature: float = 0.9,
) -> Policy:
    """A float64 policy whose responses have at most ``length`` tokens; ``lora`` may hold further options."""
    model = enumerable_model(architecture, seed=seed)
    if lora:
        targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "v_proj", "down_proj"]
        options = {"target_modules": targets} | (lora if isinstance(lora, dict) else {})
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options)
        model = lift_model(get_peft_model(model, config).eval())  # type: ignore[arg-type]
    settings = StepSettings(max_response_tokens=length, temperature=temperature)
    return Policy(model, None, settings)


def random_step(policy: Policy, *, seed: int = 1, lr: float = 1e-3) -> RandomStep:
    """A direction of independent normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for n, p in policy.parameters.items()
    }
    return RandomStep(direction, lr)


def digit_reward(response: Sequence[int]) -> float:
    """A reward that varies over responses of every length."""
    return float(sum(response) % 3 == 0)
