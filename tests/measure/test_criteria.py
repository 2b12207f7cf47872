"""Every criterion against values worked by hand; the tabular one against the exact derivative."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import BatchError, MeasurementError
from stepscope.measure.criteria.criterion import Criterion, known_criteria
from stepscope.measure.criteria.facts import token_facts
from stepscope.policy.passes import Budget
from stepscope.rules import (
    UNCLIPPED,
    ClipCov,
    DiscriminatorClipping,
    Intervention,
    KlCov,
    Reweighting,
    Steer,
    TokenFacts,
    TopEntropy,
    token_advantages,
)

L = np.log(2.0)
CRITERIA = {c.name: c for c in known_criteria() if not c.needs}

# Tokens 0, 2, 3, 4 come from (1/2, 1/4, 1/4): H = 1.5 L, sum pi^2 = 3/8, S = L/4 for p = 1/2 and -L/8 for
# p = 1/4, M = L/16. Token 1 comes from (1/2, 1/2): H = L, sum pi^2 = 1/2, S = M = 0.
FACTS = TokenFacts(
    sequence=np.array([0, 0, 1, 2, 3]),
    position=np.array([0, 1, 0, 0, 0]),
    logprob=np.array([-1.0, -1, -2, -2, -1]) * L,
    old_logprob=np.array([-1.0, -1, -2, -2, -1]) * L,
    entropy=np.array([1.5, 1, 1.5, 1.5, 1.5]) * L,
    collision=np.array([3, 4, 3, 3, 3]) / 8,
    discriminator=np.array([1, 0, 1, 1, 1]) / 16 * L,
    advantages=np.array([1, -1, 0.5, -0.5]),
    rewards=np.array([1.0, 0, 1, 0]),
    correct=np.array([1.0, 0, 1, 0]),
    prompt=np.array([0, 0, 1, 1]),
    micro_batch_size=2,
)

BY_HAND = {
    "cov_batch": np.array([-0.32, -0.32, -0.72, 0.18, 0.28]) * L,
    "cov_micro": np.array([-2 / 9, -2 / 9, -8 / 9, 1 / 4, 1 / 4]) * L,
    "cov_thm1": np.array([-1 / 4, 0, -1 / 8, 1 / 16, 1 / 8]) * L,
    "clip_cov": [0, 0, 0, 0, 0],
    "kl_cov": [0, 0, 1, 0, 0],
    "disc_b": np.array([-0.2, 0.05, -0.175, 0.0875, 0.1]) * L,
    "disc_v": np.array([-3, 0, -3, 1.5, 1.5]) / 16 * L,
    "clip_b": [0, 0, 0, 0, 0],
    "clip_v": [0, 0, 0, 0, 0],
    "steer_thm": np.array([-1 / 8, 0, -3 / 32, 3 / 64, 1 / 16]) * L,
    "steer_rel": np.array([-1 / 4, 0, -3 / 8, 3 / 16, 1 / 8]) * L,
    "npg": np.array([-0.5, 0, -0.5, 0.25, 0.25]) * L,
    "entrocraft": np.array([-1, 0, -2 / 3, 1 / 3, 1 / 2]) * L,
    "quadrant": [-1, 0, -1, 1, 1],
    "stare": [0, 0, -1, 0.5, 0],
    "repo": np.array([-0.5, 0, 0.5, 0.5, -0.5]) * L,
    "repo_r": np.array([1, 1, 2, 1, 0.5]) * L,
    "top_ent": [-1, 0, 1, -0.5, 0.5],
    "top_ent_mask": [1, 0, 1, 1, 1],
    "ar": [-0.85, -0.85, 0.775, -0.3875, 0.425],
    "lopti": [0, 0, 1, 1, 0],
    "gradnorm": [np.sqrt(3 / 8), np.sqrt(1 / 2), np.sqrt(7 / 8), np.sqrt(7 / 32), np.sqrt(3 / 32)],
    "clip_lohi": [0, 0, 0, 0, 0],
    "nsr": [-0.1, -0.1, 1, -0.05, 0.5],
    "qae": np.array([-1, -1, 0, -1, 0]) / 0.5001,
    "cheng": [0.6 * L, 0.4 * L, 0.6 * L, 0.25, 0.25],
    "gtpo": [0.5, 1, 0.5, 0.5, 0.5],
    "neg_A": [-1, -1, 1, -0.5, 0.5],
    "logp": np.array([-1, -1, -2, -2, -1]) * L,
    "neg_H": np.array([-1.5, -1, -1.5, -1.5, -1.5]) * L,
    "neg_A_logp": np.array([1, 1, -2, 1, -0.5]) * L,
    "neg_A_H": np.array([-1.5, -1, 1.5, -0.75, 0.75]) * L,
    "neg_A_missing": [-0.5, -0.5, 0.75, -0.375, 0.25],
    "abs_A": [1, 1, 1, 0.5, 0.5],
    "abs_A_missing": [0.5, 0.5, 0.75, 0.375, 0.25],
    "missing": [0.5, 0.5, 0.75, 0.75, 0.5],
    "entropy": np.array([1.5, 1, 1.5, 1.5, 1.5]) * L,
    "position": [0, 1, 0, 0, 0],
    "length": [2, 2, 1, 1, 1],
    # sequences: mean l = -1, -2, -2, -1 (times L), mean over the batch and over either group -1.5
    "seq_cov_batch": np.array([-0.5, -0.5, 0.25, 0.25]) * L,
    "seq_cov_group": np.array([-0.5, -0.5, 0.25, 0.25]) * L,
    # -log pi(y|x) = 2, 2 and 2, 1 (times L)
    "aem_surprisal": np.array([0, 0, 0.25, 0.25]) * L,
    # mean H = 1.25 and 1.5 in the first group (weights 1 and 1/e), equal in the second
    "aem_weight": [-2 / (1 + np.exp(-1)), 2 * np.exp(-1) / (1 + np.exp(-1)), -0.5, 0.5],
    "seq_neg_A": [-1, 1, -0.5, 0.5],
    "seq_logp": np.array([-1, -2, -2, -1]) * L,
    "seq_neg_H": np.array([-1.25, -1.5, -1.5, -1.5]) * L,
    "seq_neg_A_logp": np.array([1, -2, 1, -0.5]) * L,
    "seq_neg_A_H": np.array([-1.25, 1.5, -0.75, 0.75]) * L,
    "seq_abs_A": [1, 1, 0.5, 0.5],
    "seq_length": [2, 1, 1, 1],
    "seq_pass_rate": [0.5, 0.5, 0.5, 0.5],
    "seq_entropy": np.array([1.25, 1.5, 1.5, 1.5]) * L,
}


def test_every_criterion_is_worked_by_hand_and_defined():
    assert list(BY_HAND) == list(CRITERIA)
    for criterion in CRITERIA.values():
        assert criterion.formula
        assert (criterion.kind == "control") is not bool(criterion.paper), criterion.name
        assert criterion.definition().sign


@pytest.mark.parametrize("name", BY_HAND)
def test_values_worked_by_hand(name):
    np.testing.assert_allclose(CRITERIA[name](FACTS), BY_HAND[name], rtol=1e-12, atol=1e-15)


def test_micro_batches_of_one_sequence_have_no_covariance():
    """The advantage of a GRPO sequence is one number, so nothing is left once its mean is taken off."""
    assert not CRITERIA["cov_micro"](replace(FACTS, micro_batch_size=1)).any()


def test_covariance_masks():
    """Covariances are minus the scores of cov_batch; ten times the advantage brings them to 2.2 and 4.99."""
    large = replace(FACTS, advantages=10 * FACTS.advantages)
    np.testing.assert_array_equal(CRITERIA["clip_cov"](large), [1, 1, 1, 0, 0])
    larger = replace(FACTS, advantages=11 * FACTS.advantages)
    np.testing.assert_array_equal(CRITERIA["clip_cov"](larger), [1, 1, 0, 0, 0])


def outlier(advantage: float, p: float) -> TokenFacts:
    """A hundred tokens of (1/2, 1/2), for which S = M = 0, and one of log-prob ``p`` in a binary choice."""
    probs = np.array([p, 1 - p])
    logs = np.log(probs)
    entropy = -probs @ logs
    return TokenFacts(
        sequence=np.zeros(101, dtype=int),
        position=np.arange(101),
        logprob=np.append(np.full(100, -L), logs[0]),
        old_logprob=np.append(np.full(100, -L), logs[0]),
        entropy=np.append(np.full(100, L), entropy),
        collision=np.append(np.full(100, 0.5), probs @ probs),
        discriminator=np.append(np.zeros(100), probs**2 @ (logs + entropy)),
        advantages=np.array([advantage]),
        rewards=np.zeros(1),
        correct=np.zeros(1),
        prompt=np.zeros(1, dtype=int),
    )


@pytest.mark.parametrize("name", ["clip_b", "clip_v"])
def test_discriminator_masks_take_outliers_of_negative_advantage_only(name):
    """One of 101 values differs: it is 10 standard deviations out, and S < M for a rare token."""
    np.testing.assert_array_equal(np.flatnonzero(CRITERIA[name](outlier(-1.0, 0.1))), [100])
    assert not CRITERIA[name](outlier(1.0, 0.1)).any()
    assert not CRITERIA[name](outlier(-1.0, 0.9)).any()


def test_off_policy_ratios_and_clipping():
    """Ratios 2, 1, 1, 1, 1/2: token 0 is clipped above, token 4 below."""
    moved = replace(FACTS, old_logprob=FACTS.logprob - np.array([1, 0, 0, 0, -1]) * L)
    np.testing.assert_allclose(moved.ratio, [2, 1, 1, 1, 0.5])
    np.testing.assert_array_equal(CRITERIA["clip_lohi"](moved), [1, 0, 0, 0, -1])
    np.testing.assert_allclose(
        CRITERIA["steer_thm"](moved), np.array([0, 0, -3 / 32, 3 / 64, 0]) * L, atol=1e-15
    )
    np.testing.assert_allclose(CRITERIA["disc_v"](moved), np.array([-6, 0, -3, 1.5, 0.75]) / 16 * L)
    released = np.array([-1 / 2, 0, -3 / 8, 3 / 16, 1 / 16]) * L
    np.testing.assert_allclose(CRITERIA["steer_rel"](moved), released, atol=1e-15)


def test_a_certain_token_moves_nothing():
    sure = replace(
        FACTS,
        logprob=np.zeros(5),
        old_logprob=np.zeros(5),
        entropy=np.zeros(5),
        collision=np.ones(5),
        discriminator=np.zeros(5),
    )
    for name in ("disc_v", "steer_thm", "entrocraft", "gradnorm", "npg"):
        assert not CRITERIA[name](sure).any(), name


@pytest.mark.parametrize("seed", range(3))
def test_disc_v_is_the_exact_derivative_of_a_tabular_softmax_policy(seed):
    """dH/dlr along the logit gradient r A (e_a - pi) of each token's own state."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(50, generator=generator, dtype=torch.float64)
    log_pi = torch.log_softmax(logits, 0)
    pi = log_pi.exp()
    entropy = -(pi @ log_pi)
    advantage, shift = -0.7, 0.1
    facts = TokenFacts(
        sequence=np.zeros(50, dtype=int),
        position=np.arange(50),
        logprob=log_pi.numpy(),
        old_logprob=log_pi.numpy() - shift,
        entropy=np.full(50, float(entropy)),
        collision=np.full(50, float(pi @ pi)),
        discriminator=np.full(50, float(pi**2 @ (log_pi + entropy))),
        advantages=np.array([advantage]),
        rewards=np.zeros(1),
        correct=np.zeros(1),
        prompt=np.zeros(1, dtype=int),
    )

    def entropy_of(z: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(z, 0)
        return -(log_p.exp() * log_p).sum()

    slope = torch.func.grad(entropy_of)(logits)
    pushes = np.exp(shift) * advantage * (torch.eye(50, dtype=torch.float64) - pi)
    np.testing.assert_allclose(CRITERIA["disc_v"](facts), (pushes @ slope).numpy(), rtol=0, atol=1e-10)


def test_facts_are_those_of_the_whole_distribution(tiny_policy):
    update = cases.batch(tiny_policy, num_prompts=3, group_size=2)
    facts = token_facts(tiny_policy, update, micro_batch_size=4, budget=Budget(max_sequences=4))
    assert len(facts) == update.num_tokens.sum()
    np.testing.assert_allclose(facts.ratio, 1, atol=1e-12)
    np.testing.assert_allclose(facts.entropy, np.concatenate(update.entropies), atol=1e-12)
    np.testing.assert_array_equal(facts.advantage, np.repeat(update.advantages, update.num_tokens))
    at = 0
    for prompt, response in zip(update.prompt_token_ids, update.response_token_ids, strict=True):
        with torch.no_grad():
            logits = tiny_policy.model(torch.tensor([[*prompt, *response]])).logits[0]
        log_pi = torch.log_softmax(logits.double()[len(prompt) - 1 : -1] / update.temperature, -1)
        pi = log_pi.exp()
        entropy = -(pi * log_pi).sum(-1, keepdim=True)
        here = slice(at, at + len(response))
        np.testing.assert_allclose(facts.collision[here], (pi**2).sum(-1), atol=1e-6)
        np.testing.assert_allclose(facts.discriminator[here], (pi**2 * (log_pi + entropy)).sum(-1), atol=1e-6)
        at += len(response)


def test_what_a_criterion_must_not_return(tiny_policy):
    with pytest.raises(MeasurementError, match=r"criterion half: returned shape \(2,\), expected \(5,\)"):
        Criterion("half", lambda f: f.logprob[:2], "half of it")(FACTS)
    with pytest.raises(MeasurementError, match="5 of its values are not finite"):
        Criterion("broken", lambda f: np.full(len(f), np.nan), "nan")(FACTS)
    with pytest.raises(BatchError, match="no advantages"):
        token_facts(
            tiny_policy, replace(cases.batch(tiny_policy, num_prompts=1, group_size=2), advantages=None)
        )


@pytest.mark.parametrize(
    ("name", "intervention", "reading"),
    [
        ("clip_cov", ClipCov(fraction=1.0), lambda made, a: made == 0),
        ("top_ent_mask", TopEntropy(), lambda made, a: made != 0),
        ("ar", Reweighting(), lambda made, a: -made),
        ("steer_thm", Steer(), lambda made, a: np.log(made / a) / np.log(0.7)),
        ("steer_rel", Steer(form="released"), lambda made, a: np.log(made / a) / np.log(0.7)),
        ("clip_b", DiscriminatorClipping(form="batch"), lambda made, a: made == 0),
        ("clip_v", DiscriminatorClipping(threshold=8.5, max_fraction=5e-3), lambda made, a: made == 0),
        ("kl_cov", KlCov(), lambda made, a: made != a),
    ],
)
def test_ranking_and_training_read_the_same_numbers_off_one_table(name, intervention: Intervention, reading):
    """What the training makes of the advantages tells what the criterion scores; the last one is an outlier.

    STEER's weight tells the size of the change over the largest.
    """
    random = np.random.default_rng(0)
    logprob = np.append(-random.exponential(1.0, 299), -1.0)
    facts = TokenFacts(
        sequence=np.repeat(np.arange(20), 15),
        position=np.tile(np.arange(15), 20),
        logprob=logprob,
        old_logprob=logprob - 0.1 * random.normal(size=300),
        entropy=np.append(0.1 * random.normal(size=299) - logprob[:299], 0.0),
        collision=random.uniform(size=300),
        discriminator=np.where(np.arange(300) == 299, 5.0, 0.01 * random.normal(size=300)),
        advantages=np.append(random.normal(size=19), -1.0),
        rewards=np.zeros(20),
        correct=np.zeros(20),
        prompt=np.repeat(np.arange(5), 4),
    )
    if intervention.unclipped:
        facts = replace(facts, epsilon_low=1.0, epsilon_high=UNCLIPPED)
    made = token_advantages(intervention, facts, seed=0, step=0)
    scores = CRITERIA[name](facts)
    if name.startswith("steer"):
        scores = np.abs(scores) / np.abs(scores).max()
    assert scores.any()
    np.testing.assert_allclose(reading(made, facts.advantage), scores, rtol=1e-9, atol=1e-12)
