"""Best learning rate and batch size: against quadratics in closed form, and against enumerated changes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from test_curvature import made_step

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy
from stepscope.errors import MeasurementError
from stepscope.measure.curvature.best_step import best_step, fieller
from stepscope.measure.curvature.pairs import Folded, PairKernel, PairOptions, make_rows, second_order_kernel
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import values_at
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.policy.gradients.products import group_gradients
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.reference import exact_change, exact_rollouts
from stepscope.results import FloatArray
from stepscope.results.best_step import BestStep

DIM, PROMPTS_PER_BATCH, FOLDS = 6, 24, 16


def quadratic(seed: int, *, bend: float = -1.0, signal: float = 1.0, probe_noise: float = 0.3) -> PairKernel:
    """The kernel of q'x + x'Hx/2 from one batch of groups and a noisy probe."""
    H, q, G, scale, r = truth(bend, signal)
    rng = np.random.default_rng([1, seed])
    groups = G + rng.standard_normal((PROMPTS_PER_BATCH, DIM)) * scale
    V = np.concatenate([groups / PROMPTS_PER_BATCH, r[None]])
    noise = rng.standard_normal((FOLDS, DIM, DIM))
    H_f = H + probe_noise * (noise + noise.transpose(0, 2, 1)) / math.sqrt(2)
    q_f = q + probe_noise * rng.standard_normal((FOLDS, DIM))
    index = np.arange(PROMPTS_PER_BATCH)
    rows = make_rows(index, 1, None, 0)
    each = np.einsum("rd,fde,ve->frv", rows.weights @ V, H_f, V)
    slopes = q_f @ V.T
    return PairKernel(
        quantity="reward",
        normalisation="per_seq",
        version="on_policy",
        unit="reward/sequence",
        rows=rows,
        whole=Folded(each.mean(0), (each - each.mean(0)) / FOLDS),
        fisher=None,
        slopes=slopes.mean(0),
        slope_sums=(slopes - slopes.mean(0)) / FOLDS,
        prompts=index,
        parts=("momentum",),
        enumerated=False,
    )


def truth(bend: float, signal: float) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """H, q, G, standard deviations of a group along each axis, and what does not answer to the batch."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((DIM, DIM))
    H = bend * (A @ A.T + np.eye(DIM))
    G = signal * np.abs(rng.standard_normal(DIM))
    q = G + 0.3 * rng.standard_normal(DIM)
    return H, q, G, 0.5 + rng.random(DIM), 0.5 * G


def test_terms_have_no_bias_and_their_intervals_cover() -> None:
    H, q, G, scale, r = truth(-1.0, 1.0)
    u = G + r
    noise = float(np.diag(H) @ scale**2)
    expected = {
        "slope": q @ G,
        "curvature": G @ H @ G,
        "noise": noise,
        "noise_batch": noise / (G @ H @ G),
        "lr_limit": -(q @ G) / (G @ H @ G),
        "whole slope": q @ u,
        "whole curvature": u @ H @ u,
        "lr at 8": -(q @ G) / (G @ H @ G + noise / 8),
        "gain at 8": -((q @ G) ** 2) / (2 * (G @ H @ G + noise / 8)),
        "whole lr at 8": -(q @ u) / (u @ H @ u + noise / 8),
        "cross": 2 * r @ H @ G,
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in expected}
    for seed in range(200):
        made = best_step(quadratic(seed), lr=1e-3, run_prompts=8)
        row = next(row for row in made.rows if row.prompts == 8)
        for name, value in {
            "slope": made.batch.slope,
            "curvature": made.batch.curvature,
            "noise": made.batch.noise,
            "noise_batch": made.batch.noise_batch,
            "lr_limit": made.batch.lr_limit,
            "whole slope": made.whole.slope,
            "whole curvature": made.whole.curvature,
            "lr at 8": row.lr,
            "gain at 8": row.gain,
            "whole lr at 8": row.lr_whole,
            "cross": made.of_parts["cross"],
        }.items():
            found[name].append((value.value, value.low, value.high))
    for name, true in expected.items():
        values, low, high = np.array(found[name]).T
        if name in ("slope", "curvature", "noise", "whole slope", "whole curvature", "cross"):
            assert values.mean() == pytest.approx(true, abs=4 * values.std() / math.sqrt(200)), name
        covered = np.mean((low <= true) & (true <= high))
        assert covered > 0.88, f"{name}: {covered}"


def test_where_second_order_is_not_resolved_there_is_no_optimum() -> None:
    flat = [best_step(quadratic(s, probe_noise=40.0), lr=1e-3, run_prompts=8) for s in range(40)]
    none = [made for made in flat if not made.batch.lr_limit.reliable]
    assert len(none) > 30
    for made in none:
        assert math.isnan(made.batch.lr_limit.value)
        assert "not resolved" in made.batch.lr_limit.reason or "goes the way" in made.batch.lr_limit.reason
        assert made.advice.startswith("No best learning rate for reward")
    wrong = best_step(quadratic(0, bend=1.0), lr=1e-3, run_prompts=8)
    assert "second order goes the way of the first" in wrong.batch.lr_limit.reason
    assert math.isnan(wrong.rows[0].gain.value)


def test_advice_says_what_the_formulas_say() -> None:
    made = best_step(quadratic(0), lr=1e-3, run_prompts=8)
    scale, limit = made.batch.noise_batch.value, made.batch.lr_limit.value
    rows = {row.prompts: row for row in made.rows}
    assert rows[16].lr.value / rows[8].lr.value == pytest.approx((1 + scale / 8) / (1 + scale / 16))
    assert rows[1024].lr.value == pytest.approx(limit / (1 + scale / 1024))
    assert f"admits {rows[16].lr.value / rows[8].lr.value:.2f} times the learning rate" in made.advice
    assert f"beyond {19 * scale:.0f} prompts" in made.advice
    gains = [row.gain.value for row in made.rows]
    assert gains == sorted(gains), "a larger batch does not less"


def with_noise_batch(made: BestStep, value: float, low: float, high: float) -> BestStep:
    """The prediction with another batch at which noise and curvature are equal."""
    scale = replace(made.batch.noise_batch, value=value, low=low, high=high)
    return replace(made, batch=replace(made.batch, noise_batch=scale))


def test_advice_where_noise_is_not_against_the_step_or_the_limit_is_not_known() -> None:
    made = best_step(quadratic(0), lr=1e-3, run_prompts=8)
    assert "noise takes nothing of it" in with_noise_batch(made, -3.0, -5.0, -1.0).advice
    unsure = with_noise_batch(made, -6.0, -20.0, 8.0).advice
    assert "admits 1.00 times the learning rate (1.00 to 1.33); beyond 0 prompts (0 to 152)" in unsure
    limit = replace(made.batch.lr_limit, value=math.nan, reliable=False, reason="curvature not resolved")
    row = next(row for row in made.rows if row.prompts == 8)
    noisy = replace(made, batch=replace(made.batch, lr_limit=limit))
    said = f"a batch of 8 prompts raises reward most at learning rate {row.lr.value:.2g} ({row.lr.low:.2g} to"
    assert said in noisy.advice
    assert noisy.advice.endswith("what a larger one admits: curvature not resolved.")
    kernel = quadratic(0, bend=1.0)
    falling = best_step(replace(kernel, slopes=-kernel.slopes), lr=1e-3, run_prompts=8)
    assert falling.rows[0].gain.value < 0
    assert "an infinite batch lowers reward most at learning rate" in falling.advice
    nothing = replace(noisy, rows=tuple(replace(r, lr=limit) for r in made.rows))
    assert nothing.advice == "No best learning rate for reward: curvature not resolved."


def test_its_figures_have_the_rows_their_intervals_and_the_run() -> None:
    made = best_step(quadratic(0), lr=1e-3, run_prompts=8)
    rates, gains = made.plot(), made.plot("best-gain-reward")
    batch, whole, own = rates.data
    assert list(batch.x) == [row.prompts for row in made.rows]
    assert list(batch.y) == pytest.approx([row.lr.value for row in made.rows], rel=1e-4)
    assert list(whole.y) == pytest.approx([row.lr_whole.value for row in made.rows], rel=1e-4)
    low = [row.lr.value - row.lr.low for row in made.rows]
    assert list(batch.error_y.arrayminus) == pytest.approx(low, rel=1e-3)
    assert (own.name, list(own.x), list(own.y)) == ("this run", [8], [1e-3])
    assert list(gains.data[0].y) == pytest.approx([row.gain.value for row in made.rows], rel=1e-4)
    assert gains.layout.yaxis.title.text == "change, reward/sequence"
    half = replace(made.rows[0].lr, value=math.nan, stderr=math.nan, low=2e-3, high=math.inf, reliable=False)
    known = [replace(row, lr=half) if row.prompts == 4 else row for row in made.rows]
    marks = {trace.name: trace for trace in replace(made, rows=tuple(known)).plot().data}
    assert list(marks["at least, batch's part of the step"].x) == [4]
    assert list(marks["at least, batch's part of the step"].y) == [2e-3]
    wrong = best_step(quadratic(0, bend=1.0), lr=1e-3, run_prompts=8)
    with pytest.raises(MeasurementError, match="Best step for reward: nothing in it can be drawn"):
        wrong.plot()
    assert "goes the way of the first" in wrong._repr_html_()


def test_limits_of_a_quotient() -> None:
    plain = np.array([[0.04, 0.0], [0.0, 0.01]])
    low, high, resolved = fieller(2.0, 1.0, plain, 2.0)
    assert resolved
    for x in (low, high):
        assert (2.0 - x) ** 2 == pytest.approx(4.0 * (0.04 + 0.01 * x**2))
    low, high, resolved = fieller(2.0, 0.1, plain, 2.0)
    assert not resolved
    assert low == pytest.approx(2.0 / 0.1 / 2.9, rel=0.3)
    assert high == np.inf
    assert fieller(0.1, 0.1, plain, 2.0) == (-np.inf, np.inf, False)
    assert fieller(-2.0, 0.1, plain, 2.0)[0] == -np.inf


def test_the_expected_change_of_a_batch_is_the_predicted_one() -> None:
    """True changes by steps of B groups on an enumerated policy against the expansion."""
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    chosen = make_quantity("reward", rollouts, normalisation="per_seq")
    values = values_at(policy, rollouts, (chosen,)).quantity(0)
    probe = probe_values(chosen, values, rollouts, probabilities)
    step = made_step(policy, rollouts, probabilities, prompts=160)
    update = step.update
    centred = update.rewards - 0.3
    weights = tuple(np.full(n, centred[i] / len(update)) for i, n in enumerate(update.num_tokens))
    object.__setattr__(step, "token_weights", weights)
    made = best_step(
        second_order_kernel(
            policy,
            step,
            rollouts,
            quantity=probe,
            options=PairOptions(sketches=2, num_folds=2),
            budget=Budget(max_sequences=128),
        ),
        lr=1e-3,
        run_prompts=4,
    )
    assert isinstance(made, BestStep)
    terms, B = made.batch, 4
    lr = 0.5 * terms.slope.value / abs(terms.curvature.value + terms.noise.value / B)
    own = SequenceGradients(update, weighted_logprobs(weights))
    groups = group_gradients(policy, own, update.prompt_index)
    rng = np.random.default_rng(0)
    changes, odd = [], []
    for _ in range(100):
        some = rng.choice(160, B, replace=False)
        direction = {n: step.metric()[n] * t[some].sum(0) * 160 / B for n, t in groups.items()}
        there, back = (
            exact_change(policy, rollouts, "reward", direction, sign * lr, normalisation="per_seq")
            for sign in (1, -1)
        )
        changes.append((there + back) / 2)
        odd.append((there - back) / 2)
    second = lr**2 / 2 * (terms.curvature.value + terms.noise.value / B)
    error = np.std(changes) / math.sqrt(100)
    assert np.mean(changes) == pytest.approx(second, abs=4 * error + 0.05 * abs(second))
    first = lr * terms.slope.value
    assert np.mean(odd) == pytest.approx(first, abs=4 * np.std(odd) / math.sqrt(100) + 0.05 * abs(first))
    assert abs(second) > 5 * error, "the test sees what it tests"
