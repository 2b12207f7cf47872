"""The derivative of AdamW's step: against finite differences of ``torch.optim.AdamW`` itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.influence.attribution import InfluenceOptions, influence, influences, neglected_share
from stepscope.measure.influence.probe_gradient import probe_gradient
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.derivative import step_derivative
from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.policy import vectors
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.optim.adamw import AdamWState
from stepscope.policy.state import Policy
from stepscope.results import FloatArray

STATES = [
    # steps so far, share of the gradient that clipping leaves, AMSGrad, b2, rate of the second group
    pytest.param(60, 1.0, False, 0.999, 1.0, id="late"),
    pytest.param(60, 0.43, False, 0.95, 0.25, id="late-clipped-two-rates"),
    pytest.param(10, 1.0, False, 0.999, 1.0, id="step-11"),
    pytest.param(10, 0.43, False, 0.999, 1.0, id="step-11-clipped"),
    pytest.param(3, 1.0, False, 0.999, 1.0, id="step-4"),
    pytest.param(1, 0.2, False, 0.999, 1.0, id="step-2-clipped"),
    pytest.param(10, 0.43, True, 0.99, 1.0, id="amsgrad"),
    pytest.param(0, 1.0, False, 0.999, 1.0, id="step-1"),
    pytest.param(0, 0.43, False, 0.999, 1.0, id="step-1-clipped"),
]


def with_state(
    policy: Policy, step: Step, steps: int, kept: float, amsgrad: bool, beta2: float, second_rate: float
) -> Policy:
    """The policy at another age of its optimizer, with moments of the size of the gradient."""
    assert policy.optimizer is not None
    generator = torch.Generator().manual_seed(1)
    noise = {n: t.std() * torch.randn(t.shape, generator=generator).to(t) for n, t in step.ascent.items()}
    exp_avg = {n: 0.3 * (1 - 0.9**steps) * t for n, t in noise.items()}
    exp_avg_sq = {n: (1 - beta2**steps) * (t**2 + 0.1 * t.std() ** 2) for n, t in noise.items()}
    first, second = policy.optimizer.groups
    state = AdamWState(
        groups=tuple(
            replace(g, betas=(0.9, beta2), amsgrad=amsgrad, lr=g.lr * rate)
            for g, rate in ((first, 1.0), (second, second_rate))
        ),
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        steps=dict.fromkeys(exp_avg, steps),
        max_exp_avg_sq={n: 1.001 * t.roll(1) for n, t in exp_avg_sq.items()} if amsgrad else {},
    )
    limit = kept * step.grad_norm if kept < 1 else 0.0
    return replace(policy, optimizer=state, settings=replace(policy.settings, max_grad_norm=limit))


def torch_step(policy: Policy, step: Step, weights: tuple[FloatArray, ...]) -> dict[str, Tensor]:
    """(params' - params) / lr of ``torch.optim.AdamW`` on the loss with these token weights."""
    state = policy.optimizer
    assert state is not None
    params = {n: p.detach().clone().requires_grad_() for n, p in policy.parameters.items()}
    update = step.update
    batch = make_batch(update.prompt_token_ids, update.response_token_ids)
    outputs = torch.func.functional_call(
        _Forward(policy, update.temperature, batch), {f"model.{n}": p for n, p in params.items()}, ()
    )
    loss = torch.zeros((), dtype=policy.dtype)
    for row, own in enumerate(weights):
        loss = loss - outputs[row][batch.response_mask[row]] @ torch.as_tensor(own)
    loss.backward()
    if policy.settings.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(params.values(), policy.settings.max_grad_norm)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [params[n] for n in g.names],
                "lr": g.lr,
                "betas": g.betas,
                "eps": g.eps,
                "weight_decay": g.weight_decay,
                "amsgrad": g.amsgrad,
            }
            for g in state.groups
        ]
    )
    for name, param in params.items():
        own_state = {
            "step": torch.tensor(float(state.steps[name])),
            "exp_avg": state.exp_avg[name].clone(),
            "exp_avg_sq": state.exp_avg_sq[name].clone(),
        }
        if name in state.max_exp_avg_sq:
            own_state["max_exp_avg_sq"] = state.max_exp_avg_sq[name].clone()
        optimizer.state[param] = own_state
    optimizer.step()
    start = policy.parameters
    return {n: (p.detach() - start[n].detach()) / step.lr for n, p in params.items()}


class _Forward(torch.nn.Module):
    """Log-probs of one batch, as a function of the model's parameters."""

    def __init__(self, policy: Policy, temperature: float, batch: object) -> None:
        super().__init__()
        self.model = policy.model
        self.how = (temperature, batch)

    def forward(self) -> Tensor:
        temperature, batch = self.how
        return forward(self.model, batch, temperature=temperature).logprobs


@pytest.mark.parametrize(("steps", "kept", "amsgrad", "beta2", "second_rate"), STATES)
def test_influence_through_the_optimizer_is_what_torch_does(
    steps: int,
    kept: float,
    amsgrad: bool,
    beta2: float,
    second_rate: float,
) -> None:
    """Of single tokens, of a sequence and of the whole batch, by central differences in their weights."""
    policy = cases.policy()
    update = cases.batch(policy, num_prompts=3, group_size=3)
    policy = with_state(policy, reconstruct_step(policy, update), steps, kept, amsgrad, beta2, second_rate)
    step = reconstruct_step(policy, update)
    probe = cases.batch(policy, num_prompts=6, group_size=1, seed=5)
    bound = bind_quantity(policy, probe, "entropy", direction=step.direction, baseline="position")
    slope = probe_gradient(policy, probe, bound, errors=False).mean()
    found = influence(
        policy, step, update, probe, through="optimizer", options=InfluenceOptions(baseline="position")
    )
    weights = step.token_weights
    np.testing.assert_allclose(
        vectors.dot(torch_step(policy, step, weights), slope),
        vectors.dot(step.direction, slope),
        rtol=1e-9,
    )
    assert (step.clip_coefficient < 1) == (kept < 1)
    everything = tuple(np.ones_like(w) for w in weights)
    one = tuple(np.where(i == 2, 1.0, 0.0) * np.ones_like(w) for i, w in enumerate(weights))
    token = tuple(np.zeros_like(w) for w in weights)
    token[4][-1] = 1.0
    scale = float(sum(np.abs(t).sum() for t in found.tokens))
    for mask, claimed in (
        (everything, found.sequences.sum()),
        (one, found.sequences[2]),
        (token, found.tokens[4][-1]),
    ):
        h = 1e-5 if steps else 1e-7  # the first step is a sign with narrow flanks
        moved = [
            torch_step(policy, step, tuple(w * (1 + s * m) for w, m in zip(weights, mask, strict=True)))
            for s in (h, -h)
        ]
        true = (vectors.dot(moved[0], slope) - vectors.dot(moved[1], slope)) / (2 * h)
        assert claimed == pytest.approx(true, rel=1e-6 if steps else 1e-4, abs=1e-7 * scale)
    if kept < 1:
        assert abs(found.sequences.sum()) < 1e-4 * scale or steps < 1


def test_along_and_pulled_are_transposes() -> None:
    policy = cases.policy(max_grad_norm=0.01)
    step = cases.step(policy, num_prompts=3, group_size=3)
    assert step.clip_coefficient < 0.5
    derivative = step_derivative(policy, step, "optimizer")
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, Tensor]:
        return {n: torch.randn(t.shape, generator=generator).to(t) for n, t in step.ascent.items()}

    change, slope = drawn(), drawn()
    pulled = {n: t[0] for n, t in derivative.pulled({n: t.unsqueeze(0) for n, t in slope.items()}).items()}
    assert vectors.dot(derivative.along(change), slope) == pytest.approx(
        vectors.dot(change, pulled), rel=1e-12
    )


def test_fixed_and_optimizer_agree_where_the_batch_hardly_moves_the_second_moment() -> None:
    policy = cases.policy(max_grad_norm=0.0)
    state = policy.optimizer
    old = replace(
        state,
        steps=dict.fromkeys(state.steps, 10_000),
        exp_avg_sq={n: 1e4 * v for n, v in state.exp_avg_sq.items()},
    )
    policy = replace(policy, optimizer=old)
    update = cases.batch(policy, num_prompts=3, group_size=3)
    probe = cases.batch(policy, num_prompts=12, group_size=1, seed=5)
    step = reconstruct_step(policy, update)
    fixed, optimizer = influences(policy, step, update, probe, options=InfluenceOptions(baseline="position"))
    assert (fixed.through, optimizer.through) == ("fixed", "optimizer")
    assert neglected_share(fixed, optimizer).value < 1e-3
    assert fixed.sum_of_sequences.reliable
    np.testing.assert_allclose(fixed.total.value, optimizer.total.value, rtol=1e-9)
    alone = influence(
        policy, step, update, probe, through="optimizer", options=InfluenceOptions(baseline="position")
    )
    np.testing.assert_allclose(alone.sequences, optimizer.sequences, rtol=1e-9)
    np.testing.assert_allclose(alone.stderr, optimizer.stderr, rtol=1e-9)


def test_what_is_held_fixed_lowers_the_trust() -> None:
    policy = cases.policy(max_grad_norm=0.01)
    update = cases.batch(policy, num_prompts=3, group_size=3)
    probe = cases.batch(policy, num_prompts=12, group_size=1, seed=5)
    step = reconstruct_step(policy, update)
    fixed, optimizer = influences(policy, step, update, probe, options=InfluenceOptions(baseline="position"))
    assert not fixed.sum_of_sequences.reliable
    assert "clipped (c = 0.0" in fixed.sum_of_sequences.reason
    assert "AdamW is at step 4" in fixed.sum_of_sequences.reason
    assert optimizer.sum_of_sequences.reliable
    assert [r for r in fixed.sequence_rows().component if r != "sequence"] == ["momentum", "decay"]
    assert set(optimizer.sequence_rows().component) == {"sequence"}
    with pytest.raises(MeasurementError, match="expected one of fixed, optimizer"):
        influence(policy, step, update, probe, through="adam")
