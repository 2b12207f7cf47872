"""The rounded step against trainings in bfloat16 and against AdamW's operations rounded one by one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from enumerable import EOS, PROMPTS, VOCABULARY
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.measure.step.rounding import RoundedStep, rounded_step
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.reference import exact_change, exact_rollouts, exact_value
from stepscope.results import Rollouts

HALF = torch.bfloat16
LRS = (1e-6, 1e-5, 1e-4)
KERNELS = ({}, {"foreach": True}, {"fused": True})


class Training:
    """A training with weights, moments and gradients in a half type, after three steps."""

    def __init__(
        self,
        *,
        kind: torch.dtype = HALF,
        clip: float = 0.05,
        **optimizer: Any,
    ) -> None:
        settings = StepSettings(
            loss_type="dr_grpo", temperature=0.9, max_response_tokens=3, max_grad_norm=clip
        )
        model = cast(
            cases.model(hidden_size=32, intermediate_size=64, vocab_size=VOCABULARY, pad_token_id=None), kind
        )
        self.policy = Policy(model, None, settings)
        named = self.policy.parameters
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.95),
            **optimizer,
        )
        for seed in range(3):
            self.step(cases.batch(self.policy, num_prompts=4, group_size=4, seed=seed))

    def step(self, batch: Rollouts, gradient: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A step for real, of the batch or of a gradient; the parameters after it."""
        if gradient is None:
            cases.take_step(self.policy, self.optimizer, batch)
        else:
            for name, parameter in self.policy.parameters.items():
                parameter.grad = gradient[name].to(parameter.dtype)
            cases.clipped_step(self.policy, self.optimizer)
        return {n: p.detach().clone() for n, p in self.policy.parameters.items()}

    def checkpoint(self, lr: float, dtype: torch.dtype = torch.float32) -> Policy:
        """What is loaded of its checkpoint, at the precision of a measurement."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        model = copy.deepcopy(self.policy.model)
        model = lift_model(model) if dtype == torch.float64 else cast(model, dtype)
        saved = copy.deepcopy(self.optimizer.state_dict())
        wide = torch.float64 if dtype == torch.float64 else None
        state = match_optimizer(saved, model, where="optimizer.pt", dtype=wide)
        return replace(self.policy, model=model, optimizer=state, stored_dtypes=("bfloat16",))


def cast(model: nn.Module, kind: torch.dtype) -> nn.Module:
    """The model with parameters in another type; its rotary frequencies stay, as transformers loads them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind)
    return model


def rebuilt(policy: Policy, batch: Rollouts) -> tuple[Step, RoundedStep]:
    logprobs, entropies = score_rollouts(policy, batch)
    step = reconstruct_step(policy, replace(batch, logprobs=logprobs, entropies=entropies))
    taken = rounded_step(policy, step, step.lr)
    assert taken is not None
    return step, taken


def apart(ours: dict[str, Tensor], real: dict[str, Tensor]) -> float:
    """Share of the coordinates that are not the same number."""
    unequal = sum(int((ours[n] != real[n]).sum()) for n in real)
    return unequal / sum(t.numel() for t in real.values())


@pytest.mark.parametrize("kernel", KERNELS, ids=["single", "foreach", "fused"])
@pytest.mark.parametrize("lr", LRS)
def test_a_gradient_moves_the_weights_as_in_the_training(kernel: dict[str, bool], lr: float) -> None:
    """From the state of a checkpoint and the same gradient torch's own weights come out, bit for bit."""
    training = Training(**kernel)
    policy = training.checkpoint(lr)
    batch = cases.batch(policy, num_prompts=4, group_size=4, seed=9)
    step, taken = rebuilt(policy, batch)
    assert 0 < taken.share_moved < 1
    assert taken.kept_in == "bfloat16"
    real = training.step(batch, {n: -t for n, t in step.ascent.items()})
    assert all(torch.equal(taken.parameters[n], real[n]) for n in real)


@pytest.mark.parametrize("kernel", KERNELS, ids=["single", "foreach", "fused"])
@pytest.mark.parametrize("lr", LRS)
def test_a_batch_moves_the_weights_as_in_the_training(kernel: dict[str, bool], lr: float) -> None:
    """With a backward pass in bfloat16 all weights are the same but for one where the last bit of a gradient
    depends on the order in which the loss is summed; with one in float32 few round otherwise.
    """
    training = Training(**kernel)
    same, finer = training.checkpoint(lr, HALF), training.checkpoint(lr)
    batch = cases.batch(same, num_prompts=4, group_size=4, seed=9)
    (_, exact), (_, near) = rebuilt(same, batch), rebuilt(finer, batch)
    real = training.step(batch)
    assert apart(exact.parameters, real) < 1e-4
    assert 0 < near.share_moved < 0.1
    assert apart(near.parameters, real) < 0.15 * near.share_moved + 1e-4
    assert near.kernel == next(iter(kernel), "single tensor")


@pytest.mark.parametrize("kernel", KERNELS[::2], ids=["single", "fused"])
@pytest.mark.parametrize("lr", LRS)
def test_the_change_is_that_of_the_training(kernel: dict[str, bool], lr: float) -> None:
    """The entropy of all responses before and after a real step in bfloat16, against what is reported."""
    training = Training(**kernel)
    policy = training.checkpoint(lr, torch.float64)
    rollouts, probabilities = exact_rollouts(policy, PROMPTS, eos_id=EOS)
    step, taken = rebuilt(policy, cases.batch(policy, num_prompts=4, group_size=4, seed=9))
    found = measure_change(
        policy,
        step,
        rollouts,
        lrs=[lr],
        taken=taken,
        options=ChangeOptions(sequence_weights=probabilities, baseline="none"),
    )
    before = exact_value(policy, rollouts, "entropy", normalisation="per_token").item()
    training.step(step.update, {n: -t for n, t in step.ascent.items()})
    after = training.checkpoint(lr, torch.float64)
    real = exact_value(after, rollouts, "entropy", normalisation="per_token").item() - before
    whole = exact_change(policy, rollouts, "entropy", step.direction, lr, normalisation="per_token")
    assert found.taken is not None
    assert found.taken.true.value == pytest.approx(real, abs=1e-13)
    assert found.taken.unrounded.value == pytest.approx(whole, abs=1e-13)
    assert found.taken.difference.value == pytest.approx(real - whole, abs=1e-13)
    assert found.taken.ratio is not None
    assert found.taken.ratio.value == pytest.approx(real / whole, rel=1e-6)
    assert "at the weights that AdamW leaves in bfloat16, forward pass in float64" in found.taken.true.method
    assert abs(real) < 0.5 * abs(whole)


def test_operations_are_rounded_one_by_one() -> None:
    """Decay, moments, denominator and quotient in float32, each brought to bfloat16 before the next."""
    training = Training(clip=0.0)
    policy = training.checkpoint(1e-3)
    step, taken = rebuilt(policy, cases.batch(policy, num_prompts=4, group_size=4, seed=9))
    state = policy.optimizer
    assert state is not None
    for group in state.groups:
        (b1, b2), eps = group.betas, group.eps
        for name in group.names:
            t = state.steps[name] + 1
            g = round_half(-step.ascent[name])
            theta = round_half(policy.parameters[name].detach() * (1 - group.lr * group.weight_decay))
            m = round_half(state.exp_avg[name] + (1 - b1) * (g - state.exp_avg[name]))
            v = round_half(round_half(b2 * state.exp_avg_sq[name]) + (1 - b2) * g * g)
            root = round_half(round_half(v.sqrt()) / (1 - b2**t) ** 0.5)
            after = round_half(theta - group.lr / (1 - b1**t) * m / round_half(root + eps))
            # where float32 itself rounds onto the middle between two numbers of bfloat16
            assert (after != taken.parameters[name].float()).float().mean() < 2e-3, name


def round_half(values: Tensor) -> Tensor:
    return values.to(HALF).float()


def test_decay_and_small_steps_do_nothing_at_all() -> None:
    """1 - lr x decay is 1 to bfloat16; what moves are weights near zero."""
    training = Training()
    policy = training.checkpoint(1e-6)
    step, taken = rebuilt(policy, cases.batch(policy, num_prompts=4, group_size=4, seed=9))
    for name, parameter in policy.parameters.items():
        start, end = parameter.detach(), taken.parameters[name].float()
        still = start.abs() > 2**9 * 2 * taken.lr * step.direction[name].abs()
        assert torch.equal(end[still], start[still]), name


def test_parameters_are_left_alone_and_rates_stand_in_for_zero() -> None:
    training = Training()
    policy = training.checkpoint(1e-4)
    batch = cases.batch(policy, num_prompts=4, group_size=4, seed=9)
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    step, taken = rebuilt(policy, batch)
    measure_change(policy, step, batch, lrs=[1e-4], taken=taken, options=ChangeOptions(baseline="none"))
    assert all(torch.equal(p, before[n]) for n, p in policy.parameters.items())
    ended = training.checkpoint(0.0)
    idle = reconstruct_step(ended, step.update)
    assert idle.lr == 0
    assert rounded_step(ended, idle, 0.0) is None
    again = rounded_step(ended, idle, 1e-4)
    assert again is not None
    assert all(torch.equal(again.parameters[n], taken.parameters[n]) for n in before)


def test_only_parameters_in_a_half_type_are_rounded() -> None:
    policy = Training().checkpoint(1e-5)
    state = policy.optimizer
    assert state is not None
    types = {n: torch.float32 if "norm" in n else kind for n, kind in state.moment_types.items()}
    policy = replace(policy, optimizer=replace(state, moment_types=types))
    step, taken = rebuilt(policy, cases.batch(policy, num_prompts=4, group_size=4, seed=9))
    norms = [n for n in taken.parameters if "norm" in n]
    assert {taken.parameters[n].dtype for n in norms} == {torch.float32}
    for name in norms:
        moved = taken.parameters[name] - policy.parameters[name].detach()
        torch.testing.assert_close(moved, 1e-5 * step.direction[name], rtol=0.02, atol=1e-7)


def test_what_was_never_rounded_has_no_rounded_step() -> None:
    policy = Training(kind=torch.float32).checkpoint(1e-4)
    step = reconstruct_step(policy, cases.batch(policy, num_prompts=4, group_size=4, seed=9))
    assert rounded_step(policy, step, 1e-4) is None
    assert replace(policy, stored_dtypes=("float32",)).rounding_doubt == ""
    finer = replace(policy, stored_dtypes=("bfloat16",)).rounding_doubt
    assert "had finer weights" in finer


def test_weights_that_the_type_does_not_have_are_refused() -> None:
    policy = Training().checkpoint(1e-4)
    with torch.no_grad():
        next(iter(policy.parameters.values())).mul_(1.001)
    step = reconstruct_step(policy, cases.batch(policy, num_prompts=4, group_size=4, seed=9))
    with pytest.raises(MeasurementError, match=r"is no bfloat16 number although the optimizer's moments are"):
        rounded_step(policy, step, 1e-4)


def test_a_training_that_float16_ends_is_refused() -> None:
    """eps = 1e-8 is 0 in float16: a second moment of 0 divides by it."""
    training = Training()
    cast(training.policy.model, torch.float16)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    policy = training.checkpoint(1e-4)
    step = reconstruct_step(policy, cases.batch(policy, num_prompts=4, group_size=4, seed=9))
    with pytest.raises(MeasurementError, match=r"a training in float16 is not finite: .* the training ends"):
        rounded_step(policy, step, 1e-4)
