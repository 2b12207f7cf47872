"""The rebuilt step against torch.optim.AdamW taking it for real."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.errors import BatchError, CheckpointError, MeasurementError
from stepscope.measure.step.reconstruct import (
    Step,
    assemble_step,
    reconstruct_step,
    sequence_direction,
    step_components,
)
from stepscope.policy import vectors
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.checkpoint.parameter_order import decay_parameter_names
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts


def build(kind: str, dtype: torch.dtype) -> nn.Module:
    model = cases.model(vocab_size=19)
    if kind == "lora":
        model = cases.adapted(model, r=3, target_modules=["q_proj", "v_proj", "up_proj"])
    return (lift_model(model) if dtype == torch.float64 else model).eval()


def trained(
    kind: str,
    dtype: torch.dtype,
    *,
    max_grad_norm: float = 0.0,
    amsgrad: bool = False,
    second_lr: float = 1.0,
    loss_type: str = "dr_grpo",
    lr: float = 3e-3,
) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after three real AdamW steps, with its state matched by name."""
    settings = StepSettings(
        loss_type=loss_type, temperature=0.9, max_response_tokens=8, max_grad_norm=max_grad_norm
    )
    policy = Policy(model=build(kind, dtype), tokenizer=None, settings=settings)
    decaying = (
        decay_parameter_names(policy.model)
        if kind == "full"
        else {n for n in policy.parameters if "lora_A" in n}
    )
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in policy.parameters.items() if n in decaying], "weight_decay": 0.3},
        {
            "params": [(n, p) for n, p in policy.parameters.items() if n not in decaying],
            "weight_decay": 0.0,
            "lr": lr * second_lr,
            "betas": (0.8, 0.99),
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, amsgrad=amsgrad)
    for seed in range(3):
        cases.take_step(policy, optimizer, cases.batch(policy, seed=seed))
    return with_state(policy, optimizer), optimizer


def with_state(policy: Policy, optimizer: torch.optim.Optimizer) -> Policy:
    saved = copy.deepcopy(optimizer.state_dict())
    return replace(policy, optimizer=match_optimizer(saved, policy.model, where="optimizer.pt"))


def real_direction(
    policy: Policy, optimizer: torch.optim.Optimizer, update: Rollouts, lr: float
) -> tuple[dict[str, Tensor], float]:
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    norm = cases.take_step(policy, optimizer, update)
    return {n: (p.detach().double() - before[n].double()) / lr for n, p in policy.parameters.items()}, norm


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.02])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "lr"), [(torch.float64, 1e-10, 3e-3), (torch.float32, 1e-6, 3e-2)]
)
@pytest.mark.parametrize(("amsgrad", "second_lr"), [(False, 1.0), (False, 0.25), (True, 0.25)])
def test_direction_is_the_step_adamw_takes(
    kind: str,
    max_grad_norm: float,
    dtype: torch.dtype,
    tolerance: float,
    lr: float,
    amsgrad: bool,
    second_lr: float,
) -> None:
    policy, optimizer = trained(
        kind, dtype, max_grad_norm=max_grad_norm, amsgrad=amsgrad, second_lr=second_lr, lr=lr
    )
    update = cases.batch(policy, seed=99)
    step = reconstruct_step(policy, update, budget=Budget(max_sequences=4))
    direction, norm = real_direction(policy, optimizer, update, lr)
    assert vectors.cosine(step.direction, direction) >= 1 - tolerance
    assert vectors.norm(step.direction) == pytest.approx(vectors.norm(direction), rel=tolerance)
    assert step.grad_norm == pytest.approx(norm, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert step.lr == lr
    assert (step.clip_coefficient < 0.9) == (max_grad_norm > 0)
    if dtype == torch.float64:
        for name, part in step.direction.items():
            torch.testing.assert_close(part, direction[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_every_loss_type_makes_its_own_step(loss_type: str) -> None:
    policy, optimizer = trained("full", torch.float64, loss_type=loss_type)
    update = cases.batch(policy, seed=99)
    step = reconstruct_step(policy, update, budget=Budget(max_sequences=2))
    direction, _ = real_direction(policy, optimizer, update, 3e-3)
    assert vectors.cosine(step.direction, direction) >= 1 - 1e-10


@pytest.fixture(params=["full", "lora"])
def float32_step(request: pytest.FixtureRequest) -> tuple[Policy, Step]:
    policy, _ = trained(request.param, torch.float32, max_grad_norm=0.02)
    return policy, cases.step(policy, seed=99)


def test_parts_add_up_in_float32(float32_step: tuple[Policy, Step]) -> None:
    _, step = float32_step
    whole = vectors.norm(step.direction)
    parts = step.components.values()
    residual = vectors.add(step.direction, *(vectors.scale(p, -1.0) for p in parts))
    assert set(step.components) == {"momentum", "decay", "sequences"}
    assert vectors.norm(residual) <= 1e-6 * whole
    assert min(map(vectors.norm, parts)) > 1e-2 * whole


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_directions_of_the_sequences_add_up(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """In float32 the preconditioner magnifies the round-off of gradients that are nearly zero."""
    policy, _ = trained(kind, dtype, max_grad_norm=0.02)
    step = cases.step(policy, seed=99)
    parts = [sequence_direction(policy, step, i) for i in range(len(step.update))]
    whole = step.components["sequences"]
    gap = vectors.add(*parts, vectors.scale(whole, -1.0))
    assert vectors.norm(gap) <= tolerance * vectors.norm(whole)
    assert min(map(vectors.norm, parts)) > 1e-3 * vectors.norm(whole)


def test_summary_shares_add_up(float32_step: tuple[Policy, Step]) -> None:
    _, step = float32_step
    components = step_components(step)
    assert set(components) == {"momentum", "decay", "sequences"}
    assert sum(part.share for part in components.values()) == pytest.approx(1.0, abs=1e-6)
    assert all(abs(part.share) > 1e-6 for part in components.values())
    for name, part in components.items():
        assert part.norm == vectors.norm(step.components[name])
        assert part.share == pytest.approx(part.norm / vectors.norm(step.direction) * part.cosine)


def test_micro_batches_do_not_matter() -> None:
    policy, _ = trained("lora", torch.float64)
    update = cases.batch(policy, seed=99)
    one, many = (reconstruct_step(policy, update, budget=Budget(max_sequences=n)) for n in (1, 9))
    for name in one.direction:
        torch.testing.assert_close(one.direction[name], many.direction[name], rtol=1e-9, atol=1e-12)


def test_learning_rate_zero_still_has_a_direction() -> None:
    """The last checkpoint of a linear schedule has lr = 0; the direction does not depend on it."""
    policy, optimizer = trained("full", torch.float64)
    update = cases.batch(policy, seed=99)
    expected = reconstruct_step(policy, update)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step = reconstruct_step(with_state(policy, optimizer), update)
    assert step.lr == 0.0
    for name in step.direction:
        torch.testing.assert_close(step.direction[name], expected.direction[name])


def test_kl_penalty_uses_the_model_without_its_adapter() -> None:
    policy, _ = trained("lora", torch.float64)
    update = cases.batch(policy, seed=99)
    held = replace(policy, settings=replace(policy.settings, beta=0.5))
    step = reconstruct_step(held, update)
    bare = Policy(model=policy.model.get_base_model(), tokenizer=None, settings=policy.settings)  # type: ignore[operator]
    with policy.model.disable_adapter():  # type: ignore[operator]
        reference, _ = score_rollouts(bare, update)
    assert update.advantages is not None
    for i, weights in enumerate(step.token_weights):
        pull = 0.5 * (reference[i] - update.logprobs[i])
        np.testing.assert_allclose(weights, (update.advantages[i] + pull) / (9 * 8), rtol=1e-9, atol=1e-12)


def test_kl_penalty_of_a_full_model_needs_its_reference() -> None:
    policy, _ = trained("full", torch.float64)
    update = cases.batch(policy, seed=99)
    held = replace(policy, settings=replace(policy.settings, beta=0.5))
    with pytest.raises(MeasurementError, match="pass the policy it is held to as reference"):
        reconstruct_step(held, update)
    reference = Policy(model=build("full", torch.float64), tokenizer=None, settings=policy.settings)
    assert reconstruct_step(held, update, reference=reference).token_weights[0].any()


def test_a_batch_of_another_policy_is_refused_unless_said_so() -> None:
    policy, _ = trained("full", torch.float64)
    other = Policy(model=build("full", torch.float64), tokenizer=None, settings=policy.settings)
    update = cases.batch(other, seed=99)
    with pytest.raises(BatchError, match="off_policy=True"):
        reconstruct_step(policy, update)
    step = reconstruct_step(policy, update, off_policy=True)
    now, _ = score_rollouts(policy, update)
    assert update.advantages is not None
    ratio = np.exp(now[0] - update.logprobs[0])
    a = float(update.advantages[0])
    clipped = (ratio > 1.2) if a > 0 else (ratio < 0.8)
    np.testing.assert_allclose(step.token_weights[0], np.where(clipped, 0.0, a * ratio / 72), rtol=1e-9)


def test_no_optimizer_state_is_an_error_not_a_fresh_optimizer() -> None:
    policy, _ = trained("full", torch.float64)
    update = cases.batch(policy, seed=99)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        reconstruct_step(replace(policy, optimizer=None), update)
    next(iter(policy.parameters.values())).requires_grad_(False)
    with pytest.raises(CheckpointError, match="in the optimizer state only"):
        reconstruct_step(policy, update)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_names_its_parameter(value: float) -> None:
    policy, _ = trained("full", torch.float64)
    update = cases.batch(policy, seed=9)
    ascent = {n: torch.zeros_like(p) for n, p in policy.parameters.items()}
    ascent["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    with pytest.raises(
        MeasurementError, match=r"gradient is not finite: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        assemble_step(policy, update, [np.zeros(n) for n in update.num_tokens], ascent, {})


def test_a_step_that_is_not_finite_names_its_parameter() -> None:
    """Without eps, a parameter that never had a gradient divides 0 by 0."""
    policy, _ = trained("full", torch.float64)
    assert policy.optimizer is not None
    groups = tuple(replace(group, eps=0.0) for group in policy.optimizer.groups)
    name = "model.layers.0.mlp.up_proj.weight"
    zero = torch.zeros_like(policy.parameters[name])
    state = replace(
        policy.optimizer,
        groups=groups,
        exp_avg={**policy.optimizer.exp_avg, name: zero},
        exp_avg_sq={**policy.optimizer.exp_avg_sq, name: zero},
    )
    update = cases.batch(policy, seed=9)
    ascent = {n: torch.zeros_like(p) for n, p in policy.parameters.items()}
    weights = [np.zeros(n) for n in update.num_tokens]
    with pytest.raises(
        MeasurementError, match=r"direction of the step is not finite: .*layers\.0\.mlp\.up_proj"
    ):
        assemble_step(replace(policy, optimizer=state), update, weights, ascent, {})


def test_a_bias_of_minus_infinity_without_decay_stays_where_it_is() -> None:
    """Tokens can be excluded so; torch's AdamW leaves such a bias at -inf."""
    policy, _ = trained("full", torch.float64)
    assert policy.optimizer is not None
    groups = policy.optimizer.groups
    name = next(n for g in groups for n in g.names if g.weight_decay == 0.0)
    policy.parameters[name].data[-1] = -torch.inf
    ascent = {n: torch.zeros_like(p) for n, p in policy.parameters.items()}
    decay = policy.optimizer.update(policy.parameters, ascent, clip=1.0, lr=1e-3).parts["decay"]
    assert not decay[name].any()
    assert all(bool(t.isfinite().all()) for t in decay.values())


def test_a_token_weight_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = trained("full", torch.float64)
    update = cases.batch(policy, seed=9)
    weights = [np.ones(n) for n in update.num_tokens]
    weights[4][-1] = np.nan
    monkeypatch.setattr("stepscope.measure.step.reconstruct.token_weights", lambda *args, **kwargs: weights)
    place = rf"sequence 4 \(p9/1\), response token {len(weights[4]) - 1} is not finite"
    with pytest.raises(MeasurementError, match=place):
        reconstruct_step(policy, update)
