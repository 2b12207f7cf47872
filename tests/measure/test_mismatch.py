"""Sampler against policy: closed forms on policies whose responses can be listed, and on samples of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy
from stepscope.measure.mismatch import sampler_mismatch
from stepscope.policy.numerics.precision import matching_precision
from stepscope.policy.passes import Budget
from stepscope.policy.sampling.base import Decoding
from stepscope.policy.sampling.decoded import score_decoding
from stepscope.policy.sampling.drawn_by import with_sampler
from stepscope.policy.sampling.generate import TransformersSampler
from stepscope.policy.state import Policy
from stepscope.reference import exact_rollouts, sample_exact
from stepscope.results import FloatArray, Rollouts
from stepscope.results.mismatch import SamplerMismatch

DECODINGS = {
    "temperature": Decoding(temperature=0.5),
    "hotter": Decoding(temperature=1.4),
    "top_k": Decoding(top_k=2),
    "top_p": Decoding(top_p=0.7),
    "min_p": Decoding(min_p=0.3),
    "all": Decoding(temperature=1.2, top_k=4, top_p=0.9, min_p=0.1),
}


@dataclass
class Expected:
    """Sums over all prefixes that q reaches, each times the chance to reach it."""

    tokens: float = 0.0
    kl: float = 0.0
    cut: float = 0.0
    lost: float = 0.0
    mass: float = 0.0
    difference: float = 0.0
    square: float = 0.0
    whole_square: float = 0.0
    whole: float = 0.0
    entropy: float = 0.0
    truly: list[float] = field(default_factory=list)


def kept_by(decoding: Decoding, p: FloatArray) -> FloatArray:
    """What truncation leaves of probabilities, written from the definitions, one rule after the other."""
    p = p.copy()
    if decoding.top_k:
        p[np.argsort(-p)[decoding.top_k :]] = 0.0
        p /= p.sum()
    if decoding.top_p < 1:
        order = np.argsort(-p)
        needed = int(np.searchsorted(np.cumsum(p[order]), decoding.top_p)) + 1
        p[order[needed:]] = 0.0
        p /= p.sum()
    if decoding.min_p:
        p[p < decoding.min_p * p.max()] = 0.0
    return np.asarray(p / p.sum())


def closed_forms(policy: Policy, decoding: Decoding) -> Expected:
    """By walking the tree of prefixes with one call of the model for each, in numpy."""
    model: Any = policy.model
    settings = policy.settings
    found = Expected()

    def walk(prompt: Sequence[int], response: tuple[int, ...], reached: float, weight: float) -> None:
        if len(response) == settings.max_response_tokens or (response and response[-1] == EOS):
            found.whole += reached * weight
            found.whole_square += reached * weight**2
            return
        with torch.no_grad(), matching_precision(model):
            z = model(torch.tensor([[*prompt, *response]])).logits[0, -1].numpy()

        def softmax(values: FloatArray) -> FloatArray:
            e = np.exp(values - values.max())
            return np.asarray(e / e.sum())

        pi = softmax(z / settings.temperature)
        q = kept_by(decoding, softmax(z / (decoding.temperature or settings.temperature)))
        found.tokens += reached
        mass = float(pi[q > 0].sum())
        found.mass += reached * mass
        found.lost += reached * -math.log(mass)
        found.cut += reached * (mass < 0.99)
        for v in np.flatnonzero(q):
            gap = math.log(q[v] / pi[v])
            found.kl += reached * q[v] * gap
            found.difference += reached * q[v] * abs(gap)
            found.square += reached * q[v] * math.exp(-2 * gap)
            walk(prompt, (*response, int(v)), reached * q[v], weight * math.exp(-gap))

    for prompt in PROMPTS:
        walk(prompt, (), 1 / len(PROMPTS), 1.0)
    return found


def listed(policy: Policy, decoding: Decoding) -> tuple[Rollouts, FloatArray]:
    """All responses that q can draw, and the chance of each."""
    every, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    sampler = TransformersSampler(decoding=decoding)
    scored = only_what_q_draws(policy, every, sampler)
    assert scored.sampler_logprobs is not None
    assert scored.decoding_logprobs is not None
    return scored, np.exp([row.sum() for row in scored.sampler_logprobs]) / len(PROMPTS)


def only_what_q_draws(policy: Policy, every: Rollouts, sampler: TransformersSampler) -> Rollouts:
    """Responses that q cannot draw are left out before they are scored as drawn by q."""
    said = score_decoding(policy, every, sampler.decoding, order=sampler.order, budget=Budget())
    possible = [i for i, kept in enumerate(said.kept) if kept.all()]
    return with_sampler(policy, every.select(possible), sampler, Budget(max_sequences=64))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return enumerable_policy()


@pytest.mark.parametrize("name", DECODINGS)
def test_figures_are_their_closed_forms(policy: Policy, name: str) -> None:
    decoding = DECODINGS[name]
    true = closed_forms(policy, decoding)
    rollouts, weights = listed(policy, decoding)
    assert weights.sum() == pytest.approx(1.0, rel=1e-12)
    mismatch = sampler_mismatch(rollouts, sequence_weights=weights)
    assert mismatch is not None
    expected = {
        "difference": true.difference / true.tokens,
        "k1_per_token": true.kl / true.tokens,
        "k1_per_seq": true.kl,
        "k3_per_token": (true.kl - true.tokens + true.mass) / true.tokens,
        "k3_per_seq": true.kl - true.tokens + true.mass,
        "ratio": true.mass / true.tokens,
        "effective_per_token": true.mass**2 / (true.square * true.tokens),
        "effective_per_seq": true.whole**2 / true.whole_square,
        "mass": true.mass / true.tokens,
        "mass_lost": true.lost / true.tokens,
        "positions_cut": true.cut / true.tokens,
        "engine_difference": 0.0,
        "settings_k1_per_token": true.kl / true.tokens,
    }
    if not decoding.warpers():
        assert true.lost < 1e-12
        expected = {k: v for k, v in expected.items() if k not in ("mass", "mass_lost", "positions_cut")}
        assert not {"mass", "mass_lost", "positions_cut"} & set(mismatch.figures)
    for figure, value in expected.items():
        assert mismatch.figures[figure].value == pytest.approx(value, rel=1e-10, abs=1e-14), figure
    if decoding.top_k:
        assert true.lost > 0.01
    assert "another temperature or truncated" in mismatch.doubt


def test_an_honest_sample_is_within_its_errors(policy: Policy) -> None:
    decoding = DECODINGS["all"]
    true = closed_forms(policy, decoding)
    rollouts, weights = listed(policy, decoding)
    picked, _ = sample_exact(rollouts, weights, num_prompts=1500, group_size=2, seed=3)
    mismatch = sampler_mismatch(picked)
    assert mismatch is not None
    for figure, value in {
        "k1_per_token": true.kl / true.tokens,
        "k3_per_seq": true.kl - true.tokens + true.mass,
        "mass_lost": true.lost / true.tokens,
        "effective_per_seq": true.whole**2 / true.whole_square,
        "difference": true.difference / true.tokens,
    }.items():
        found = mismatch.figures[figure]
        assert found.stderr > 0
        assert abs(found.value - value) < 4 * found.stderr, figure
        assert found.stderr < 0.2 * abs(value)
        assert found.n == 1500


def test_biases_are_those_of_the_means(policy: Policy) -> None:
    """Under q plain means are off by the bias; of a temperature all of it is seen."""
    decoding = DECODINGS["temperature"]
    rollouts, weights = listed(policy, decoding)
    every, chances = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    picked, _ = sample_exact(rollouts, weights, num_prompts=2000, group_size=1, seed=5)
    figures = sampler_mismatch(picked).figures  # type: ignore[union-attr]

    def mean(batch: Rollouts, chance: FloatArray) -> tuple[float, float]:
        lengths = chance @ batch.num_tokens
        return float(chance @ batch.entropy_per_seq / lengths), float(chance @ batch.rewards)

    drawn, own = mean(rollouts, weights), mean(every, chances)
    for figure, value in (
        ("bias_entropy_per_token", drawn[0] - own[0]),
        ("bias_reward", drawn[1] - own[1]),
    ):
        found = figures[figure]
        assert abs(found.value - value) < 4 * found.stderr
    assert abs(drawn[0] - own[0]) > 4 * figures["bias_entropy_per_token"].stderr


def test_quantiles_and_worst_tokens_are_of_the_batch(policy: Policy) -> None:
    rollouts, weights = listed(policy, DECODINGS["hotter"])
    picked, _ = sample_exact(rollouts, weights, num_prompts=40, group_size=2, seed=1)
    assert picked.sampler_logprobs is not None
    gap = np.abs(np.concatenate(picked.sampler_logprobs) - np.concatenate(picked.logprobs))
    found = sampler_mismatch(picked)
    assert found is not None
    assert found.figures["difference_q90"].value == pytest.approx(np.quantile(gap, 0.9))
    assert found.figures["difference_q90"].low <= found.figures["difference_q90"].value
    assert found.figures["difference_largest"].value == gap.max()
    worst = found.worst[0]
    assert abs(worst.logprob - worst.sampler_logprob) == gap.max()
    assert picked.response_token_ids[worst.sequence_id][worst.position] == worst.token_id


def test_what_is_not_known_stays_out(policy: Policy) -> None:
    rollouts, weights = listed(policy, DECODINGS["hotter"])
    picked, _ = sample_exact(rollouts, weights, num_prompts=30, group_size=2, seed=2)
    whole = sampler_mismatch(picked)
    assert picked.sampler_logprobs is not None
    holes = tuple(np.where(np.arange(len(row)) == 0, np.nan, row) for row in picked.sampler_logprobs)
    part = sampler_mismatch(replace(picked, sampler_logprobs=holes))
    assert isinstance(whole, SamplerMismatch)
    assert isinstance(part, SamplerMismatch)
    later = [q[1:] - p[1:] for q, p in zip(picked.sampler_logprobs, picked.logprobs, strict=True)]
    assert part.figures["k1_per_token"].value == pytest.approx(np.concatenate(later).mean())
    assert "bias_reward" not in part.figures
    assert sampler_mismatch(replace(picked, sampler_logprobs=None)) is None
    nothing = tuple(np.full(len(row), np.nan) for row in picked.sampler_logprobs)
    assert sampler_mismatch(replace(picked, sampler_logprobs=nothing)) is None


def test_the_policy_against_itself_is_no_doubt(policy: Policy) -> None:
    every, chances = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    picked, _ = sample_exact(every, chances, num_prompts=40, group_size=2, seed=1)
    generator = np.random.default_rng(0)
    noisy = tuple(row + 1e-3 * generator.standard_normal(len(row)) for row in picked.logprobs)
    found = sampler_mismatch(replace(picked, sampler_logprobs=noisy))
    assert found is not None
    assert found.doubt == ""
    assert found.figures["k3_per_token"].value == pytest.approx(5e-7, rel=0.5)
    assert "mass_lost" not in found.figures
