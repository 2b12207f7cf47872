"""Mixtures of experts: gradients of every kind agree, sampling works, the config comes back; router loss."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import cases
from stepscope.measure.step.router import router_gradient, router_loss
from stepscope.policy.check.derivatives import random_direction
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
from stepscope.policy.gradients.layer_gradient import LayerGradient
from stepscope.policy.gradients.stream import SequenceGradients, stream
from stepscope.policy.loss.router import router_coefficient
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import sample_rollouts
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted


@pytest.fixture(params=cases.MIXTURES)
def policy(request: pytest.FixtureRequest, tokenizer: Any) -> Policy:
    model: Any = lift_model(cases.model(request.param))
    model.config.output_router_logits = True
    return Policy(model, tokenizer, StepSettings(max_response_tokens=5))


def test_gradients_of_every_kind_agree_and_the_config_comes_back(policy: Policy, letters: Any) -> None:
    config: Any = policy.model.config
    before = (config._experts_implementation, config.output_router_logits)
    rollouts = sample_rollouts(policy, letters, num_prompts=3, group_size=2, seed=0)
    whole = gradient(policy, rollouts, response_logprob)
    summed = {n: torch.zeros_like(t) for n, t in whole.items()}

    def add(found: LayerGradient, rows: slice) -> None:
        part = found.dense().sum(0)
        summed[found.name] += (part.T if found.transposed else part).reshape(whole[found.name].shape)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream(policy, SequenceGradients(rollouts, response_logprob), add, budget=Budget(max_sequences=4))
    for name, expected in whole.items():
        torch.testing.assert_close(summed[name], expected, rtol=0, atol=1e-11)
    direction = random_direction(policy)
    along = directional_derivative(policy, rollouts, response_logprob, direction, mode="forward")
    expected_slope = sum(float((whole[n] * direction[n]).sum()) for n in whole)
    assert sum(float(t.sum()) for t in along) == pytest.approx(expected_slope, rel=1e-10)
    assert (config._experts_implementation, config.output_router_logits) == before


def test_the_loop_over_experts_says_what_the_training_sees(policy: Policy) -> None:
    batch = make_batch([[3, 4], [5, 6, 7]], [[8, 9, 2], [4]])
    with torch.no_grad():
        ours = forward(policy.model.float(), batch, temperature=1.0, keep_logits=True).logits
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        theirs = policy.model(**inputs, position_ids=batch.position_ids).logits
    assert policy.model.config._experts_implementation == "grouped_mm"
    assert ours is not None
    mask = batch.response_mask
    torch.testing.assert_close(ours[mask], theirs[:, -4:-1].float()[mask], rtol=1e-4, atol=1e-4)


def test_the_router_loss_is_the_models_own_and_its_gradient_is_right(policy: Policy, letters: Any) -> None:
    """Against transformers' loss on rows without padding, and against central differences."""
    own = policy.model.config.router_aux_loss_coef
    assert router_coefficient(policy.model, policy.settings) == own > 0
    assert router_coefficient(policy.model, replace(policy.settings, router_loss=0.25)) == 0.25
    rollouts = sample_rollouts(policy, letters, num_prompts=2, group_size=3, seed=1)
    lone = rollouts.prompt_token_ids[0] + rollouts.response_token_ids[0]
    single: Any = copy.deepcopy(policy.model).float()
    theirs = single(torch.tensor([lone]), output_router_logits=True).aux_loss
    torch.testing.assert_close(router_loss(policy, rollouts, range(1)).float(), theirs, rtol=1e-5, atol=0)
    cut = replace(policy, settings=replace(policy.settings, micro_batch_size=2))
    direction = random_direction(policy)
    found = sum(float((g * direction[n]).sum()) for n, g in router_gradient(cut, rollouts).items())
    sides = []
    for h in (1e-6, -1e-6):
        with torch.no_grad(), shifted(policy.parameters, direction, h):
            parts = [float(router_loss(policy, rollouts, range(i, i + 2))) for i in (0, 2, 4)]
        sides.append(sum(parts) / 3)
    assert found == pytest.approx(-own * (sides[0] - sides[1]) / 2e-6, rel=1e-5)
    silent = replace(policy, settings=replace(policy.settings, router_loss=0.0))
    assert router_gradient(silent, rollouts) == {}


def test_a_dense_model_has_no_router_loss(tokenizer: Any) -> None:
    assert router_coefficient(cases.model(), StepSettings()) == 0.0


def test_masked_responses_have_no_part_in_the_router_loss(policy: Policy, letters: Any) -> None:
    rollouts = sample_rollouts(policy, letters, num_prompts=2, group_size=2, seed=2)
    gone = replace(rollouts, truncated=~rollouts.truncated & False)
    masked = replace(policy, settings=replace(policy.settings, mask_truncated=True))
    every = range(len(rollouts))
    torch.testing.assert_close(router_loss(masked, gone, every), router_loss(policy, gone, every))
    gone.truncated[1] = True
    assert not torch.equal(router_loss(masked, gone, every), router_loss(policy, gone, every))
