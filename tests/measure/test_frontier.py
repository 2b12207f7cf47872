"""The frontier: predictions against derivatives and enumeration, steps taken with the weights it chose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_curvature import elements, made_step

import cases
from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.criteria.remade import RemadeSteps
from stepscope.measure.curvature.pairs import PairOptions, second_order_kernel
from stepscope.measure.frontier import curve
from stepscope.measure.frontier.curve import FrontierOptions, frontier, halves
from stepscope.measure.frontier.effects import QUANTITIES, first_order, second_order
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.probe import bind_quantity, probe_values
from stepscope.measure.quantity.values import values_at
from stepscope.measure.step.reconstruct import assemble_step, weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.reference import exact_derivatives, exact_rollouts
from stepscope.report.units import unit_for
from stepscope.results.frontier import Frontier
from stepscope.rules.program import Effect, Program


@pytest.fixture(scope="module")
def case():
    """A policy whose second moment one batch hardly moves and whose gradient is not clipped."""
    policy = cases.policy()
    state = policy.optimizer
    slow = replace(
        state,
        steps=dict.fromkeys(state.steps, 10_000),
        exp_avg_sq={n: 1e3 * v for n, v in state.exp_avg_sq.items()},
    )
    policy = replace(policy, optimizer=slow, settings=replace(policy.settings, max_grad_norm=0.0))
    update = cases.batch(policy, num_prompts=3, group_size=3)
    made = cases.step(policy, num_prompts=3, group_size=3)
    weights = list(made.token_weights)
    weights[4] = np.zeros_like(weights[4])
    ascent = gradient(policy, update, weighted_logprobs(weights))
    step = assemble_step(policy, update, weights, ascent, {})
    return policy, step, cases.batch(policy, num_prompts=12, group_size=2, seed=9)


def bound_on(policy, step, probe, baseline="none"):
    return [
        bind_quantity(
            policy,
            probe,
            make_quantity(name, probe, normalisation=form),
            direction=step.direction,
            baseline=baseline,
        )
        for name, form in QUANTITIES
    ]


def reweighted(policy, step, x):
    """The direction with weights, preconditioner and clip coefficient held."""
    weights = [f * w for f, w in zip(x, step.token_weights, strict=True)]
    own = gradient(policy, step.update, weighted_logprobs(weights))
    rest = [part for name, part in step.components.items() if name != "sequences"]
    return replace(
        step, components={"rest": vectors.add(*rest), "sequences": vectors.multiply(step.metric(), own)}
    )


def test_to_first_order_it_is_the_slope_of_the_reweighted_step(case):
    """Against forward-mode derivatives along that step, with their clustered error; K against its length."""
    policy, step, probe = case
    program, folds = first_order(policy, step, probe, bound_on(policy, step, probe), lr=1e-3)
    assert len(folds.shares) == 12
    assert list(program.units) == [0, 1, 2, 3, -1, 4, 5, 6, 7]
    x = np.random.default_rng(0).uniform(0, 2, 8)
    other = reweighted(policy, step, program.spread(x))
    for effect, (name, form) in zip((program.reward, program.entropy), QUANTITIES, strict=True):
        quantity = make_quantity(name, probe, normalisation=form)
        how = {"quantity": quantity, "lrs": [1e-3], "options": ChangeOptions(baseline="none")}
        slope = measure_change(policy, other, probe, **how).at(1e-3).linear
        by_fold = effect.own + effect.gain(x - 1)
        assert effect.shares @ by_fold == pytest.approx(slope.value, rel=1e-8)
        away = effect.shares * (by_fold - effect.shares @ by_fold)
        assert np.sqrt(12 / 11 * (away**2).sum()) == pytest.approx(slope.stderr, rel=1e-8)
    sequences = other.components["sequences"]
    P = step.metric()
    length = sum(float((t**2 / P[n]).sum()) for n, t in sequences.items())
    assert x @ program.gram @ x == pytest.approx(length, rel=1e-8)


def test_to_second_order_it_is_exact_where_all_responses_are_enumerated():
    """Slope and curvature of every quantity along the reweighted step, sequences and prompts, to 1e-9."""
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    step = made_step(policy, rollouts, probabilities)
    along = elements(policy, step)
    lr = 1e-2
    for sketches in (None, 2):
        kernels = []
        for name, form in QUANTITIES:
            quantity = make_quantity(name, rollouts, normalisation=form)
            values = values_at(policy, rollouts, (quantity,)).quantity(0)
            probe = probe_values(quantity, values, rollouts, probabilities)
            kernels.append(
                second_order_kernel(
                    policy, step, rollouts, quantity=probe, options=PairOptions(sketches=sketches)
                )
            )
        program, _ = second_order(policy, step, rollouts, kernels, lr=lr)
        assert len(program.gram) == (len(step.update) if sketches is None else step.update.num_prompts)
        x = np.random.default_rng(1).uniform(0, 2, len(program.gram))
        spread = program.spread(x)
        factors = [*spread, 1.0, 1.0]
        direction = vectors.add(*(vectors.scale(v, f) for f, v in zip(factors, along, strict=True)))
        for effect, (name, form) in zip((program.reward, program.entropy), QUANTITIES, strict=True):
            slope, curvature = exact_derivatives(policy, rollouts, name, direction, normalisation=form)
            own, first, bend = effect.mean()
            got = own + first @ (x - 1) + (x - 1) @ bend @ (x - 1) / 2
            assert got == pytest.approx(lr * slope + lr**2 / 2 * curvature, abs=1e-9), (name, sketches)


def test_steps_with_its_weights_do_what_it_says_at_a_small_rate(case):
    policy, step, probe = case
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    rules = {"all": np.ones(int(step.update.num_tokens.sum()), dtype=bool)}
    how = FrontierOptions(levels=3, lr=1e-6, baseline="none", caution=0.0)
    found = frontier(policy, step, probe, rules=rules, options=how)
    assert [(p.name, p.level) for p in found.points[:3]] == [("frontier", t) for t in (0.0, 0.5, 1.0)]
    for point in found.points:
        for name in ("entropy", "reward", "entropy_gain", "reward_gain"):
            predicted, realised = getattr(point.predicted, name), getattr(point.realised, name)
            size = max(
                abs(found.entropy.value if "entropy" in name else found.reward.value), abs(realised.value)
            )
            assert realised.value == pytest.approx(predicted.value, abs=0.02 * size), (point.name, name)
    inside = [p.in_sample for p in found.points]
    rewards, entropies = ([getattr(p, n).value for p in inside[:3]] for n in ("reward", "entropy"))
    assert rewards == sorted(rewards, reverse=True)
    assert entropies == sorted(entropies)
    same_entropy, same_reward = inside[3:]
    assert same_entropy.entropy_gain.value >= -1e-6 * abs(found.entropy.value)
    assert same_entropy.reward_gain.value > 0
    assert same_reward.reward_gain.value >= -1e-6 * abs(found.reward.value)
    assert same_reward.entropy_gain.value > 0
    assert not same_reward.entropy_gain.reliable
    assert set(found.weights) == {
        "frontier_0", "frontier_0.5", "frontier_1", "same_entropy", "same_reward"
    }  # fmt: skip
    assert all(x.min() >= 0 and x.max() <= 2 for x in found.weights.values())
    (rule,) = found.rules
    rest = RemadeSteps(policy, step, probe, lr=1e-6, baseline="none")
    expected, _ = rest.measured(rest.reweighted(np.zeros(len(step.update))))
    assert rule.realised.entropy.value == pytest.approx(expected[0].value, rel=1e-8)
    assert all(torch.equal(p, before[n]) for n, p in policy.parameters.items())
    assert Frontier.from_json(found.to_json(), "frontier.json").to_json() == found.to_json()
    drawn = found.plot()
    assert drawn.layout.xaxis.title.text.endswith("nats/token"), "whatever the page's own quantity is"
    (predicted,) = [trace for trace in drawn.data if trace.name == "frontier, predicted"]
    unit = unit_for(found.lr, abs(found.entropy.value), "entropy", "nats/token")
    gains = [unit.change(p.predicted.entropy_gain).value for p in found.points[:3]]
    assert list(predicted.x) == pytest.approx(gains, rel=1e-4)
    rewards = [p.predicted.reward_gain.value for p in found.points[:3]]
    assert list(predicted.y) == pytest.approx(rewards, rel=1e-4)


def test_caution_keeps_the_step_where_little_is_known(case):
    policy, step, probe = case
    how = FrontierOptions(levels=2, lr=1e-6, baseline="none", caution=50.0, realise=False)
    found = frontier(policy, step, probe, options=how)
    assert found.realised_entropy is None
    assert np.abs(found.weights["same_entropy"] - 1).max() < 0.05
    assert found.point("same_entropy").realised is None


def test_halves_are_of_whole_folds_and_told_by_the_seed():
    assert sorted(halves(9, 0)) == [0] * 5 + [1] * 4
    assert any((halves(16, 0) != halves(16, seed)).any() for seed in (1, 2))


def test_the_judged_gain_of_noise_alone_is_compatible_with_none():
    """Planted influences without any truth: intervals across halves hold 0, those in sample do not."""
    rng = np.random.default_rng(0)
    hits, inside, values = [], [], []
    for _ in range(100):
        slopes = np.sqrt(16) * rng.standard_normal((2, 16, 16))
        effects = [Effect(np.full(16, 1 / 16), s.sum(1), s) for s in slopes]
        program = Program(*effects, np.eye(16), np.arange(16), caution=0.0)
        half = halves(16, 0)
        choices = [program.on(half == h).solve(aim="reward") for h in range(2)]
        judged = curve._Judged(program, half, "")
        own = judged.in_sample(program.solve(aim="reward")).reward_gain
        gain = judged.place(choices).reward_gain
        hits.append(gain.low <= 0 <= gain.high)
        inside.append(own.low <= 0 <= own.high)
        values.append(gain.value)
        assert not own.reliable
    assert np.mean(hits) >= 0.9
    assert np.mean(inside) < 0.5
    assert abs(np.mean(values)) < 3 * np.std(values) / 10


def test_refusals(case):
    policy, step, probe = case
    with pytest.raises(MeasurementError, match="learning rate above 0"):
        frontier(policy, replace(step, lr=0.0), probe)
    with pytest.raises(MeasurementError, match="take at least 4"):
        frontier(policy, step, probe.select([0, 1, 2, 3, 4, 5]))
    with pytest.raises(MeasurementError, match="levels 1, most 2 and caution 1"):
        frontier(policy, step, probe, options=FrontierOptions(levels=1))
    _, entropy = bound_on(policy, step, probe)
    few = PairOptions(sketches=None, num_folds=4)
    kernel = second_order_kernel(policy, step, probe, quantity=entropy, options=few)
    with pytest.raises(MeasurementError, match="second-order kernels of"):
        frontier(policy, step, probe, kernels=[kernel, kernel])
