from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from enumerable import EOS, PROMPTS, digit_reward, enumerable_policy, random_step
from stepscope.config import MeasureConfig, build_config
from stepscope.errors import ConfigError, MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.quantity.base import Quantity, make_quantity, quantities
from stepscope.measure.quantity.estimators import Baseline, ProbeValues
from stepscope.measure.quantity.kinds.logprob import LogProb
from stepscope.measure.quantity.objective import quantity_objective
from stepscope.measure.quantity.probe import bind_quantity, probe_values
from stepscope.measure.quantity.values import TokenValues, derivatives, values_at
from stepscope.policy.checkpoint.adapters import REFERENCE
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import directional_derivative
from stepscope.policy.numerics.precision import lift_model, true_float64
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.reference import exact_change, exact_derivatives, exact_rollouts, sample_exact
from stepscope.results import Rollouts


def test_returns_count_prefix_values_after_and_token_values_from_the_token_on() -> None:
    prefix, token = np.array([[1.0, 2.0, 4.0]]), np.array([[10.0, 20.0, 40.0]])
    nothing = np.zeros((1, 3))
    values = TokenValues(nothing, prefix, token)
    mask, clusters = np.ones((1, 3), dtype=bool), np.zeros(1, dtype=np.int64)
    found = ProbeValues(
        LogProb(normalisation="per_seq"), values, mask, clusters, Baseline("none", nothing), nothing
    )
    assert found.ahead.tolist() == [[6 + 70, 4 + 60, 0 + 40]]
    found = replace(found, quantity=LogProb())
    assert (found.centre, found.mean_length) == (77 / 3, 3)
    np.testing.assert_allclose(found.ahead, [[76 - 2 * found.centre, 64 - found.centre, 40]])


def sums(policy: Policy, rollouts: Rollouts, quantity: Quantity) -> np.ndarray:
    """(seq,) sum_k f_k."""
    values = values_at(policy, rollouts, [quantity]).quantity(0)
    return probe_values(quantity, values, rollouts).totals


def test_values_come_from_the_batch_and_units_are_named() -> None:
    policy = enumerable_policy()
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS, reward=digit_reward)
    reward = make_quantity("reward", rollouts)
    np.testing.assert_array_equal(sums(policy, rollouts, reward), rollouts.rewards)
    length = make_quantity("length", rollouts)
    assert length.normalisation == "per_seq"
    np.testing.assert_array_equal(sums(policy, rollouts, length), rollouts.num_tokens)
    entropy = make_quantity("entropy", rollouts)
    np.testing.assert_allclose(sums(policy, rollouts, entropy), rollouts.entropy_per_seq)
    assert replace(reward, normalisation="per_seq").unit == "reward/sequence"
    assert entropy.unit == "nats/token"


def test_every_file_is_named_like_its_quantity_and_a_configuration_takes_its_name() -> None:
    files = {Path(str(inspect.getfile(kind))).stem: name for name, kind in quantities().items()}
    known = ("entropy", "kl", "length", "logprob", "reward")
    assert {file: name for file, name in files.items() if name in known} == {name: name for name in known}
    built_in = {"checkpoint": "c", "out": "o", "quantities": list(known)}
    assert build_config(MeasureConfig, built_in).quantities == list(known)
    with pytest.raises(ConfigError, match="no such quantity; choose from entropy, kl, length"):
        build_config(MeasureConfig, built_in | {"quantities": ["entropie"]})


def test_a_quantity_of_ones_own_is_measured_like_the_others() -> None:
    """One class: values; the derivatives, estimators and errors are there."""

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Surprise(Quantity):
        name = "surprise"
        sum_unit = "nats^2"

        def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> torch.Tensor:
            return outputs.logprobs**2

    def exact(outputs: TokenOutputs, batch: TokenBatch, *_: object) -> torch.Tensor:
        return (outputs.logprobs**2).sum(-1)

    policy = enumerable_policy()
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    step = random_step(policy)
    for quantity in make_quantity("surprise", rollouts).variants():
        form = {"normalisation": quantity.normalisation, "version": quantity.version}
        options = ChangeOptions(sequence_weights=probabilities)
        change = measure_change(policy, step, rollouts, quantity=quantity, lrs=[1e-3], options=options)
        slope, _ = exact_derivatives(policy, rollouts, exact, step.direction, **form)
        assert change.slope.value == pytest.approx(slope, abs=1e-9)
        true = exact_change(policy, rollouts, exact, step.direction, 1e-3, **form)
        assert change.at(1e-3).true.value == pytest.approx(true, abs=1e-12)
        assert change.slope.unit.startswith("nats^2/")


def test_what_does_not_exist_is_refused_with_the_way_out() -> None:
    policy = enumerable_policy()
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    with pytest.raises(MeasurementError, match="choose from entropy, kl, length, logprob, reward"):
        make_quantity("entropie", rollouts)
    with pytest.raises(MeasurementError, match="give a reference model"):
        make_quantity("kl", rollouts, policy=policy)
    with pytest.raises(MeasurementError, match="pass policy="):
        make_quantity("kl", rollouts)
    with pytest.raises(MeasurementError, match="choose on_policy"):
        make_quantity("reward", rollouts, version="fixed_prefix")
    with pytest.raises(MeasurementError, match="unknown normalisation"):
        make_quantity("reward", rollouts, normalisation="per_word")


def test_kl_to_itself_is_zero_and_to_the_base_of_an_adapter_is_not() -> None:
    policy = enumerable_policy(lora=True)
    rollouts, _ = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    itself = make_quantity("kl", rollouts, policy=policy, reference=policy.model)
    assert np.abs(sums(policy, rollouts, itself)).max() < 1e-14
    to_base = make_quantity("kl", rollouts, policy=policy)
    assert (sums(policy, rollouts, to_base) > 0).all()
    with torch.no_grad(), policy.model.disable_adapter():
        off = make_quantity("kl", rollouts, policy=policy, reference=policy.model)
        np.testing.assert_allclose(sums(policy, rollouts, off), 0, atol=1e-14)


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
            policy,
            random_step(policy),
            sample,
            quantity=make_quantity("kl", sample, policy=policy, reference=r),
            lrs=[1e-3],
            options=ChangeOptions(second_order=True),
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
    quantity = make_quantity("entropy", sample, normalisation=normalisation, version=version)
    change = measure_change(
        policy,
        step,
        sample,
        lrs=[1e-3],
        quantity=quantity,
        options=ChangeOptions(baseline="position"),
    )
    bound = bind_quantity(policy, sample, quantity, direction=step.direction, baseline="position")
    surrogate = quantity_objective(bound)
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
            budget=Budget(max_sequences=256),
            options=ChangeOptions(baseline=kind, sequence_weights=probabilities),
        ).slope.value
        for kind in ("none", "current", "position", "ridge")
    }
    for value in slopes.values():
        assert value == pytest.approx(slopes["none"], abs=1e-10)
    sample, _ = sample_exact(rollouts, probabilities, num_prompts=12, group_size=1, seed=0)
    seen = {
        measure_change(policy, step, sample, lrs=[1e-3], options=ChangeOptions(baseline=k)).slope.value
        for k in slopes
    }
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
        sums(policy, rollouts, make_quantity("kl", rollouts, policy=policy, reference=other.model))
    policy.model.get_submodule("lm_head").register_forward_hook(exclude)
    kl = make_quantity("kl", rollouts, policy=policy, reference=other.model)
    long = [i for i, ids in enumerate(rollouts.response_token_ids) if len(ids) == 3]
    np.testing.assert_allclose(sums(policy, rollouts, kl)[long], expected, rtol=1e-10)
    (slopes,) = derivatives(policy, rollouts, [kl], random_step(policy).direction)
    assert np.isfinite(slopes.prefix).all()
