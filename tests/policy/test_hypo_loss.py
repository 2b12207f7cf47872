"""The estimates of the reverse KL divergence's gradient against its enumeration, and HyPO's token weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import cases
from enumerable import EOS, PROMPTS, enumerable_policy, random_step, shifted_model
from stepscope.errors import BatchError, ConfigError
from stepscope.measure.step.reconstruct import reconstruct_step, weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.loss.hypo import KlEstimator, score_factors
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import token_weights
from stepscope.policy.rollouts import score_rollouts
from stepscope.reference import exact_gradient, exact_rollouts
from stepscope.results import FloatArray, Rollouts

ESTIMATORS: tuple[KlEstimator, ...] = ("leave_one_out", "rao_blackwell")


def expected_factors(
    values: torch.Tensor, probabilities: FloatArray, *, size: int, own: bool
) -> torch.Tensor:
    """(seq, tok) E[factor of a response | it is drawn], over all groups of ``size`` with it at each place."""
    count = len(values)
    total = torch.zeros_like(values)
    for chosen in product(range(count), repeat=size):
        rows = torch.tensor(chosen)
        found = score_factors(values[rows], torch.zeros(size), own=own)
        weight = probabilities[list(chosen)].prod()
        for place, i in enumerate(chosen):
            total[i] += weight * found[place] / size
    return total / torch.from_numpy(probabilities)[:, None]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("size", "length", "vocabulary"), [(2, 2, 5), (3, 1, 5), (2, 3, 3)])
def test_both_estimates_are_unbiased(estimator: KlEstimator, size: int, length: int, vocabulary: int) -> None:
    """All groups of responses that the policy can draw to two prompts, by their probability, in float64."""
    policy = enumerable_policy(length=length, temperature=1.0)
    if vocabulary < 5:
        model = cases.model(
            vocab_size=vocabulary, intermediate_size=24, pad_token_id=None, tie_word_embeddings=False
        )
        policy = replace(policy, model=model.double())
    reference = shifted_model(policy)
    prompts = [[t % vocabulary for t in p] for p in PROMPTS]
    rollouts, probabilities = exact_rollouts(policy, prompts, eos_id=EOS)
    other = replace(policy, model=reference)
    batch = make_batch(rollouts.prompt_token_ids, rollouts.response_token_ids)
    with torch.no_grad():
        pi, ref = (
            forward(m, batch, temperature=1.0, keep_logits=True).logits.log_softmax(-1)  # type: ignore[union-attr]
            for m in (policy.model, reference)
        )
    exact = estimator == "rao_blackwell"
    if exact:
        values = (pi.exp() * (pi - ref)).sum(-1) * batch.response_mask
    else:
        rows = [n - r for n, r in zip(rollouts.logprobs, score_rollouts(other, rollouts)[0], strict=True)]
        values = batch.pad(rows, pi[..., 0])
    weights = torch.zeros_like(values)
    for prompt in range(len(prompts)):
        members = np.flatnonzero(rollouts.group_index == prompt)
        own = probabilities[members] * len(prompts)
        factors = expected_factors(values[members], own, size=size, own=not exact)
        weights[members] = torch.from_numpy(probabilities[members])[:, None] * factors
    per_token = [row[:n].numpy() for row, n in zip(weights, rollouts.num_tokens, strict=True)]
    found = gradient(policy, rollouts, weighted_logprobs(per_token))
    known: dict[str, Any] = {"normalisation": "per_seq", "reference": reference}
    if exact:
        found = vectors.add(found, exact_gradient(policy, rollouts, "kl", version="fixed_prefix", **known))
    truth = exact_gradient(policy, rollouts, "kl", version="on_policy", **known)
    assert vectors.norm(truth) > 1e-3
    apart = vectors.norm(vectors.add(found, vectors.scale(truth, -1.0)))
    assert apart <= 1e-12 * vectors.norm(truth)


def batch_of_both() -> tuple[Rollouts, StepSettings, tuple[FloatArray, ...]]:
    """Two pairs and three samples of two prompts each, shuffled, with log-probs of a reference."""
    policy = cases.policy()
    pairs, samples = (
        cases.batch(policy, num_prompts=2, group_size=2),
        cases.batch(policy, num_prompts=2, group_size=3),
    )
    names = tuple(f"pair/{i // 2}" for i in range(4)) + tuple(f"sample/{i // 3}" for i in range(6))
    both = {
        name: tuple(getattr(pairs, name)) + tuple(getattr(samples, name))
        for name in (
            "prompts",
            "responses",
            "prompt_token_ids",
            "response_token_ids",
            "logprobs",
            "entropies",
        )
    }
    update = replace(
        pairs,
        prompt_ids=names,
        questions=None,
        rewards=np.array([1.0, 0.0, 0.0, 1.0, *[0.0] * 6]),
        advantages=np.array([0.5, -0.5, -0.5, 0.5, *[0.0] * 6]),
        correct=np.zeros(10, dtype=np.bool_),
        truncated=np.zeros(10, dtype=np.bool_),
        **both,
    )
    generator = np.random.default_rng(0)
    update = update.select(generator.permutation(10))
    reference = tuple(row + 0.5 * generator.standard_normal(len(row)) for row in update.logprobs)
    parameters = {"kl_weight": 0.3, "kl_group_size": 3}
    return update, StepSettings(loss_type="hypo", beta=0.7, loss_parameters=parameters), reference


def test_token_weights_are_those_of_both_terms() -> None:
    """By hand: +-beta sigmoid(-margin)/pairs, and -lambda (sum ahead - that of the others)/samples."""
    update, settings, reference = batch_of_both()
    found = token_weights(update, settings, ref_logprobs=reference)
    ratios = [now - ref for now, ref in zip(update.logprobs, reference, strict=True)]
    for name in ("pair/0", "pair/1"):
        rows = [i for i in range(10) if update.prompt_ids[i] == name]
        chosen, rejected = sorted(rows, key=lambda i: -update.rewards[i])
        margin = 0.7 * (ratios[chosen].sum() - ratios[rejected].sum())
        push = 0.7 / (1 + np.exp(margin)) / 2
        np.testing.assert_allclose(found[chosen], push, rtol=1e-12)
        np.testing.assert_allclose(found[rejected], -push, rtol=1e-12)
    for name in ("sample/0", "sample/1"):
        rows = [i for i in range(10) if update.prompt_ids[i] == name]
        for i in rows:
            for k in range(len(ratios[i])):
                others = [ratios[j][k:].sum() for j in rows if j != i]
                expected = -0.3 / 6 * (ratios[i][k:].sum() - np.mean(others))
                assert found[i][k] == pytest.approx(expected, rel=1e-12)


def test_a_batch_of_other_responses_is_refused() -> None:
    update, settings, reference = batch_of_both()

    def weights(rewards: FloatArray | None = None, **parameters: Any) -> None:
        own = replace(settings, loss_parameters={**settings.loss_parameters, **parameters})
        changed = update if rewards is None else replace(update, rewards=rewards)
        token_weights(changed, own, ref_logprobs=reference)

    with pytest.raises(BatchError, match=r"3 responses of equal rewards, expected a pair .* or 2 samples"):
        weights(kl_group_size=2)
    rewards = update.rewards.copy()
    rewards[[i for i in range(10) if update.prompt_ids[i] == "pair/0"]] = 0.0
    with pytest.raises(BatchError, match="2 responses of equal rewards"):
        weights(rewards)
    rewards = update.rewards.copy()
    rewards[update.prompt_ids.index("sample/1")] = 1.0
    with pytest.raises(BatchError, match="3 responses of different rewards"):
        weights(rewards)
    with pytest.raises(BatchError, match=r"rao_blackwell needs the divergence at every token"):
        weights(kl_estimator="rao_blackwell")
    with pytest.raises(ConfigError, match=r"kl_weight of hypo"):
        weights(kl_weight=0.0)
    with pytest.raises(BatchError, match="the only response to its prompt"):
        score_factors(torch.zeros(3, 2), torch.tensor([0, 0, 1]), own=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_ascent_is_the_derivative_of_the_loss_written_out(estimator: KlEstimator) -> None:
    """With loops, its held factors as numbers, by differences along a random direction."""
    policy, update, other = cases.preferences(estimator)
    exact = estimator == "rao_blackwell"
    batch = make_batch(update.prompt_token_ids, update.response_token_ids)
    counts = batch.response_mask.sum(1).tolist()

    def said(model: Any) -> tuple[FloatArray, torch.Tensor]:
        with torch.no_grad():
            outputs = forward(model, batch, temperature=1.0, keep_logits=True)
        assert outputs.logits is not None
        return outputs.logprobs.numpy(), outputs.logits.log_softmax(-1)

    at_reference, log_ref = said(other.model)

    def divergences(log_pi: torch.Tensor) -> FloatArray:
        return np.asarray((log_pi.exp() * (log_pi - log_ref)).sum(-1) * batch.response_mask)

    logprobs, log_pi = said(policy.model)
    held = divergences(log_pi) if exact else logprobs - at_reference

    def loss() -> float:
        logprobs, log_pi = said(policy.model)
        ratios, total = (logprobs - at_reference).sum(1), 0.0
        for chosen in range(0, 8, 2):
            total += np.log1p(np.exp(-0.7 * (ratios[chosen] - ratios[chosen + 1]))) / 4
        for i in range(8, 16):
            for k in range(counts[i]):
                ahead, others = (held[j, k + exact :].sum() for j in (i, i ^ 1))
                total += 0.5 / 8 * (ahead - others) * logprobs[i, k]
            total += 0.5 / 8 * divergences(log_pi)[i].sum() * exact
        return total

    step = reconstruct_step(policy, update, reference=other)
    direction = random_step(policy).direction
    sides = []
    for sign in (1.0, -1.0):
        with vectors.shifted(policy.parameters, direction, sign * 1e-6):
            sides.append(loss())
    slope = (sides[0] - sides[1]) / 2e-6
    assert -slope == pytest.approx(vectors.dot(step.ascent, direction), rel=1e-7)
