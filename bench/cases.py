"""The models and batches of ``bench/peers.py``: random weights, random tokens of equal length, no padding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from stepscope.policy.gradients.derivatives import directional_derivative, response_logprob
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

SHAPES = {
    "small": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "large": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
}
RANKS = {"small": 16, "large": 32}
VOCAB, PROMPT, RESPONSE = 512, 32, 64


@dataclass(frozen=True)
class Case:
    """One model and one batch.

    Attributes:
        policy: the model with its trainable parameters.
        rollouts: the batch as stepscope takes it.
        ids: (seq, pos) the same as token ids.
        P: diagonal preconditioner by parameter name.
        u: a direction by parameter name.
    """

    policy: Policy
    rollouts: Rollouts
    ids: Tensor
    P: dict[str, Tensor]
    u: dict[str, Tensor]
    prompt_length: int = PROMPT

    @property
    def model(self) -> nn.Module:
        return self.policy.model

    @property
    def count(self) -> int:
        return len(self.ids)

    @property
    def kept(self) -> int:
        """Logits that the response needs, as ``logits_to_keep``."""
        return self.ids.shape[1] - self.prompt_length + 1

    def sums_of(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(seq,) S_i from logits of the kept positions."""
        distribution = torch.log_softmax(logits[:, :-1], dim=-1)
        return distribution.gather(-1, ids[:, self.prompt_length :, None]).squeeze(-1).sum(-1)

    def logprob_sums(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(seq,) S_i = sum of the response tokens' log-probs, by a plain forward pass."""
        out: Any = model(input_ids=ids, use_cache=False, logits_to_keep=self.kept)
        return self.sums_of(out.logits, ids)

    def floor(self, size: int, *, count: int | None = None) -> None:
        """One plain forward and backward over the batch (or its first ones), ``size`` sequences at a time."""
        params = list(self.policy.parameters.values())
        for start in range(0, count or self.count, size):
            value = self.logprob_sums(self.model, self.ids[start : start + size]).sum()
            torch.autograd.grad(value, params)

    def fresh(self) -> Case:
        """The same with its own copy of the model: libraries change the model they are given."""
        model = copy.deepcopy(self.policy.model)
        return Case(Policy(model, None, self.policy.settings), self.rollouts, self.ids, self.P, self.u)


def build(shape: str, *, full: bool, count: int, device: str = "cpu") -> Case:
    """The case of that name; the same numbers every time."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        num_key_value_heads=SHAPES[shape]["num_attention_heads"] // 2,
        tie_word_embeddings=full,
        **SHAPES[shape],
    )
    model = AutoModelForCausalLM.from_config(config)
    if not full:
        model = get_peft_model(model, LoraConfig(r=RANKS[shape], target_modules="all-linear"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)
    policy = Policy(model.eval().to(device), None, StepSettings())
    ids = torch.randint(0, VOCAB, (count, PROMPT + RESPONSE))
    zeros, blank = np.zeros(count), ("",) * count
    rollouts = Rollouts(
        prompt_ids=tuple(map(str, range(count))),
        prompts=blank,
        responses=blank,
        prompt_token_ids=tuple(tuple(r[:PROMPT]) for r in ids.tolist()),
        response_token_ids=tuple(tuple(r[PROMPT:]) for r in ids.tolist()),
        rewards=zeros,
        correct=zeros > 0,
        truncated=zeros > 0,
        logprobs=(np.zeros(RESPONSE),) * count,
        entropies=(np.zeros(RESPONSE),) * count,
        temperature=1.0,
        max_response_tokens=RESPONSE,
    )
    P = {n: 0.5 + torch.rand_like(p).detach() for n, p in policy.parameters.items()}
    u = {n: torch.randn_like(p).detach() for n, p in policy.parameters.items()}
    return Case(policy, rollouts, ids.to(device), P, u)


def reference(case: Case) -> dict[str, Tensor]:
    """Every task's result by one autograd call per sequence in float64."""
    lifted = Policy(lift_model(copy.deepcopy(case.model)), None, case.policy.settings)
    exact = Case(lifted, case.rollouts, case.ids, case.P, case.u)
    params = lifted.parameters
    size = sum(p.numel() for p in params.values())
    G = torch.empty(case.count, size, dtype=torch.float64, device=case.ids.device)
    for i in range(case.count):
        value = exact.logprob_sums(lifted.model, case.ids[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(params.values()))
        G[i] = torch.cat([g.reshape(-1) for g in grads])
    p = torch.cat([case.P[n].reshape(-1) for n in params]).double()
    u = {n: t.double() for n, t in case.u.items()}
    found = {
        "kernel": G @ G.T,
        "influence": G @ torch.cat([u[n].reshape(-1) for n in params]),
        "tokens": torch.cat(directional_derivative(lifted, case.rollouts, response_logprob, u)),
    }
    found["kernel_P"] = (G * p) @ G.T
    return found
