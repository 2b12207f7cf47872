"""Derivatives along several directions at a time: each as if it were alone, from one forward pass."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cases
from stepscope.policy import head
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients import derivatives
from stepscope.policy.gradients.derivatives import (
    directional_derivative,
    directional_derivatives,
    response_logprob,
)
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics import attention
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.passes import Budget
from stepscope.policy.profiler import Profiler, profiled_stage, profiling
from stepscope.policy.state import Policy

SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
}
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "dora of an embedding": LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "parameters": LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]),
}
BUDGET = Budget(max_sequences=4)


def policy_of(model: Any) -> Policy:
    return Policy(lift_model(model.eval()), cases.tokenizer(), StepSettings())


def directions(policy: Policy, count: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.parameters.items()}
        for _ in range(count)
    ]


def entropy_per_response(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    return outputs.entropies.sum(1)


def held_to_single(policy: Policy, caplog: pytest.LogCaptureFixture, *, together: bool = True) -> None:
    batch = cases.batch(policy)
    chosen = directions(policy)
    caplog.set_level(logging.DEBUG, derivatives.__name__)
    for objective, as_trained in itertools.product((response_logprob, entropy_per_response), (True, False)):
        caplog.clear()
        found = list(
            directional_derivatives(policy, batch, objective, chosen, as_trained=as_trained, budget=BUDGET)
        )
        said = [r for r in caplog.records if "one at a time" in r.getMessage()]
        assert len(said) == (0 if together else 1)
        for direction, own in zip(chosen, found, strict=True):
            alone = directional_derivative(
                policy, batch, objective, direction, as_trained=as_trained, budget=BUDGET
            )
            scale = max(float(row.abs().max()) for row in alone)
            assert scale > 0
            for row, expected in zip(own, alone, strict=True):
                torch.testing.assert_close(row, expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", [*cases.ARCHITECTURES, *cases.MIXTURES, *SCALED])
def test_of_every_architecture(name: str, caplog: pytest.LogCaptureFixture) -> None:
    held_to_single(policy_of(cases.model(name, **SCALED.get(name, {}))), caplog)


@pytest.mark.parametrize("name", ADAPTERS)
def test_of_adapters(name: str, caplog: pytest.LogCaptureFixture) -> None:
    held_to_single(policy_of(get_peft_model(cases.model("llama"), ADAPTERS[name])), caplog)


def test_of_padding_that_was_sampled(caplog: pytest.LogCaptureFixture) -> None:
    """An embedding's row that training leaves alone: forward mode leaves it alone in every direction."""
    held_to_single(
        policy_of(cases.model("llama", pad_token_id=cases.batch(cases.policy()).response_token_ids[0][0])),
        caplog,
    )


def test_in_pieces_of_the_vocabulary_and_of_queries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(head, "PIECE_BYTES", 1)
    monkeypatch.setattr(head, "FEWEST", 0)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 1)
    monkeypatch.setattr(attention, "FEWEST", 2)
    held_to_single(policy_of(cases.model("qwen2")), caplog)


class Plain(torch.autograd.Function):
    """x, with a rule for forward mode that torch cannot batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def jvp(ctx: Any, slope: Tensor) -> Tensor:
        return slope.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Wrapped(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Plain.apply(self.own(x))  # type: ignore[no-untyped-call]
        return found


def test_one_at_a_time_where_an_operation_cannot_be_batched(caplog: pytest.LogCaptureFixture) -> None:
    model = cases.model("qwen2")
    model.model.layers[0].mlp = Wrapped(model.model.layers[0].mlp)
    held_to_single(policy_of(model), caplog, together=False)


def test_one_forward_pass_serves_all() -> None:
    model = cases.adapted(cases.model(hidden_size=64, intermediate_size=128), target_modules="all-linear")
    policy = Policy(model, cases.tokenizer(), StepSettings())
    batch = cases.batch(policy)
    products = []
    for count in (1, 8):
        with FlopCounterMode(display=False) as counter:
            list(directional_derivatives(policy, batch, response_logprob, directions(policy, count)))
        counts = counter.get_flop_counts()["Global"]
        products.append(
            sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
        )
    assert products[1] <= 5 * products[0]  # (1 + 8) / 2 and attention


@pytest.mark.parametrize(("held", "passes"), [(1, 3), (2, 2), (100, 1)])
def test_the_budget_says_how_many(held: int, passes: int) -> None:
    policy = cases.policy()
    batch, chosen = cases.batch(policy), directions(policy, 3)
    each = sum(p.nbytes for p in policy.parameters.values())
    budget = Budget(max_sequences=100, memory_bytes=2 * held * each)
    profiler = Profiler()
    with profiling(profiler), profiled_stage("here"):
        list(directional_derivatives(policy, batch, response_logprob, chosen, budget=budget))
    assert sum(row.passes for row in profiler.profile().rows) == passes
