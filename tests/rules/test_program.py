"""The program of the frontier: closed forms, optimality conditions, and what cross-fitting is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import nnls

from stepscope.errors import MeasurementError
from stepscope.results import FloatArray
from stepscope.rules.program import Effect, Program, members, units_of


def effect(values: FloatArray, *, folds: int = 1, noise: float = 0.0, seed: int = 0) -> Effect:
    """One quantity with independent noise in every fold; the step's own change is the sum."""
    rng = np.random.default_rng(seed)
    slope = values + noise * np.sqrt(folds) * rng.standard_normal((folds, len(values)))
    return Effect(np.full(folds, 1 / folds), slope.sum(1), slope)


def program(reward: Effect, entropy: Effect, gram: FloatArray | None = None, **options: float) -> Program:
    count = reward.slope.shape[1]
    K = np.eye(count) if gram is None else gram
    return Program(reward, entropy, K, np.arange(count), **options)  # type: ignore[arg-type]


def test_two_sequences_have_a_closed_form() -> None:
    """Reward by the first, entropy by the second, x within a circle of radius sqrt 2."""
    own = program(effect(np.array([1.0, 0.0])), effect(np.array([0.0, 1.0])), most=4.0, caution=0.0)
    for level in (0.2, 0.7, 1.0, 1.3):
        x = own.solve(at_least=level)
        np.testing.assert_allclose(x, [np.sqrt(2 - level**2), level], atol=1e-6)
    np.testing.assert_allclose(own.solve(aim="reward"), [np.sqrt(2), 0], atol=1e-5)
    np.testing.assert_allclose(own.solve(aim="entropy", at_least=1.0), [1, 1], atol=1e-6)
    bounded = replace(own, most=1.1)
    np.testing.assert_allclose(bounded.solve(aim="reward")[0], 1.1, atol=1e-8)
    with pytest.raises(MeasurementError, match=r"no weights up to 1\.1 change the entropy by 1\.2"):
        bounded.solve(at_least=1.2)


def test_curvature_has_a_closed_form_too() -> None:
    """R = 2 y - 2 y^2 of one sequence alone: y = 1/2, and no further however long a step may be."""
    bend = np.zeros((1, 2, 2))
    bend[0, 0, 0] = -4.0
    curved = replace(effect(np.array([2.0, 0.0])), bend=bend)
    own = program(curved, effect(np.array([0.0, 1.0])), np.eye(2) * 1e-9 + np.diag([0.0, 1.0]), caution=0.0)
    assert own.solve(aim="reward")[0] == pytest.approx(1.5, abs=1e-6)
    held = own.solve(aim="reward", at_least=0.5)
    assert own.entropy.own[0] + own.entropy.gain(held - 1)[0] >= 0.5 - 1e-9
    assert own.reward.gain(np.array([0.5, 0.0]))[0] == pytest.approx(0.5)


def test_with_curved_effects_no_grid_of_weights_is_better() -> None:
    """Several best places of reward and of entropy, against all weights of a grid that meet the limits."""

    def sure(aim: str) -> FloatArray:
        value, slope, bend = getattr(own, aim).mean()
        error = np.sqrt(np.einsum("si,ij,sj->s", grid, getattr(own, aim).covariance(own.gram), grid))
        return value + grid @ slope + np.einsum("si,ij,sj->s", grid, bend, grid) / 2 - own.caution * error

    grid = np.stack(np.meshgrid(*3 * [np.linspace(-1, 1, 21)], indexing="ij"), -1).reshape(-1, 3)
    several = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((3, 5))
        M = rng.standard_normal((2, 3, 3))
        effects = [
            replace(
                effect(rng.standard_normal(3), folds=8, noise=0.1, seed=seed),
                bend=np.tile(b + b.T, (8, 1, 1)),
            )
            for b in M
        ]
        own = program(*effects, rows @ rows.T, caution=float(seed % 2))
        inside = np.einsum("si,ij,sj->s", 1 + grid, own.gram, 1 + grid) <= own.gram.sum()
        reward, entropy = sure("reward"), sure("entropy")
        found = own.solve(aim="reward", at_least=own.sure("entropy", np.ones(3)))
        fit = inside & (entropy >= own.sure("entropy", np.ones(3)))
        assert own.sure("reward", found) > reward[fit].max() - 1e-6
        assert own.sure("entropy", own.solve(aim="entropy")) > entropy[inside].max() - 1e-6
        alone = replace(own, reward=replace(own.reward, bend=None), entropy=replace(own.entropy, bend=None))
        several += own.sure("reward", alone.solve(aim="reward")) < reward[inside].max() - 1e-6
    assert several > 3, "the curvature matters"


def test_where_nothing_moves_the_reward_the_level_is_kept_all_the_same() -> None:
    """All answers of the probe wrong: the weights are those that keep the entropy, not the step's."""
    own = program(effect(np.zeros(3)), effect(np.array([1.0, -1.0, 0.5])), caution=0.0)
    widest = own.solve(aim="entropy")
    held = own.solve(aim="reward", at_least=1.0, start=widest)
    assert own.sure("entropy", held) >= 1.0 - 1e-6
    assert own.sure("entropy", own.solve(aim="reward", at_least=1.0)) >= 1.0 - 1e-6
    np.testing.assert_array_equal(own.solve(aim="reward"), np.ones(3))
    kept = own.solve(aim="reward", at_least=0.4, start=widest)
    np.testing.assert_array_equal(kept, np.ones(3))
    with pytest.raises(MeasurementError, match="no weights up to 2 change the entropy by 9"):
        own.solve(aim="reward", at_least=9.0)


@pytest.mark.parametrize("caution", [0.0, 1.0])
def test_the_optimum_meets_its_conditions(caution: float) -> None:
    """The gradient is a non-negative combination of those of the constraints at work."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((12, 40)) + 0.3
    own = program(
        effect(rows @ rng.standard_normal(40), folds=16, noise=2.0, seed=2),
        effect(rows @ rng.standard_normal(40), folds=16, noise=2.0, seed=3),
        rows @ rows.T,
        caution=caution,
        most=1.5,
    )
    low, high = (own.sure("entropy", x) for x in (own.solve(aim="reward"), own.solve(aim="entropy")))
    level = 0.4 * low + 0.6 * high
    x = own.solve(at_least=level)

    def slope(function) -> FloatArray:
        step = 1e-6 * np.eye(12)
        return np.array([(function(x + e) - function(x - e)) / 2e-6 for e in step])

    assert own.sure("entropy", x) == pytest.approx(level, abs=1e-5)
    limits = [slope(lambda z: own.sure("entropy", z)), np.zeros(12)]
    if x @ own.gram @ x > own.gram.sum() * (1 - 1e-6):
        limits[1] = -own.gram @ x
    limits += [-e for e, v in zip(np.eye(12), x, strict=True) if v > 1.5 - 1e-6]
    limits += [e for e, v in zip(np.eye(12), x, strict=True) if v < 1e-6]
    aim = slope(lambda z: own.sure("reward", z))
    multipliers, left = nnls(-np.array(limits).T, aim)
    assert left < 2e-3 * np.linalg.norm(aim)
    assert multipliers[0] > 0
    assert 0 < np.count_nonzero((x > 1e-6) & (x < 1.5 - 1e-6)) < 12
    inside = [np.random.default_rng(s).uniform(0, 1.5, 12) for s in range(2000)]
    fit = [z for z in inside if z @ own.gram @ z <= own.gram.sum() and own.sure("entropy", z) >= level]
    assert all(own.sure("reward", z) <= own.sure("reward", x) + 1e-6 for z in fit)


def test_what_is_not_known_to_be_better_is_not_chosen() -> None:
    """Noise alone: with four standard errors of caution the step stays nearly as it is."""
    nothing = np.zeros(6)
    own = program(effect(nothing, folds=30, noise=1.0), effect(nothing, folds=30, noise=1.0, seed=1))
    bold, careful = (replace(own, caution=z).solve(at_least=None) for z in (0.0, 4.0))
    assert np.abs(bold - 1).max() > 0.3
    assert np.abs(careful - 1).max() < 0.05


def test_in_sample_gains_are_too_good_and_those_across_halves_are_not() -> None:
    """Planted: influences of noise alone, 200 times; and a real one, which is found on either half."""
    folds, count = 16, 8
    half = np.arange(folds) % 2
    inside, across, real = [], [], []
    for seed in range(60):
        own = program(
            effect(np.zeros(count), folds=folds, noise=1.0, seed=2 * seed),
            effect(np.zeros(count), folds=folds, noise=1.0, seed=2 * seed + 1),
            caution=0.0,
        )
        for found, kind in (
            (own, (inside, across)),
            (replace(own, reward=_planted(own.reward)), (None, real)),
        ):
            whole = found.solve(aim="reward")
            if kind[0] is not None:
                kind[0].append(found.reward.mean()[1] @ (whole - 1))
            parts = [found.on(half == h).solve(aim="reward") for h in range(2)]
            kind[1].append(np.mean([found.on(half != h).reward.mean()[1] @ (parts[h] - 1) for h in range(2)]))
    error = np.std(across, ddof=1) / np.sqrt(len(across))
    assert abs(np.mean(across)) < 3 * error
    assert np.mean(inside) > 10 * np.std(inside, ddof=1) / np.sqrt(len(inside))
    assert np.mean(real) > 10 * np.std(real, ddof=1) / np.sqrt(len(real))


def _planted(noise: Effect) -> Effect:
    truth = np.where(np.arange(noise.slope.shape[1]) % 2, 3.0, -3.0)
    return replace(noise, slope=noise.slope + truth, own=noise.own + truth.sum())


def test_few_folds_have_no_direction_without_error() -> None:
    """The covariance of 5 folds of 12 influences has rank 4; shrunk to the kernel it has all."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 30))
    K = rows @ rows.T
    noise = rng.standard_normal((5, 30)) @ rows.T
    found = Effect(np.full(5, 0.2), noise.sum(1), noise).covariance(K)
    plain = np.cov(noise.T) / 5
    assert np.linalg.matrix_rank(plain) == 4
    assert np.linalg.eigvalsh(found).min() > 0.05 * np.linalg.eigvalsh(K).min() * np.trace(plain) / np.trace(
        K
    )
    assert np.trace(found) == pytest.approx(np.trace(plain))
    many = rng.standard_normal((4000, 30)) @ rows.T
    large = Effect(np.full(4000, 1 / 4000), many.sum(1), many).covariance(K)
    np.testing.assert_allclose(large, np.cov(many.T) / 4000, atol=0.1 * K.max() / 4000)


def test_units_are_sequences_or_prompts_with_a_part_in_the_step() -> None:
    weighted = np.array([True, False, True, True, False])
    prompts = np.array([0, 0, 1, 1, 2])
    np.testing.assert_array_equal(units_of(weighted, prompts), [0, -1, 1, 2, -1])
    np.testing.assert_array_equal(units_of(weighted, prompts, most=2), [0, -1, 1, 1, -1])
    np.testing.assert_array_equal(members(np.array([0, -1, 1, 1])), [[1, 0, 0, 0], [0, 0, 1, 1]])
    own = program(effect(np.ones(2)), effect(np.ones(2)))
    spread = replace(own, units=units_of(weighted, prompts, most=2)).spread(np.array([0.5, 2.0]))
    np.testing.assert_array_equal(spread, [0.5, 1, 2, 2, 1])
