"""Policies so small that all their responses can be listed, and a step along a random direction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cases
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.state import Policy

VOCABULARY = 5
EOS = 1
PROMPTS = ((2, 3), (4, 2, 3))
ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma3", "gpt2")


@dataclass(frozen=True)
class RandomStep:
    """All that the estimators ask of a step."""

    direction: dict[str, Tensor]
    lr: float


def enumerable_policy(
    architecture: str = "qwen2",
    *,
    lora: bool | dict[str, Any] = False,
    length: int = 3,
    seed: int = 0,
    temperature: float = 0.9,
) -> Policy:
    """A float64 policy whose responses have at most ``length`` tokens; ``lora`` may hold further options."""
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "intermediate_size": 24, "pad_token_id": None}
    if architecture == "qwen2":
        shape["tie_word_embeddings"] = False  # the head is a parameter of its own
    model = cases.model(architecture, seed=seed, **shape)
    if lora:
        targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "v_proj", "down_proj"]
        options = {"target_modules": targets, "lora_alpha": 4} | (lora if isinstance(lora, dict) else {})
        model = cases.adapted(model, **options)
    settings = StepSettings(max_response_tokens=length, temperature=temperature)
    return Policy(lift_model(model), None, settings)


def shifted_model(policy: Policy) -> nn.Module:
    """A copy of the policy's model with all parameters moved a little: a reference for the KL divergence."""
    reference = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return reference


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
