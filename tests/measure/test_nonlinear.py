"""Shares of Muon's step: what they add up to, and differences of its formula in the weights of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases
import real_steps
from stepscope.errors import MeasurementError
from stepscope.measure.change.logprob_change import predict_logprobs
from stepscope.measure.influence.attribution import InfluenceOptions, influence, influences
from stepscope.measure.influence.probe_gradient import probe_gradient
from stepscope.measure.influence.validation import RemovalOptions, compare, remake_steps
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.lifetime import lifetime
from stepscope.measure.step.reconstruct import Step, weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.optim.muon import MuonState, orthogonalised
from stepscope.policy.state import Policy
from stepscope.results import FloatArray

OPTIONS = InfluenceOptions(baseline="position")


def muon(limit: float) -> tuple[Policy, Step]:
    """A policy after three steps of Muon on its matrices, and its next step."""
    policy = cases.policy(max_grad_norm=limit)
    for p in policy.model.parameters():
        p.requires_grad_(p.ndim == 2)
    optimizer = torch.optim.Muon(list(policy.parameters.items()), lr=0.01)
    real_steps.train(policy, optimizer)
    policy = real_steps.matched(policy, optimizer)
    return policy, cases.step(policy, seed=9)


def formula(policy: Policy, step: Step, weights: tuple[FloatArray, ...]) -> dict[str, torch.Tensor]:
    """The step with other token weights in float64, clipping and all, but for the decay."""
    state, limit = policy.optimizer, policy.settings.max_grad_norm
    assert isinstance(state, MuonState)
    ascent = gradient(policy, step.update, weighted_logprobs(weights))
    clip = min(1.0, limit / (vectors.norm(ascent) + 1e-6)) if limit else 1.0
    group = state.groups[0]
    return {n: orthogonalised(group, state.buffer[n], 1.0, clip * ascent[n]) for n in group.names}


@pytest.mark.parametrize("limit", [0.0, 0.02])
def test_influence_is_the_derivative_in_a_tokens_and_a_sequences_weight(limit: float) -> None:
    policy, step = muon(limit)
    assert (step.clip_coefficient < 1) == (limit > 0)
    probe = cases.batch(policy, num_prompts=6, group_size=1, seed=5)
    bound = bind_quantity(policy, probe, "entropy", direction=step.direction, baseline="position")
    slope = probe_gradient(policy, probe, bound, errors=False).mean()
    (found,) = influences(policy, step, step.update, probe, options=OPTIONS)
    assert found.through == "optimizer"
    sequence = tuple(np.full_like(w, float(i == 2)) for i, w in enumerate(step.token_weights))
    token = tuple(np.zeros_like(w) for w in step.token_weights)
    token[4][-1] = 1.0
    h = 1e-5
    for mask, claimed in ((sequence, found.sequences[2]), (token, found.tokens[4][-1])):
        more, less = (
            formula(
                policy, step, tuple(w * (1 + s * m) for w, m in zip(step.token_weights, mask, strict=True))
            )
            for s in (h, -h)
        )
        true = (vectors.dot(more, slope) - vectors.dot(less, slope)) / (2 * h)
        assert claimed == pytest.approx(true, rel=1e-5, abs=1e-7 * float(np.abs(found.sequences).sum()))


def test_the_parts_of_the_step_add_up_and_the_shares_are_flagged() -> None:
    policy, step = muon(0.02)
    probe = cases.batch(policy, num_prompts=6, group_size=1, seed=5)
    (found,) = influences(policy, step, step.update, probe, options=OPTIONS)
    assert set(found.components) == {"momentum", "decay", "sequences"}
    parts = sum(part.value for part in found.components.values())
    assert parts == pytest.approx(found.total.value, rel=1e-10)
    assert not found.sum_of_sequences.reliable
    assert "not linear in it: this is the derivative at the batch" in found.sum_of_sequences.reason
    assert set(found.sequence_rows().component) == {"sequence"}
    assert lifetime(policy, step) is None


def test_what_needs_a_preconditioner_says_that_there_is_none() -> None:
    policy, step = muon(0.0)
    probe = cases.batch(policy, num_prompts=6, group_size=1, seed=5)
    with pytest.raises(MeasurementError, match=r"Muon orthogonalises .*use through=optimizer"):
        influence(policy, step, step.update, probe, options=OPTIONS)
    with pytest.raises(MeasurementError, match="it has no preconditioner; take influence through=optimizer"):
        predict_logprobs(policy, step, probe)


def test_leaving_a_sequence_out_goes_the_way_its_share_says() -> None:
    policy, step = muon(0.0)
    probe = cases.batch(policy, num_prompts=6, group_size=1, seed=5)
    (found,) = influences(policy, step, step.update, probe, options=OPTIONS)
    options = RemovalOptions(lr=1e-4, num_subsets=0, num_single=9)
    remade = remake_steps(policy, step, probe, found, options=options)
    assert len(remade.single_true) == 9
    assert remade.reweighted_true.size == 0  # a thousandth of a weight is lost in bfloat16
    assert compare(remade, found).single.pearson.value > 0.8
