from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, random_step
from stepscope.errors import MeasurementError
from stepscope.measure.change.sweep import measure_change
from stepscope.measure.quantity.baselines import position_mean
from stepscope.measure.quantity.quantities import (
    QuantityValues,
    make_quantity,
    mean_per_token,
    quantity_objective,
    to_go,
    unit_of,
)
from stepscope.measure.quantity.values import derivatives, response_mask
from stepscope.policy.checkpoint.adapters import REFERENCE
from stepscope.policy.gradients import directional_derivative
from stepscope.policy.numerics.precision import lift_model, true_float64
from stepscope.policy.passes import Budget
from stepscope.reference import exact_rollouts, sample_exact


def test_to_go_counts_prefix_values_after_and_token_values_from_the_token_on() -> None:
    values = QuantityValues((np.array([1.0, 2.0, 4.0]),), (np.array([10.0, 20.0, 40.0]),))
    assert to_go(values, normalisation="per_seq")[0].tolist() == [6 + 70, 4 + 60, 0 + 40]
    centre, length = mean_per_token(values, np.array([3]))
    assert (centre, length) == (77 / 3, 3)
    expected = [76 - 2 * centre, 64 - centre, 40]
    np.testing.assert_allclose(to_go(values, normalisation="per_token")[0], expected)


def test_values_come_from_the_batch_and_units_are_named() -> None:
    rollouts, _ = exact_rollouts(enumerable_policy(), PROMPTS, eos_id=EOS, reward=digit_reward)
    reward = make_quantity("reward", rollouts)
    np.testing.assert_array_equal(reward.base.per_seq, rollouts.rewards)
    np.testing.assert_array_equal(make_quantity("length", rollouts).base.per_seq, rollouts.num_tokens)
    np.testing.assert_allclose(make_quantity("entropy", rollouts).base.per_seq, rollouts.entropy_per_seq)
    assert unit_of(reward, "per_seq") == "reward/sequence"
    assert unit_of(make_quantity("entropy", rollouts), "per_token") == "nats/token"


def test_what_does_not_exist_is_refused_with_the_way_out() -> None:
    policy = enumerable_policy()
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    with pytest.raises(MeasurementError, match="choose from entropy, reward"):
        make_quantity("entropie", rollouts)
    with pytest.raises(MeasurementError, match="give a reference model"):
        make_quantity("kl", rollouts, policy=policy)
    with pytest.raises(MeasurementError, match="pass policy="):
        make_quantity("kl", rollouts)
    reward = make_quantity("reward", rollouts)
    with pytest.raises(MeasurementError, match="choose on_policy"):
        quantity_objective(reward, rollouts, version="fixed_prefix")
    with pytest.raises(MeasurementError, match="unknown normalisation"):
        quantity_objective(reward, rollouts, normalisation="per_word")


def test_kl_to_itself_is_zero_and_to_the_base_of_an_adapter_is_not() -> None:
    policy = enumerable_policy(lora=True)
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    itself = make_quantity("kl", rollouts, policy=policy, reference=policy.model)
    assert np.abs(itself.base.per_seq).max() < 1e-14
    to_base = make_quantity("kl", rollouts, policy=policy)
    assert (to_base.base.per_seq > 0).all()
    with torch.no_grad(), policy.model.disable_adapter():
        off = make_quantity("kl", rollouts, policy=policy, reference=policy.model)
    np.testing.assert_allclose(off.base.per_seq, 0, atol=1e-14)


@pytest.mark.parametrize("continued", [False, True], ids=["fresh adapter", "continued run"])
def test_kl_of_an_adapter_is_to_what_the_run_started_from(continued: bool) -> None:
    """TRL keeps the starting adapter as ``ref``; without one the reference is the base model."""
    policy = enumerable_policy(lora=True)
    flags = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    start: nn.Module = enumerable_policy().model
    if continued:
        torch.manual_seed(5)
        policy.model.add_adapter(REFERENCE, policy.model.peft_config["default"])
        lift_model(policy.model)
        for name, parameter in policy.model.named_parameters():
            if name not in flags:
                parameter.requires_grad_(False)
                flags[name] = False
        start = enumerable_policy(lora=True).model
        for name, parameter in start.named_parameters():
            parameter.data.copy_(policy.model.get_parameter(name.replace("default", REFERENCE)))
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=8, group_size=1, seed=0)
    found, expected = (
        measure_change(
            policy, random_step(policy), sample, quantity="kl", reference=r, lrs=[1e-3], second_order=True
        )
        for r in (None, start)
    )
    point, twin = found.points[0], expected.points[0]
    assert point.true.value == pytest.approx(twin.true.value, rel=1e-9)
    assert point.linear.value == pytest.approx(twin.linear.value, rel=1e-9)
    assert point.second_order is not None
    assert twin.second_order is not None
    assert point.second_order.value == pytest.approx(twin.second_order.value, rel=1e-9)
    assert found.value.value == pytest.approx(expected.value.value, rel=1e-12)
    assert found.value.value > 1e-3
    assert {n: p.requires_grad for n, p in policy.model.named_parameters()} == flags


@pytest.mark.parametrize("normalisation", ["per_token", "per_seq"])
@pytest.mark.parametrize("version", ["on_policy", "fixed_prefix"])
def test_the_surrogate_differentiates_to_the_linear_change(normalisation: str, version: str) -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=12, group_size=2, seed=0)
    step = random_step(policy)
    quantity = make_quantity("entropy", sample)
    change = measure_change(
        policy, step, sample, lrs=[1e-3], normalisation=normalisation, version=version, baseline="position"
    )
    mask = response_mask(sample)
    returns = np.zeros(mask.shape)
    for row, values in enumerate(to_go(quantity.base, normalisation=normalisation)):
        returns[row, : len(values)] = values
    fitted = position_mean(returns, mask, sample.prompt_index)
    surrogate = quantity_objective(
        quantity,
        sample,
        normalisation=normalisation,
        version=version,
        baseline=[b[:n] for b, n in zip(fitted, sample.num_tokens, strict=True)],
    )
    slopes = directional_derivative(policy, sample, surrogate, step.direction)
    assert float(torch.stack(slopes).mean()) == pytest.approx(change.slope.value, rel=1e-10)


def test_a_baseline_changes_the_estimate_but_not_its_expectation() -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    step = random_step(policy)
    slopes = {
        kind: measure_change(
            policy,
            step,
            rollouts,
            lrs=[1e-3],
            baseline=kind,
            sequence_weights=probabilities,
            budget=Budget(max_sequences=256),
        ).slope.value
        for kind in ("none", "current", "position", "ridge")
    }
    for value in slopes.values():
        assert value == pytest.approx(slopes["none"], abs=1e-10)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=12, group_size=1, seed=0)
    seen = {measure_change(policy, step, sample, lrs=[1e-3], baseline=k).slope.value for k in slopes}
    assert len(seen) == 4


def test_values_follow_the_sequences_when_the_batch_is_cut_otherwise() -> None:
    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=9, group_size=1, seed=0)
    step = replace(random_step(policy), lr=1e-2)
    values = [
        measure_change(
            policy, step, sample, quantity="reward", lrs=[1e-2], budget=Budget(max_sequences=m)
        ).at(1e-2)
        for m in (1, 4, 9)
    ]
    for point in values[1:]:
        assert point.true.value == pytest.approx(values[0].true.value, rel=1e-10)
        assert point.linear.value == pytest.approx(values[0].linear.value, rel=1e-10)


def test_kl_of_policies_that_exclude_tokens() -> None:
    """Both exclude one: the divergence of the four others. The reference alone: infinite, so refused."""
    policy, other = enumerable_policy("llama"), enumerable_policy("llama", seed=3)
    whole, _ = exact_rollouts(policy, PROMPTS[:1], eos_id=EOS)
    rollouts = whole.select([i for i, ids in enumerate(whole.response_token_ids) if 4 not in ids])

    def exclude(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[..., :4], torch.full_like(output[..., 4:], -torch.inf)], -1)

    def kept(model: nn.Module) -> torch.Tensor:
        tokens = [
            [*p, *r]
            for p, r in zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True)
            if len(r) == 3
        ]
        with torch.no_grad(), true_float64():
            logits = model(torch.tensor(tokens)).logits
        return torch.log_softmax(logits[:, len(PROMPTS[0]) - 1 : -1, :4] / rollouts.temperature, -1)

    p, q = kept(policy.model), kept(other.model)
    expected = (p.exp() * (p - q)).sum((-1, -2)).numpy()
    other.model.get_submodule("lm_head").register_forward_hook(exclude)
    with pytest.raises(MeasurementError, match=r"kl: infinite before response token 0 of sequence \d"):
        make_quantity("kl", rollouts, policy=policy, reference=other.model)
    policy.model.get_submodule("lm_head").register_forward_hook(exclude)
    kl = make_quantity("kl", rollouts, policy=policy, reference=other.model)
    long = [i for i, ids in enumerate(rollouts.response_token_ids) if len(ids) == 3]
    np.testing.assert_allclose(kl.base.per_seq[long], expected, rtol=1e-10)
    (slopes,) = derivatives(policy, rollouts, [kl], random_step(policy).direction)
    assert np.isfinite(slopes.prefix).all()
