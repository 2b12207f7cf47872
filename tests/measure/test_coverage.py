"""Do 95 % intervals hold the exact value in 95 % of the cases? Repeated honest samples of a known policy."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from enumerable import EOS, digit_reward, enumerable_policy, random_step
from stepscope.intervals import proportion
from stepscope.measure.change.estimate import make_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.noise.limits import noise_limits
from stepscope.measure.quantity.base import NORMALISATIONS, make_quantity
from stepscope.measure.quantity.baselines import fit_baseline, length_baseline
from stepscope.measure.quantity.estimators import ESTIMATORS, linear, per_decision, value
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import derivatives, hidden_states, response_mask, values_at
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.gradients.products import group_gradients
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.reference import exact_change, exact_derivatives, exact_rollouts, exact_value
from stepscope.results import FloatArray
from stepscope.stats import Estimate, pass_at_k

REPLICATIONS = 1000
NUM_PROMPTS = 256
FEW_PROMPTS = (8, 16, 32, 64, 256)
PROMPTS = ((2, 3), (4, 2, 3), (3, 3), (2, 4, 4), (3, 2), (4, 4, 2), (2, 2, 2), (4, 3))
WAYS = (("per_decision", "best"), *((name, "position") for name in ESTIMATORS))


@pytest.mark.slow
def test_intervals_cover() -> None:
    """1000 replications: the binomial error of a coverage of 95 % is 0.7 %; 93-97 % is three of those."""
    policy = enumerable_policy(length=4, temperature=1.3)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    direction = random_step(policy).direction
    names = ("entropy", "reward")
    quantities = [make_quantity(name, rollouts) for name in names]
    table = values_at(policy, rollouts, quantities, budget=Budget(max_sequences=512))
    slopes = derivatives(policy, rollouts, quantities, direction, order=2, budget=Budget(max_sequences=512))
    features = hidden_states(policy, rollouts, budget=Budget(max_sequences=512))
    mask = response_mask(rollouts)
    speed = float(np.sqrt((slopes[0].logprobs[mask] ** 2).mean()))
    lrs = (1e-3 / speed, 1e-1 / speed)
    moved = {
        lr: values_at(policy, rollouts, quantities, direction, lr, budget=Budget(max_sequences=512))
        for lr in lrs
    }
    exact: dict[tuple[str, str], list[float]] = {}
    for name in names:
        for normalisation in NORMALISATIONS:
            exact[name, normalisation] = [
                exact_value(policy, rollouts, name, normalisation=normalisation).item(),
                *exact_derivatives(policy, rollouts, name, direction, normalisation=normalisation),
                *(
                    exact_change(policy, rollouts, name, direction, lr, normalisation=normalisation)
                    for lr in lrs
                ),
            ]
    members = [np.flatnonzero(rollouts.prompt_index == p) for p in range(len(PROMPTS))]
    covered: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    clusters = np.arange(NUM_PROMPTS)
    for replication in range(REPLICATIONS):
        generator = np.random.default_rng(replication)
        asked = generator.integers(len(PROMPTS), size=NUM_PROMPTS)
        rows = np.array(
            [generator.choice(members[p], p=probabilities[members[p]] * len(PROMPTS)) for p in asked]
        )
        for index, name in enumerate(names):
            for normalisation in NORMALISATIONS:
                local = [s.select(rows).quantity(index) for s in slopes]
                quantity = replace(quantities[index], normalisation=normalisation)
                probe = probe_values(quantity, table.quantity(index), rollouts).select(rows)
                length = length_baseline(mask[rows], clusters)
                probe = replace(probe, clusters=clusters, length_baseline=length)
                for estimator, baseline in WAYS:
                    fitted = fit_baseline(baseline, probe, local[0], features=features[rows])
                    change = make_change(
                        replace(probe, baseline=fitted),
                        local,
                        {lr: t.select(rows).quantity(index) for lr, t in moved.items()},
                        own_lr=lrs[0],
                        lrs=lrs,
                        tiny=(),
                        options=ChangeOptions(estimator=estimator),
                    )
                    found: dict[str, Estimate] = {
                        "small": change.points[0].true,
                        "large": change.points[1].true,
                    }
                    if estimator == "per_decision":
                        assert change.curvature is not None
                        found |= {"value": change.value, "slope": change.slope, "curvature": change.curvature}
                    truth = dict(
                        zip(
                            ("value", "slope", "curvature", "small", "large"),
                            exact[name, normalisation],
                            strict=True,
                        )
                    )
                    for what, estimate in found.items():
                        covered[name, normalisation, estimator, baseline, what].append(
                            estimate.low <= truth[what] <= estimate.high
                        )
    shares = {key: float(np.mean(hits)) for key, hits in covered.items()}
    print(*(f"{share:.3f} {' '.join(key)}" for key, share in sorted(shares.items())), sep="\n")
    assert len(shares) == 2 * 2 * (2 * 5 + 3 * 2)
    outside = {key: share for key, share in shares.items() if not 0.93 <= share <= 0.97}
    assert not outside, outside


def few_prompts(temperature: float) -> dict[tuple[str, ...], tuple[float, float]]:
    """Coverage of what is not flagged, and the share that is flagged, by number of prompts and figure.

    One response to each prompt, so that no cluster averages the tails away. The influence is that of a
    response on the probe: the slope along its gradient.
    """
    policy = enumerable_policy(length=4, temperature=temperature)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    direction = random_step(policy).direction
    names = ("entropy", "reward")
    quantities = [make_quantity(name, rollouts) for name in names]
    response = rollouts.select([int(np.argsort(probabilities)[-20])])
    towards = gradient(policy, response, weighted_logprobs((np.ones(response.num_tokens[0]),)))
    table = values_at(policy, rollouts, quantities, budget=Budget(max_sequences=512))
    (first,) = derivatives(policy, rollouts, quantities, direction, budget=Budget(max_sequences=512))
    (other,) = derivatives(policy, rollouts, quantities, towards, budget=Budget(max_sequences=512))
    mask = response_mask(rollouts)
    weights = probabilities[:, None] * mask
    speed = float(np.sqrt((first.logprobs**2 * weights).sum() / weights.sum()))
    lrs = (1e-3 / speed, 1e-1 / speed)
    moved = [
        values_at(policy, rollouts, quantities, direction, lr, budget=Budget(max_sequences=512)) for lr in lrs
    ]
    members = [np.flatnonzero(rollouts.prompt_index == p) for p in range(len(PROMPTS))]
    chances = [np.cumsum(probabilities[m]) / probabilities[m].sum() for m in members]
    covered: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    flagged: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for index, name in enumerate(names):
        for normalisation in NORMALISATIONS:
            how = {"normalisation": normalisation}
            truths = (
                exact_value(policy, rollouts, name, normalisation=normalisation).item(),
                exact_derivatives(policy, rollouts, name, direction, normalisation=normalisation)[0],
                exact_derivatives(policy, rollouts, name, towards, normalisation=normalisation)[0],
                *(exact_change(policy, rollouts, name, direction, lr, **how) for lr in lrs),
            )
            for count in FEW_PROMPTS:
                clusters = np.arange(count)
                for replication in range(REPLICATIONS):
                    generator = np.random.default_rng(replication)
                    asked = generator.integers(len(PROMPTS), size=count)
                    at = zip(asked, generator.random(count), strict=True)
                    rows = np.array([members[p][np.searchsorted(chances[p], x)] for p, x in at])
                    quantity = replace(quantities[index], normalisation=normalisation)
                    probe = probe_values(quantity, table.quantity(index), rollouts).select(rows)
                    length = length_baseline(mask[rows], clusters)
                    probe = replace(probe, clusters=clusters, length_baseline=length)
                    along = first.select(rows).quantity(index)
                    probe = replace(probe, baseline=fit_baseline("position", probe, along))
                    found = (
                        value(probe),
                        linear(probe, along),
                        linear(probe, other.select(rows).quantity(index)),
                        *(per_decision(probe, m.select(rows).quantity(index)) for m in moved),
                    )
                    figures = ("value", "slope", "influence", "small change", "large change")
                    for figure, sampled, truth in zip(figures, found, truths, strict=True):
                        estimate = probe.estimate(sampled, unit="", method="")
                        key = (str(count), f"{name} {normalisation}", figure)
                        flagged[key].append(not estimate.reliable)
                        if estimate.reliable:
                            covered[key].append(estimate.low <= truth <= estimate.high)
    return {key: (float(np.mean(hits)), float(np.mean(flagged[key]))) for key, hits in covered.items()}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.3, 0.35], ids=["broad", "peaked"])
def test_intervals_cover_for_few_prompts(temperature: float) -> None:
    """8 to 256 prompts: what is not flagged covers 93 % or more, up to two binomial errors of 0.8 %.

    Below 64 prompts some intervals are longer than they need be: no interval can be right for each of the
    distributions here from so few prompts.
    """
    found = few_prompts(temperature)
    for key, (share, doubt) in sorted(found.items(), key=lambda item: (int(item[0][0]), item[0])):
        print(f"{share:.3f} flagged {doubt:.3f} {' | '.join(key)}")
    assert len(found) == len(FEW_PROMPTS) * 2 * 2 * 5
    short = {key: share for key, (share, _) in found.items() if share < 0.93 - 0.016}
    assert not short, short
    long = {key: share for key, (share, _) in found.items() if int(key[0]) >= 64 and share > 0.97 + 0.016}
    assert not long, long
    assert max(doubt for key, (_, doubt) in found.items() if int(key[0]) >= 32) < 0.01


@pytest.mark.slow
def test_fractions_cover_near_their_ends() -> None:
    """pass@1 and pass@8 of 8 responses, over populations from hopeless to .9998 solved."""
    generator = np.random.default_rng(1)
    populations = ((0.3, 0.3), (2.0, 2.0), (5.0, 0.5), (3.0, 0.5), (20.0, 20.0), (0.1, 3.0))
    shares = {}
    for a, b in populations:
        for k in (1, 8):
            everyone = generator.beta(a, b, size=1_000_000)
            truth = float((1 - (1 - everyone) ** k).mean())
            for count in FEW_PROMPTS:
                solved = generator.binomial(8, generator.beta(a, b, size=(1000, count)))
                ends = np.array([proportion(pass_at_k(8, c, k)) for c in solved])
                hits = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
                shares[f"pass@{k} {truth:.4f}", count] = float(hits.mean())
    print(*(f"{share:.3f} {key}" for key, share in shares.items()), sep="\n")
    assert min(shares.values()) > 0.93 - 0.008, shares


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.3, 0.35], ids=["broad", "peaked"])
def test_limits_of_the_noise_scale_cover(temperature: float) -> None:
    """Groups of 8 responses with advantages within the group; signals from strong to a sixth of their own."""
    policy = enumerable_policy(length=3, temperature=temperature)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    count = len(rollouts)
    ones = tuple(np.ones(n) for n in rollouts.num_tokens)
    parts = group_gradients(
        policy,
        SequenceGradients(rollouts, weighted_logprobs(ones), as_trained=False),
        np.arange(count),
        budget=Budget(max_sequences=64),
    )
    scores = torch.cat([t.flatten(1) for t in parts.values()], 1).double().numpy()
    root = np.sqrt(probabilities)[:, None]
    axes = np.linalg.svd(scores * root, full_matrices=False)[2][:60]
    scores = scores @ axes.T
    members = [np.flatnonzero(rollouts.prompt_index == p) for p in range(len(PROMPTS))]
    generator = np.random.default_rng(3)

    def groups(size: int) -> FloatArray:
        asked = generator.integers(len(PROMPTS), size=size)
        found = np.empty((size, scores.shape[1]))
        for p, own in enumerate(members):
            here = np.flatnonzero(asked == p)
            chance = probabilities[own] / probabilities[own].sum()
            drawn = generator.choice(own, p=chance, size=(len(here), 8))
            advantage = rollouts.rewards[drawn] - rollouts.rewards[drawn].mean(1, keepdims=True)
            found[here] = np.einsum("bg,bgd->bd", advantage, scores[drawn]) / 8
        return found

    everyone = groups(500_000)
    mean = everyone.mean(0)
    noise = float(everyone.var(0, ddof=1).sum())
    signal = float(mean @ mean) - noise / len(everyone)
    shares = {}
    for strength in (1.0, 0.4, 0.15):
        truth = noise / (signal * strength**2)
        for size in FEW_PROMPTS:
            hits, at_least, resolved = [], [], []
            for _ in range(500):
                g = groups(size) + (strength - 1) * mean
                low, high = noise_limits(g @ g.T)
                hits.append(low <= truth <= high)
                at_least.append(low <= truth)
                resolved.append(np.isfinite(high))
            key = (f"B = {truth:.0f}", size)
            shares[key] = (float(np.mean(hits)), float(np.mean(at_least)), float(np.mean(resolved)))
    print(*(f"{s[0]:.3f} at least {s[1]:.3f} resolved {s[2]:.2f} {k}" for k, s in shares.items()), sep="\n")
    assert min(s[0] for s in shares.values()) > 0.9, shares
    assert min(s[1] for s in shares.values()) > 0.92, shares
