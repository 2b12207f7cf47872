"""The entropy law: known a and b come back, intervals cover, scatter and bad points are told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stepscope.errors import MeasurementError
from stepscope.evaluation.entropy_law import EntropyLaw, fit_entropy_law, fit_run
from stepscope.results import FloatArray

A, B = 0.3, 1.1


def points(
    rng: np.random.Generator, count: int = 12, *, shared: float = 0.0, scatter: float = 0.0
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """H and R of checkpoints on the law with errors: own ones, correlated, and one that all R share."""
    truth = np.linspace(0.9, 0.1, count)
    own = np.array([[0.02**2, -0.5 * 0.02 * 0.03], [-0.5 * 0.02 * 0.03, 0.03**2]])
    C = np.kron(own, np.eye(count))
    C[count:, count:] += shared**2
    exact = np.concatenate([truth, B - A * np.exp(truth) + scatter * rng.standard_normal(count)])
    z = rng.multivariate_normal(exact, C)
    return z[:count], z[count:], C


def test_points_on_the_law_give_the_law() -> None:
    H = np.linspace(0.8, 0.1, 9)
    law = fit_entropy_law(H, B - A * np.exp(H), 1e-6 * np.eye(18))
    assert law.a.value == pytest.approx(A, abs=1e-6)
    assert law.b.value == pytest.approx(B, abs=1e-6)
    assert law.ceiling.value == pytest.approx(B - A, abs=1e-6)
    assert (law.scatter, law.r2) == (0.0, pytest.approx(1))
    assert law.prediction is not None
    assert law.prediction.rmse.value == pytest.approx(0, abs=1e-6)
    assert law.prediction.noise == pytest.approx(1e-3)
    assert law.p_value > 0.99


def test_without_errors_in_entropy_it_is_weighted_least_squares() -> None:
    rng = np.random.default_rng(1)
    H, sd = np.linspace(0.8, 0.1, 8), rng.uniform(0.01, 0.03, 8)
    R = B - A * np.exp(H) + sd * rng.standard_normal(8)
    law = fit_entropy_law(H, R, np.diag(np.r_[np.zeros(8), sd**2]))
    design = np.column_stack([-np.exp(H), np.ones(8)]) / sd[:, None]
    expected, *_ = np.linalg.lstsq(design, R / sd, rcond=None)
    covariance = np.linalg.inv(design.T @ design)
    assert law.scatter == 0
    assert [law.a.value, law.b.value] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(law.covariance, covariance, rtol=1e-4)
    assert law.ceiling.stderr == pytest.approx(
        math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]), rel=1e-4
    )


@pytest.mark.parametrize(("shared", "scatter"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.05)])
def test_intervals_cover_the_truth(shared: float, scatter: float) -> None:
    """Bias below the error of the mean; claimed errors as large as the scatter over repeats; coverage."""
    rng = np.random.default_rng(7)
    laws = [fit_entropy_law(*points(rng, shared=shared, scatter=scatter)) for _ in range(60)]
    for name, truth in (("a", A), ("b", B), ("ceiling", B - A)):
        values = np.array([getattr(law, name).value for law in laws])
        errors = np.array([getattr(law, name).stderr for law in laws])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(60) + 0.01 * truth, name
        assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.3), name
        assert np.mean(np.abs(values - truth) < 1.96 * errors) > 0.85, name
    found = np.mean([law.scatter for law in laws])
    assert found == pytest.approx(scatter, rel=0.3) if scatter else found < 0.01
    doubted = np.mean([law.p_value < 0.01 for law in laws])
    assert doubted < 0.05 if not scatter else doubted > 0.2


def test_errors_of_the_prediction_match_the_scatter_over_repeats() -> None:
    rng = np.random.default_rng(8)
    H = np.linspace(1.2, 0.1, 20)
    C = np.diag(np.r_[np.full(20, 0.002**2), np.full(20, 0.004**2)])
    laws = []
    for _ in range(40):
        z = rng.multivariate_normal(np.r_[H, B - A * np.exp(H)], C)
        laws.append(fit_entropy_law(z[:20], z[20:], C))
    finals = [law.prediction.final_error for law in laws if law.prediction]
    assert len(finals) == 40
    assert all(law.prediction.fitted == 3 and law.prediction.rmse.reliable for law in laws if law.prediction)
    spread = np.std([f.value for f in finals])
    assert np.sqrt(np.mean([f.stderr**2 for f in finals])) == pytest.approx(spread, rel=0.35)
    law = laws[0]
    late = np.array(law.prediction.predicted) - np.array(law.performance[3:])
    assert law.prediction.rmse.value == pytest.approx(np.sqrt((late**2).mean()))


def run(rng: np.random.Generator, *, checkpoints: int = 7, prompts: int = 96) -> EntropyLaw:
    """Prompts of different difficulty, the same at every checkpoint, eight samples each."""
    H = np.linspace(0.8, 0.2, checkpoints)
    skill = rng.uniform(0.6, 1.4, prompts)
    p = np.clip((B - A * np.exp(H))[:, None] * skill, 0, 1)
    tokens = rng.poisson(160, (checkpoints, prompts)).astype(float)
    entropy = tokens * H[:, None] * (1.5 - 0.5 * skill)
    return fit_run(
        range(0, 10 * checkpoints, 10), entropy, tokens, rng.binomial(8, p) / 8, bootstrap_resamples=300
    )


def test_prompts_that_checkpoints_share() -> None:
    rng = np.random.default_rng(9)
    laws = [run(rng) for _ in range(30)]
    for name in ("a", "ceiling"):
        values = [getattr(law, name).value for law in laws]
        claimed = np.sqrt(np.mean([getattr(law, name).stderr ** 2 for law in laws]))
        assert claimed == pytest.approx(np.std(values, ddof=1), rel=0.35), name
        widths = [law.intervals[name][1] - law.intervals[name][0] for law in laws]
        assert np.mean(widths) / (2 * 1.96) == pytest.approx(claimed, rel=0.35), name
    law = laws[0]
    assert law.steps == (0, 10, 20, 30, 40, 50, 60)
    assert law.prediction is not None
    assert law.prediction.fitted == 3
    assert "15% of 7 checkpoints are too few" in law.prediction.rmse.reason
    assert EntropyLaw.from_json(law.to_json(), "given").to_json() == law.to_json()


def test_a_checkpoint_that_solves_nothing_has_an_error() -> None:
    rng = np.random.default_rng(2)
    entropy = rng.uniform(0.5, 0.6, (4, 20)) * np.array([[4.0], [3], [2], [1]])
    solved = rng.integers(0, 2, (4, 20)).astype(float)
    solved[0] = 0
    law = fit_run(range(4), entropy, np.ones((4, 20)), solved)
    assert law.performance_stderr[0] == pytest.approx(1 / 20)


def test_points_off_the_law_and_a_flat_run_are_flagged() -> None:
    H = np.linspace(0.8, 0.1, 8)
    bent = fit_entropy_law(H, 0.5 + 0.3 * np.sin(9 * H), 1e-6 * np.eye(16))
    assert not bent.ceiling.reliable
    assert "scatter about the law" in bent.ceiling.reason
    flat = fit_entropy_law(H, 0.5 + 0.001 * (-1.0) ** np.arange(8), 1e-4 * np.eye(16))
    assert "not resolved from zero" in flat.a.reason


def test_too_few_points_are_refused() -> None:
    with pytest.raises(MeasurementError, match="2 points"):
        fit_entropy_law([0.5, 0.4], [0.1, 0.2], np.eye(4))
    with pytest.raises(MeasurementError, match="1 distinct"):
        fit_entropy_law([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], np.eye(6))
    with pytest.raises(MeasurementError, match="no error at all"):
        fit_entropy_law([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], np.zeros((6, 6)))
