"""Do 95 % intervals hold the exact value in 95 % of the cases? Repeated honest samples of a known policy."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from scipy.stats import t as student

from enumerable import EOS, digit_reward, enumerable_policy, random_step
from stepscope.measure.baselines import fit_baseline, length_baseline
from stepscope.measure.estimators import ESTIMATORS, Probe
from stepscope.measure.line import derivatives, hidden_states, response_mask, values_at
from stepscope.measure.quantities import NORMALISATIONS, make_quantity
from stepscope.measure.series import make_change
from stepscope.reference import exact_change, exact_derivatives, exact_rollouts, exact_value
from stepscope.stats import Estimate

REPLICATIONS = 1000
NUM_PROMPTS = 256
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
    table = values_at(policy, rollouts, quantities, max_sequences=512)
    slopes = derivatives(policy, rollouts, quantities, direction, order=2, max_sequences=512)
    features = hidden_states(policy, rollouts, max_sequences=512)
    mask = response_mask(rollouts)
    speed = float(np.sqrt((slopes[0].logprobs[mask] ** 2).mean()))
    lrs = (1e-3 / speed, 1e-1 / speed)
    moved = {lr: values_at(policy, rollouts, quantities, direction, lr, max_sequences=512) for lr in lrs}
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
                probe = Probe(
                    table.select(rows).quantity(index),
                    mask[rows],
                    clusters,
                    normalisation == "per_token",
                    True,
                    np.zeros(mask[rows].shape),
                    length_baseline(mask[rows], clusters),
                )
                for estimator, baseline in WAYS:
                    change = make_change(
                        quantities[index],
                        probe,
                        local,
                        {lr: t.select(rows).quantity(index) for lr, t in moved.items()},
                        own_lr=lrs[0],
                        sweep=lrs,
                        tiny=(),
                        baseline=fit_baseline(baseline, probe, local[0], features=features[rows]),
                        estimator=estimator,
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
                        reach = float(student.ppf(0.975, estimate.n - 1)) * estimate.stderr
                        covered[name, normalisation, estimator, baseline, what].append(
                            abs(estimate.value - truth[what]) <= reach
                        )
    shares = {key: float(np.mean(hits)) for key, hits in covered.items()}
    print(*(f"{share:.3f} {' '.join(key)}" for key, share in sorted(shares.items())), sep="\n")
    assert len(shares) == 2 * 2 * (2 * 5 + 3 * 2)
    outside = {key: share for key, share in shares.items() if not 0.93 <= share <= 0.97}
    assert not outside, outside
