"""Sequences that an objective does not depend on: exactly 0, and no pass; the others as if all had passed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.measure.influence.attribution import token_products
from stepscope.measure.step.reconstruct import reconstruct_step, weighted_logprobs
from stepscope.measure.step.sequence_shares import sequence_shares
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
from stepscope.policy.gradients.gram import grams
from stepscope.policy.gradients.products import (
    paired_dots,
    per_sequence_dot,
    per_sequence_dots,
    weighted_gradients,
)
from stepscope.policy.gradients.projection import Sketch, sketches
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.profiler import Profiler, profiled_stage, profiling
from stepscope.policy.state import Policy

BUDGET = Budget(max_sequences=3)


@pytest.fixture(params=["some", "one", "none"])
def case(request: pytest.FixtureRequest):
    """A policy, a batch, and weights that are 0 on some sequences; on single tokens, too."""
    policy = cases.policy()
    batch = cases.batch(policy)
    rng = np.random.default_rng(0)
    kept = {"some": {1, 4, 5}, "one": {2}, "none": set()}[request.param]
    weights = tuple(rng.normal(size=n) * (i in kept) for i, n in enumerate(batch.num_tokens))
    for i in kept:
        weights[i][1:2] = 0.0
    return policy, batch, weights, sorted(kept)


def everywhere(weights):
    """The same objective in a form that does not say where it is 0."""

    def value(outputs: TokenOutputs, batch: TokenBatch) -> torch.Tensor:
        return batch.pad(weights, outputs.logprobs) * outputs.logprobs

    return value


def vector(policy: Policy, *shape: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(*shape, *p.shape, generator=generator, dtype=p.dtype)
        for n, p in policy.parameters.items()
    }


def passed(work) -> tuple[object, int]:
    """What a function returns, and the sequences that passed the model."""
    profiler = Profiler()
    with profiling(profiler), profiled_stage("here"):
        found = work()
    return found, sum(row.sequences for row in profiler.profile().rows)


def of_gradients(policy, gradients, u, many, other):
    """All that is made of per-sequence gradients, as arrays by name."""
    P = {n: t.abs() for n, t in u.items()}
    metrics = {"raw": None, "P": P}
    found = {"dot": per_sequence_dot(policy, gradients, u, budget=BUDGET)}
    found["dots"] = per_sequence_dots(policy, gradients, many, budget=BUDGET)
    rows = np.random.default_rng(2).normal(size=(2, len(gradients)))
    sums = weighted_gradients(policy, gradients, rows, budget=BUDGET)
    found |= {f"sums {n}": t.numpy() for n, t in sums.items()}
    for name, budget in (("at once", Budget()), ("streamed", BUDGET)):
        for beside in (None, other):
            made = grams(policy, gradients, metrics=metrics, other=beside, budget=budget)
            for kind in ("square", "cross", "other_norms"):
                for metric, K in getattr(made, kind).items():
                    found[f"{name} {kind} {metric} {beside is None}"] = K.numpy()
    for metric, rows in sketches(policy, gradients, Sketch(16), metrics=metrics, budget=BUDGET).items():
        found[f"sketch {metric}"] = rows.numpy()
    plain = SequenceGradients(gradients.rollouts, response_logprob)
    pairs = paired_dots(policy, gradients, plain, metrics, budget=BUDGET)
    return found | {f"paired {metric}": dots for metric, dots in pairs.items()}


def test_whatever_is_made_of_gradients_is_the_same_with_and_without_them(case) -> None:
    policy, batch, weights, kept = case
    u, many = vector(policy), vector(policy, 2)
    other = SequenceGradients(cases.batch(policy, seed=5), response_logprob)
    fewer = of_gradients(policy, SequenceGradients(batch, weighted_logprobs(weights)), u, many, other)
    whole = of_gradients(policy, SequenceGradients(batch, everywhere(weights)), u, many, other)
    assert fewer.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(fewer[name], values, rtol=1e-11, atol=1e-13, err_msg=name)
    left = np.setdiff1d(np.arange(len(batch)), kept)
    assert not fewer["dot"][left].any()
    assert not fewer["at once square raw True"][left].any()
    assert not fewer["at once square raw True"][:, left].any()


def test_only_sequences_with_a_weight_pass_the_model(case) -> None:
    policy, batch, weights, kept = case
    sparse, plain = weighted_logprobs(weights), everywhere(weights)
    found, count = passed(lambda: gradient(policy, batch, sparse, budget=BUDGET))
    assert count == len(kept)
    for name, grad in gradient(policy, batch, plain).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-11, atol=1e-13)
    u = vector(policy)
    _, count = passed(lambda: per_sequence_dot(policy, SequenceGradients(batch, sparse), u, budget=BUDGET))
    assert count == len(kept)


def test_token_products_are_those_of_all_sequences_in_as_many_passes_as_weights_ask_for(case) -> None:
    policy, batch, weights, kept = case
    step = _step(policy, batch, weights)
    pulled, mixing = vector(policy, 2), np.array([[1.0, 0.5], [0.0, -2.0]])
    found, count = passed(lambda: token_products(policy, step, pulled, mixing, budget=BUDGET))
    assert count == len(kept)  # for all rows of the mixing together
    for own, row in zip(found, mixing, strict=True):
        u = {n: torch.tensordot(torch.as_tensor(row), t, 1) for n, t in pulled.items()}
        slopes = directional_derivative(policy, batch, response_logprob, u)
        expected = np.concatenate([w * d.numpy() for w, d in zip(weights, slopes, strict=True)])
        np.testing.assert_allclose(own, expected, rtol=1e-11, atol=1e-13)
        assert not own[np.concatenate(weights) == 0].any()


def test_shares_of_the_gradient_are_0_without_a_weight(case) -> None:
    policy, batch, weights, kept = case
    step = _step(policy, batch, weights)
    if not kept:
        assert sequence_shares(policy, step) is None
        return
    found, count = passed(lambda: sequence_shares(policy, step, budget=BUDGET))
    assert count == len(kept)
    assert np.flatnonzero(found.share).tolist() == kept
    assert sum(found.share) == pytest.approx(1.0, abs=1e-12)


def _step(policy, batch, weights):
    step = reconstruct_step(policy, batch)
    return replace(step, token_weights=weights, ascent=gradient(policy, batch, everywhere(weights)))
