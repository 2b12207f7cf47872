"""Noise scale against gradients with known signal and noise, and against explicit gradients of a policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import BatchError
from stepscope.measure.noise.scale import effect_noise_scale, from_products, noise_scale
from stepscope.measure.step.reconstruct import reconstruct_step, sequence_direction
from stepscope.pipeline.stages.curvature import no_best_step
from stepscope.policy import vectors
from stepscope.results import FloatArray
from stepscope.results.noise import NoiseScales
from stepscope.stats import NOT_FINITE


def contributions(
    rng: np.random.Generator, prompts: int, group: int, *, between: float, within: float, dim: int = 300
) -> tuple[FloatArray, np.ndarray]:
    """c_i of a batch, which add up to its gradient: a mean of norm 1, prompt effects, response effects."""
    mean = np.ones(dim) / np.sqrt(dim)
    prompt = np.sqrt(between / dim) * rng.standard_normal((prompts, dim))
    response = np.sqrt(within / dim) * rng.standard_normal((prompts, group, dim))
    g = mean + prompt[:, None, :] + response
    return g.reshape(-1, dim) / (prompts * group), np.repeat(np.arange(prompts), group)


def test_recovers_known_signal_and_noise() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        c, index = contributions(rng, 24, 4, between=3.0, within=8.0)
        found.append(from_products(c @ c.T, index, unit="", method=""))
    for name, truth in (
        ("signal", 1.0),
        ("noise", 5.0),
        ("within_prompts", 2.0),
        ("between_prompts", 3.0),
        ("prompts", 5.0),
        ("sequences", 20.0),
    ):
        estimates = [getattr(f, name) for f in found]
        values = np.array([e.value for e in estimates])
        spread = values.std(ddof=1)
        assert abs(values.mean() - truth) < 4 * spread / np.sqrt(60) + 0.02 * truth, name
        claimed = np.sqrt(np.mean([e.stderr**2 for e in estimates]))
        assert 0.6 < claimed / spread < 1.6, name
    assert np.mean([f.share_of_noise for f in found]) == pytest.approx(5 / 24 / (1 + 5 / 24), rel=0.1)


def test_the_textbook_formulas() -> None:
    rng = np.random.default_rng(1)
    c, index = contributions(rng, 7, 3, between=1.0, within=4.0, dim=20)
    g = 7 * np.stack([c[index == b].sum(0) for b in range(7)])
    big, small = float((g.mean(0) ** 2).sum()), float((g**2).sum(1).mean())
    found = from_products(c @ c.T, index, unit="", method="")
    assert found.signal.value == pytest.approx((7 * big - small) / 6)
    assert found.noise.value == pytest.approx((small - big) * 7 / 6)
    assert found.prompts.value == pytest.approx((small - big) * 7 / (7 * big - small))
    s = 21 * c
    spread = [((s[index == b] - g[b]) ** 2).sum() / 2 / 3 for b in range(7)]
    assert found.within_prompts.value == pytest.approx(np.mean(spread))


def test_pure_noise_is_flagged() -> None:
    rng = np.random.default_rng(2)
    c, index = contributions(rng, 6, 4, between=50.0, within=50.0, dim=1000)
    c = c - 0.9 * c.mean(0)
    found = from_products(c @ c.T, index, unit="", method="")
    assert not found.prompts.reliable
    assert "signal" in found.prompts.reason
    assert found.at_least > 5


@pytest.mark.parametrize("seed", range(6))
def test_a_sum_that_cancels_has_no_limits_whatever_its_round_off(seed: int) -> None:
    rng = np.random.default_rng(seed)
    c, index = contributions(rng, 6, 4, between=50.0, within=50.0, dim=1000)
    c = c - c.mean(0)
    found = from_products(c @ c.T, index, unit="", method="")
    assert not found.prompts.reliable
    assert found.at_least == 0


def test_effect_is_one_dimensional() -> None:
    rng = np.random.default_rng(3)
    index = np.repeat(np.arange(9), 4)
    effect = (1 + 2 * rng.standard_normal(36)) / 36
    x = 9 * np.bincount(index, weights=effect)
    found = effect_noise_scale(effect, index, unit="nats/token/lr")
    assert found.noise.value == pytest.approx(x.var(ddof=1))
    assert found.signal.value == pytest.approx(x.mean() ** 2 - x.var(ddof=1) / 9)


def test_policy_gradients(tiny_policy) -> None:
    step = cases.step(tiny_policy, num_prompts=4, group_size=3)
    found = noise_scale(tiny_policy, step.update, preconditioner=step.preconditioner)
    P = step.preconditioner
    parts = [sequence_direction(tiny_policy, step, i) for i in range(12)]
    groups = [vectors.add(*parts[3 * b : 3 * b + 3]) for b in range(4)]
    g = torch.stack([torch.cat([t.reshape(-1) for t in v.values()]) for v in groups]).numpy() * 4
    p = torch.cat([P[n].reshape(-1) for n in groups[0]]).numpy()
    for scale, weights in ((found.sgd, p**-2), (found.preconditioned, p**-1)):
        A = (g * weights) @ g.T
        signal = (A.sum() - np.trace(A)) / 12
        assert scale.signal.value == pytest.approx(signal, rel=1e-8)
        assert scale.noise.value == pytest.approx(np.trace(A) / 4 - signal, rel=1e-8)
    assert found.noise_scale == found.sgd.prompts
    again = noise_scale(tiny_policy, step.update, token_weights=step.token_weights)
    assert again.sgd.noise.value == pytest.approx(found.sgd.noise.value, rel=1e-9)
    assert again.preconditioned is None
    assert NoiseScales.from_json(found.to_json(), "noise.json").to_json() == found.to_json()


def test_one_prompt_is_refused(tiny_policy) -> None:
    step = cases.step(tiny_policy, num_prompts=2, group_size=3)
    with pytest.raises(BatchError, match="at least 2"):
        noise_scale(tiny_policy, step.update.select([0, 1, 2]))


def test_one_group_with_a_gradient_has_no_resolved_signal() -> None:
    effect = np.array([1.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = effect_noise_scale(effect, np.repeat(np.arange(3), 3), unit="nats/token/lr")
    assert found.signal.value == pytest.approx(0, abs=1e-12)
    assert not found.prompts.reliable
    assert "not resolved from zero" in found.prompts.reason
    assert np.isnan(found.prompts.value)
    assert NOT_FINITE not in found.prompts.reason
    flat = effect_noise_scale(np.zeros(9), np.repeat(np.arange(3), 3), unit="nats/token/lr").prompts
    assert (flat.reliable, NOT_FINITE in flat.reason) == (False, False)


def test_limits_hold_the_noise_scale_and_there_is_no_number_without_a_signal() -> None:
    rng = np.random.default_rng(7)
    for between, prompts in ((30.0, 24), (3000.0, 24)):
        truth = between + 8 / 4
        found = []
        for _ in range(60):
            c, index = contributions(rng, prompts, 4, between=between, within=8.0, dim=40)
            found.append(from_products(c @ c.T, index, unit="", method=""))
        assert np.mean([f.prompts.low <= truth <= f.prompts.high for f in found]) > 0.88
        open_ends = [f for f in found if not np.isfinite(f.prompts.high)]
        assert all(np.isnan(f.prompts.value) and not f.prompts.reliable for f in open_ends)
        assert all(np.isfinite(f.at_least) and f.at_least > 0 for f in found)
        assert (len(open_ends) > 50) == (between > 100)


@pytest.mark.parametrize("estimator", ["leave_one_out", "rao_blackwell"])
def test_a_unit_of_hypo_is_a_pair_and_the_samples_of_a_prompt(estimator: str) -> None:
    """Against the gradient of each unit's own loss, by a pass for each; within a unit nothing is alike."""
    policy, update, reference = cases.preferences(estimator)
    step = reconstruct_step(policy, update, reference=reference)
    found = noise_scale(policy, update, token_weights=step.token_weights, reference=reference)
    names = {f"{kind}/{unit}": unit for kind in ("pair", "sample") for unit in range(4)}
    groups = []
    for unit in range(4):
        rows = [i for i, name in enumerate(update.prompt_ids) if names[name] == unit]
        part = update.select(rows)
        alone = reconstruct_step(policy, part, reference=reference)
        groups.append(torch.cat([t.reshape(-1) for t in alone.ascent.values()]).numpy())
    g = np.stack(groups)  # mean over one pair and one prompt's samples, so that the batch's is their mean
    np.testing.assert_allclose(
        g.mean(0), torch.cat([t.reshape(-1) for t in step.ascent.values()]).numpy(), rtol=1e-9, atol=1e-12
    )
    A = g @ g.T
    signal = (A.sum() - np.trace(A)) / 12
    assert found.sgd.signal.value == pytest.approx(signal, rel=1e-8)
    assert found.sgd.noise.value == pytest.approx(np.trace(A) / 4 - signal, rel=1e-8)
    assert found.sgd.noise.n == 4
    told = no_best_step(update, policy.settings)
    assert "pairs of some prompts and samples of others" in told
    by_prompt = replace(update, questions=tuple(f"{i // 2 % 4}" for i in range(16)))
    told = no_best_step(by_prompt, policy.settings)
    assert ("belongs to no prompt" in told) if estimator == "rao_blackwell" else told == ""
    assert np.isnan(found.sgd.within_prompts.value)
    assert "not draws of one distribution" in found.sgd.between_prompts.reason
