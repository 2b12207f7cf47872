"""Shares of sequences in the gradient are those of the gradient of each sequence alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.measure.step.reconstruct import Step, weighted_logprobs
from stepscope.measure.step.sequence_shares import sequence_share_figures, sequence_shares
from stepscope.policy import vectors
from stepscope.policy.forward import plain_experts
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy


def alone(policy: Policy, step: Step) -> list[dict[str, torch.Tensor]]:
    """The gradient of every sequence, by a backward pass of its own."""
    found = []
    for i in range(len(step.update)):
        weights = [w * (i == j) for j, w in enumerate(step.token_weights)]
        found.append(gradient(policy, step.update, weighted_logprobs(weights)))
    return found


@pytest.mark.parametrize("most", [2, 64])
def test_shares_are_those_of_each_sequence_alone(most: int, tiny_policy: Policy) -> None:
    step = cases.step(tiny_policy)
    found = sequence_shares(tiny_policy, step, budget=Budget(max_sequences=most))
    assert found is not None
    own = alone(tiny_policy, step)
    total = vectors.add(*own)
    square = vectors.dot(total, total)
    expected = [vectors.dot(each, total) / square for each in own]
    np.testing.assert_allclose(found.share, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.norm, [vectors.norm(each) for each in own], rtol=1e-12)
    assert sum(found.share) == pytest.approx(1, abs=1e-12)
    assert found.largest == max(range(len(expected)), key=expected.__getitem__)
    assert found.effective == pytest.approx(1 / sum(s**2 for s in expected))
    figures = sequence_share_figures(found, 3)
    assert figures["gradient_share_largest"].value == max(found.share)
    assert figures["gradient_sequences_effective"].value == found.effective


def test_one_sequence_that_makes_the_gradient_is_named(tiny_policy: Policy) -> None:
    step = cases.step(tiny_policy)
    weights = tuple(w * (1000.0 if i == 4 else 1.0) for i, w in enumerate(step.token_weights))
    loud = replace(
        step,
        token_weights=weights,
        ascent=gradient(tiny_policy, step.update, weighted_logprobs(weights)),
    )
    found = sequence_shares(tiny_policy, loud)
    assert found is not None
    assert found.largest == 4
    assert found.share[4] == pytest.approx(1, abs=0.02)
    assert found.effective == pytest.approx(1, abs=0.05)


def test_terms_of_the_loss_have_the_rest() -> None:
    model = lift_model(cases.model("qwen3_moe", vocab_size=cases.VOCAB))
    settings = StepSettings(group_size=3, prompts_per_step=3, max_response_tokens=6, router_loss=1.0)
    with plain_experts(model):  # all experts at once know no float64
        state = cases.adamw_state(model)
    policy = Policy(model, None, settings, state, step=3)
    step = cases.step(policy)
    found = sequence_shares(policy, step)
    assert found is not None
    rest = vectors.add(step.ascent, vectors.scale(vectors.add(*alone(policy, step)), -1.0))
    share = vectors.dot(rest, step.ascent) / vectors.dot(step.ascent, step.ascent)
    assert abs(share) > 1e-4
    assert math.fsum(found.share) + share == pytest.approx(1, abs=1e-9)


def test_no_gradient_has_no_shares(tiny_policy: Policy) -> None:
    step = cases.step(tiny_policy)
    still = replace(step, ascent={n: torch.zeros_like(t) for n, t in step.ascent.items()})
    assert sequence_shares(tiny_policy, still) is None
