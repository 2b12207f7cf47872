"""Choices of experts that a step flips, against the routers of each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
from stepscope.measure.step.reconstruct import Step
from stepscope.measure.step.routing import routing_change, routing_figures
from stepscope.policy.forward import plain_experts
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model, matching_precision
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted

LR = 0.03


def mixture(name: str, adapted: bool = False) -> tuple[Policy, Step]:
    model: Any = cases.model(name, vocab_size=cases.VOCAB)
    model = lift_model(cases.adapted(model) if adapted else model)
    settings = StepSettings(group_size=3, prompts_per_step=3, max_response_tokens=6)
    with plain_experts(model):  # all experts at once know no float64
        state = cases.adamw_state(model)
    policy = Policy(model, None, settings, state, step=3)
    return policy, cases.step(policy)


def chosen_alone(policy: Policy, step: Step) -> torch.Tensor:
    """(token, layer, 2) the experts of the two largest logits, sequence by sequence and without padding."""
    found = []
    for prompt, response in zip(step.update.prompt_token_ids, step.update.response_token_ids, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad(), matching_precision(policy.model), plain_experts(policy.model):
            logits = policy.model(input_ids=ids, output_router_logits=True).router_logits
        assert all(layer.shape == (ids.shape[1], 4) for layer in logits)
        found.append(torch.stack([layer.topk(2, -1).indices for layer in logits], 1))
    return torch.cat(found)


@pytest.mark.parametrize("name", cases.MIXTURES)
@pytest.mark.parametrize("adapted", [False, True])
def test_flips_are_those_of_the_routers(name: str, adapted: bool) -> None:
    policy, step = mixture(name, adapted)
    kept = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    found = routing_change(policy, step, lr=LR, budget=Budget(max_sequences=4))
    assert found is not None
    assert all(torch.equal(p, kept[n]) for n, p in policy.model.named_parameters())
    before = chosen_alone(policy, step)
    with shifted(policy.parameters, step.direction, LR):
        after = chosen_alone(policy, step)
    lost = [
        [len(set(old) - set(new)) for old, new in zip(a.tolist(), b.tolist(), strict=True)]
        for a, b in zip(before, after, strict=True)
    ]
    flips = torch.tensor(lost).double()
    assert found.num_tokens == len(before)
    assert found.experts_per_token == 2
    assert found.share_by_layer == pytest.approx((flips.mean(0) / 2).tolist(), abs=1e-15)
    assert found.share_choices == pytest.approx(float(flips.mean()) / 2, abs=1e-15)
    assert found.share_tokens == pytest.approx(float((flips.sum(1) > 0).double().mean()), abs=1e-15)
    assert 0 < found.share_choices < found.share_tokens < 1


def test_nothing_flips_at_the_policy_itself() -> None:
    policy, step = mixture("mixtral")
    still = routing_change(policy, step, lr=0.0)
    assert still is not None
    assert still.share_choices == still.share_tokens == 0.0
    moved = {n: p.detach() + LR * step.direction[n] for n, p in policy.parameters.items()}
    assert routing_change(policy, step, lr=LR, taken=moved) == routing_change(policy, step, lr=LR)
    figures = routing_figures(still, 3)
    assert figures["routing_share_choices"].value == 0.0
    assert figures["routing_share_tokens"].unit == "share of tokens"


def test_a_dense_model_has_no_choices() -> None:
    policy = cases.policy()
    assert routing_change(policy, cases.step(policy), lr=LR) is None
