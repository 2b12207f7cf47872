"""The second-order kernel against enumeration, against the second-order change, and its shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, shifted_model
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.curvature.pairs import Folded, PairKernel, PairOptions, make_rows, second_order_kernel
from stepscope.measure.curvature.structure import pair_report, row_sums
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.probe import bind_quantity, probe_values
from stepscope.measure.quantity.values import values_at
from stepscope.measure.step.reconstruct import Step, sequence_direction, weighted_logprobs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.reference import exact_fisher, exact_hessian, exact_rollouts, sample_exact
from stepscope.results import FloatArray, Rollouts


def made_step(policy: Policy, rollouts: Rollouts, probabilities: FloatArray, *, prompts: int = 3) -> Step:
    """A step of random token weights, preconditioner and momentum on a sampled batch."""
    update, _ = sample_exact(rollouts, probabilities, num_prompts=prompts, group_size=2, seed=5)
    rng = np.random.default_rng(0)
    weights = tuple(rng.standard_normal(n) for n in update.num_tokens)
    generator = torch.Generator().manual_seed(1)

    def random(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    P = {n: random(p) + 0.1 for n, p in policy.parameters.items()}
    parts = {
        name: {n: 0.3 * (random(p) - 0.5) for n, p in policy.parameters.items()}
        for name in ("momentum", "decay")
    }
    ascent = gradient(policy, update, weighted_logprobs(weights))
    return Step(
        components=parts | {"sequences": {n: P[n] * ascent[n] for n in P}},
        preconditioner=P,
        ascent=ascent,
        token_weights=weights,
        lr=1e-3,
        grad_norm=1.0,
        clip_coefficient=1.0,
        update=update,
    )


def elements(policy: Policy, step: Step) -> list[dict[str, torch.Tensor]]:
    own = [sequence_direction(policy, step, i) for i in range(len(step.update))]
    return [*own, *(part for name, part in step.components.items() if name != "sequences")]


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [
        ("qwen2", False),
        ("llama", True),
        *(pytest.param(a, False, marks=pytest.mark.slow) for a in ("gpt2", "gemma3", "mixtral", "qwen3")),
    ],
)
def test_in_the_limit_every_entry_is_exact(architecture: str, lora: bool) -> None:
    policy = enumerable_policy(architecture, lora=lora)
    reference = shifted_model(policy)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    step = made_step(policy, rollouts, probabilities)
    along = elements(policy, step)
    square = exact_fisher(policy, rollouts, probabilities, along)
    signs = {"entropy": -1, "kl": 1}
    for name, form in (
        ("entropy", {}),
        ("entropy", {"normalisation": "per_seq"}),
        ("reward", {"normalisation": "per_seq"}),
        ("logprob", {"version": "fixed_prefix"}),
        ("logprob", {"version": "fixed_prefix", "normalisation": "per_seq"}),
        ("kl", {}),
    ):
        chosen = make_quantity(name, rollouts, policy=policy, reference=reference, **form)
        values = values_at(policy, rollouts, (chosen,)).quantity(0)
        probe = probe_values(chosen, values, rollouts, probabilities)
        found = second_order_kernel(policy, step, rollouts, quantity=probe, budget=Budget(max_sequences=128))
        which = {"normalisation": chosen.normalisation, "version": chosen.version, "reference": reference}
        expected = exact_hessian(policy, rollouts, name, along, **which)
        number = len(step.update)
        rows = np.concatenate([found.whole.value[found.rows.single], found.whole.value[found.rows.parts]])
        tolerance = 1e-9 * max(1.0, abs(expected).max())
        np.testing.assert_allclose(rows, expected, rtol=1e-9, atol=tolerance, err_msg=f"{name} {form}")
        by_prompt = found.whole.value[found.rows.prompts]
        np.testing.assert_allclose(
            by_prompt, found.rows.weights[found.rows.prompts] @ expected, rtol=1e-9, atol=tolerance
        )
        assert rows.shape == (number + 2, number + 2)
        sign = signs.get(name, -1 if name == "logprob" else 0)
        if not sign:
            assert found.fisher is None
            continue
        assert found.fisher is not None
        own = sign * square / (probe.mean_length if chosen.per_token else 1.0)
        fisher = np.concatenate([found.fisher.value[found.rows.single], found.fisher.value[found.rows.parts]])
        np.testing.assert_allclose(fisher, own, rtol=1e-9, atol=1e-9 * abs(own).max())


def kernel_of(
    policy: Policy, step: Step, sample: Rollouts, name: str, form: dict[str, Any], **options: Any
) -> tuple[PairKernel, Any]:
    chosen = make_quantity(name, sample, policy=policy, **form)
    probe = bind_quantity(policy, sample, chosen, direction=step.direction, baseline="position")
    found = second_order_kernel(
        policy, step, sample, quantity=probe, options=PairOptions(**options), budget=Budget(max_sequences=64)
    )
    change = measure_change(
        policy,
        step,
        sample,
        quantity=chosen,
        lrs=[1e-3],
        options=ChangeOptions(baseline="position", second_order=True),
    )
    return found, change


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("entropy", {}),
        ("entropy", {"normalisation": "per_seq"}),
        ("entropy", {"version": "fixed_prefix"}),
        ("reward", {}),
    ],
)
def test_all_pairs_add_up_to_the_second_order_change_with_its_error(name: str, form: dict[str, Any]) -> None:
    """On the same samples: value and clustered error, a fold for each prompt; slopes to the linear one."""
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    step = made_step(policy, rollouts, probabilities)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=12, group_size=2, seed=2)
    found, change = kernel_of(policy, step, sample, name, form)
    every = [*range(found.rows.prompts.stop), *range(found.rows.parts.start, found.rows.parts.stop)]
    total = found.whole.value[every].sum()
    assert total == pytest.approx(change.curvature.value, rel=1e-9)
    sums = found.whole.sums[:, every].sum((1, 2))
    assert len(sums) == 12
    assert np.sqrt(12 / 11 * (sums**2).sum()) == pytest.approx(change.curvature.stderr, rel=1e-9)
    assert found.slopes.sum() == pytest.approx(change.slope.value, rel=1e-9)
    slope_sums = found.slope_sums.sum(1)
    assert np.sqrt(12 / 11 * (slope_sums**2).sum()) == pytest.approx(change.slope.stderr, rel=1e-9)
    np.testing.assert_allclose(found.whole.sums.sum(0), 0, atol=1e-9 * abs(found.whole.value).max())
    square = found.whole.value[found.rows.single][:, : len(step.update)]
    np.testing.assert_allclose(square, square.T, atol=1e-9 * abs(square).max())


def test_rows_of_prompts_alone_and_memory_for_few_change_nothing() -> None:
    """Sequences without a part in the step have rows of zeros; whole prompts the same ones, to the bit."""
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    step = made_step(policy, rollouts, probabilities)
    dead = [2, 3, 4]
    weights = tuple(0 * w if i in dead else w for i, w in enumerate(step.token_weights))
    step = replace(step, token_weights=weights)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=3, group_size=2, seed=2)
    probe = bind_quantity(policy, sample, "entropy", direction=step.direction, baseline="position")

    def made(memory: int = 2**30, **options: Any) -> PairKernel:
        sizes = Budget(max_sequences=64, memory_bytes=memory)
        return second_order_kernel(
            policy, step, sample, quantity=probe, options=PairOptions(**options), budget=sizes
        )

    whole, signs, alone = made(), made(sketches=2), made(sketches=0)
    assert not whole.whole.value[whole.rows.single][dead].any()
    assert not whole.whole.value[whole.rows.prompts][1].any()
    assert not whole.whole.value[:, dead].any()
    assert not whole.slopes[dead].any()
    for rows in ("prompts", "parts"):
        own = alone.whole.value[getattr(alone.rows, rows)]
        assert (own == signs.whole.value[getattr(signs.rows, rows)]).all()
        np.testing.assert_allclose(own, whole.whole.value[getattr(whole.rows, rows)], rtol=1e-9, atol=1e-9)
    assert (alone.slope_sums == signs.slope_sums).all()
    few = made(memory=40_000)
    np.testing.assert_allclose(few.whole.value, whole.whole.value, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(few.whole.sums, whole.whole.sums, rtol=1e-9, atol=1e-9)
    report = pair_report(alone)
    assert report.whole.total.value == pytest.approx(pair_report(whole).whole.total.value, rel=1e-9)
    assert not report.whole.diagonal.reliable
    assert "prompts alone have rows" in report.whole.same_prompt.reason
    assert report.squares == {}
    assert "Whole prompts have rows" in alone._repr_html_()
    with pytest.raises(MeasurementError, match="1 sketches and 16 folds; give 0 sketches"):
        PairOptions(sketches=1)


def kernel_from(
    each: FloatArray, prompts: list[int], *, parts: int = 1, sketches: int | None = None, seed: int = 0
) -> PairKernel:
    """The kernel whose folds are (fold, element, element) matrices."""
    index = np.array(prompts)
    rows = make_rows(index, parts, sketches, seed)
    mean = each.mean(0)
    sums = (each - mean) / len(each)
    return PairKernel(
        quantity="entropy",
        normalisation="per_seq",
        version="on_policy",
        unit="nats/sequence",
        rows=rows,
        whole=Folded(rows.weights @ mean, rows.weights @ sums),
        fisher=None,
        slopes=np.zeros(len(mean)),
        slope_sums=np.zeros((len(each), len(mean))),
        prompts=index,
        parts=("momentum",) * parts,
        enumerated=False,
    )


def drawn(folds: int, count: int, noise: float, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """A symmetric kernel and noisy folds of it."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((count, count))
    truth = truth + truth.T
    draws = rng.standard_normal((folds, count, count))
    return truth, truth + noise * (draws + draws.transpose(0, 2, 1))


def test_sums_over_kinds_of_pairs_are_those_of_the_matrix() -> None:
    each = drawn(10, 9, 0.1)[1]
    found = pair_report(kernel_from(each, [0, 0, 0, 1, 1, 2, 2, 2]))
    mean, same = each.mean(0), np.zeros((8, 8), dtype=bool)
    for members in ((0, 1, 2), (3, 4), (5, 6, 7)):
        same[np.ix_(members, members)] = True
    own = np.eye(8, dtype=bool)
    batch = mean[:8, :8]
    for kind, expected in {
        "diagonal": batch[own].sum(),
        "same_prompt": batch[same & ~own].sum(),
        "different_prompts": batch[~same].sum(),
        "batch": batch.sum(),
        "batch_with_parts": 2 * mean[8, :8].sum(),
        "parts": mean[8, 8],
        "total": mean.sum(),
    }.items():
        assert getattr(found.whole, kind).value == pytest.approx(expected, rel=1e-12), kind
    totals = each.sum((1, 2))
    assert found.whole.total.stderr == pytest.approx(totals.std(ddof=1) / np.sqrt(10), rel=1e-9)
    sums, errors = row_sums(kernel_from(each, [0, 0, 0, 1, 1, 2, 2, 2]))
    np.testing.assert_allclose(sums, mean.sum(0))
    np.testing.assert_allclose(errors, each.sum(1).std(0, ddof=1) / np.sqrt(10))


def test_signs_give_the_diagonal_within_their_error_and_sums_over_prompts_exactly() -> None:
    truth, each = drawn(8, 13, 0.0, seed=3)
    prompts = [0] * 4 + [1] * 4 + [2] * 4
    whole = pair_report(kernel_from(each, prompts))
    misses = []
    for seed in range(200):
        found = pair_report(kernel_from(each, prompts, sketches=6, seed=seed))
        assert found.num_sketches == 6
        assert found.spectrum.level == "prompts"
        for kind in ("batch", "different_prompts", "batch_with_parts", "total"):
            assert getattr(found.whole, kind).value == pytest.approx(
                getattr(whole.whole, kind).value, rel=1e-9
            )
        gap = found.whole.diagonal.value - whole.whole.diagonal.value
        misses.append([gap, found.whole.diagonal.stderr, found.squares["all"].value])
        assert found.whole.same_prompt.value == pytest.approx(whole.whole.same_prompt.value - gap, rel=1e-6)
    gaps, errors, squares = np.array(misses).T
    assert abs(gaps.mean()) < 4 * gaps.std() / np.sqrt(200)
    assert np.sqrt((errors**2).mean()) == pytest.approx(gaps.std(), rel=0.15)
    assert squares.mean() == pytest.approx((truth[:12, :12] ** 2).sum(), rel=0.05)


def test_noise_is_told_from_the_kernel() -> None:
    """Squares without bias, the share of noise with the error it has, eigenvalues that do not fit noise."""
    squares, shares, errors, held = [], [], [], []
    truth = drawn(1, 9, 0.0)[0]
    for seed in range(60):
        noise = np.random.default_rng([7, seed]).standard_normal((16, 9, 9))
        each = truth + 3.0 * (noise + noise.transpose(0, 2, 1))
        found = pair_report(kernel_from(each, [0, 0, 1, 1, 2, 2, 3, 3]))
        squares.append(found.squares["all"].value)
        shares.append(found.noise.value)
        errors.append(found.noise.stderr)
        held.append(found.spectrum.held_out[0] / found.spectrum.eigenvalues[0])
    exact = (truth[:8, :8] ** 2).sum()
    level = 9.0 * (2 * 64 + 2 * 8) / 16  # variance 2 off the diagonal and 4 on it
    assert np.mean(squares) == pytest.approx(exact, abs=4 * np.std(squares) / np.sqrt(60))
    assert np.mean(shares) == pytest.approx(level / (level + exact), rel=0.15)
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.5)
    assert 0.3 < np.mean(held) < 0.95, "the largest eigenvalue is partly noise"


def test_an_optimizer_without_a_metric_is_refused() -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    step = replace(made_step(policy, rollouts, probabilities), preconditioner=None)
    with pytest.raises(MeasurementError, match="has no preconditioner"):
        second_order_kernel(policy, step, rollouts)
