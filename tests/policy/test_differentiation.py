"""Nested forward mode through LayerNorm: wrong in PyTorch, right in ours; functions that adapters hide."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, RandLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import layer_norm as torch_layer_norm

import cases
from stepscope.measure.change.measured import measure_change
from stepscope.policy.check.derivatives import random_direction
from stepscope.policy.check.examination import examine
from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
from stepscope.policy.gradients.products import per_sequence_dot
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.differentiation import differentiable, layer_norm
from stepscope.policy.numerics.precision import lift_model, true_float64
from stepscope.policy.rollouts import sample_rollouts, score_rollouts
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted

X = torch.linspace(-2, 3, 24, dtype=torch.float64).reshape(3, 8).sin()
V = torch.linspace(1, 5, 24, dtype=torch.float64).reshape(3, 8).cos()


def curvature_error(norm: Callable[[Tensor], Tensor]) -> float:
    """Relative error of jvp of jvp against a central difference of jvp."""

    def slope(x: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(lambda a: norm(a).pow(3).sum(), (x,), (V,))[1]
        return found

    curvature = float(torch.func.jvp(slope, (X,), (V,))[1])
    expected = float(slope(X + 1e-5 * V) - slope(X - 1e-5 * V)) / 2e-5
    return abs(curvature - expected) / abs(expected)


def test_ours_is_right_and_the_reason_for_it_still_stands() -> None:
    assert curvature_error(lambda x: layer_norm(x, (8,))) < 1e-6
    assert curvature_error(lambda x: torch_layer_norm(x, (8,))) > 1e-2, "PyTorch mended it: drop this module"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_pytorchs(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(8, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
        norm.bias.copy_(torch.linspace(-1, 1, 8))
    found = []
    for context in (differentiable(norm), differentiable(nn.Linear(1, 1))):
        x = X.to(dtype).requires_grad_(True)
        with context:
            y = norm(x)
        found.append((y, *torch.autograd.grad((y * V.to(dtype)).sum(), [x, norm.weight, norm.bias])))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


ADAPTERS = {
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "dora of an embedding": LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "randlora": RandLoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "parameters": LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_both_modes_differentiate_the_function_or_what_training_does(
    name: str, letters: Any, tokenizer: Any
) -> None:
    """Of the function: against central differences. As trained: against plain autograd on PEFT's own code."""
    model: Any = get_peft_model(cases.model("llama"), ADAPTERS[name])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy = Policy(lift_model(model.eval()), tokenizer, StepSettings(max_response_tokens=4))
    rollouts = sample_rollouts(policy, letters, num_prompts=2, group_size=2, seed=0)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.parameters.items()
    }

    def total() -> float:
        return float(sum(row.sum() for row in score_rollouts(policy, rollouts)[0]))

    sides = []
    for h in (1e-6, -1e-6):
        with shifted(policy.parameters, direction, h):
            sides.append(total())
    ids = [
        torch.tensor(p + r)
        for p, r in zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True)
    ]
    with true_float64():
        plain = sum(
            policy.model(row[None])
            .logits[0, :-1]
            .log_softmax(-1)[torch.arange(len(row) - 1), row[1:]][-n:]
            .sum()
            for row, n in zip(ids, rollouts.num_tokens, strict=True)
        )
        grads = torch.autograd.grad(plain, list(policy.parameters.values()))
    trained = sum(float((g * direction[n]).sum()) for n, g in zip(policy.parameters, grads, strict=True))
    for as_trained, expected, rel in ((False, (sides[0] - sides[1]) / 2e-6, 1e-6), (True, trained, 1e-10)):
        found = gradient(policy, rollouts, response_logprob, as_trained=as_trained)
        assert sum(float((found[n] * direction[n]).sum()) for n in found) == pytest.approx(expected, rel=rel)
        for mode in ("forward", "double_backward"):
            along = directional_derivative(
                policy, rollouts, response_logprob, direction, mode=mode, as_trained=as_trained
            )
            assert sum(float(row.sum()) for row in along) == pytest.approx(expected, rel=rel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dots = per_sequence_dot(
                policy, SequenceGradients(rollouts, response_logprob, as_trained), direction
            )
        assert dots.sum() == pytest.approx(expected, rel=rel)
    assert (abs(trained * 2e-6 - (sides[0] - sides[1])) > 1e-9) == name.startswith("dora")


def test_derivatives_that_are_not_the_functions_are_doubted(tokenizer: Any, letters: Any) -> None:
    """A norm detached by whoever wrote the model, which no list of ours knows."""

    class Detaching(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.inner(x) / self.inner.weight.norm().detach()
            return scaled

    model: Any = cases.model("llama")
    sound = Policy(model, tokenizer, StepSettings(max_response_tokens=6))
    rollouts = sample_rollouts(sound, letters, num_prompts=4, group_size=1, seed=0)
    step = RandomStep(random_direction(sound), 1e-3)
    assert "differ from those" not in measure_change(sound, step, rollouts).slope.reason
    assert not any("differ from those" in f.what for f in examine(sound))
    for layer in model.model.layers:
        layer.mlp.down_proj = Detaching(layer.mlp.down_proj)
    policy = replace(sound, model=model)
    step = RandomStep(random_direction(policy), 1e-3)
    change = measure_change(policy, step, rollouts)
    assert "forward-mode derivatives of this model differ" in change.slope.reason
    assert not change.points[0].linear.reliable
    assert "derivatives" not in change.points[0].true.reason
    assert [f.level for f in examine(policy) if "differ from those of its function" in f.what] == ["warn"]


@dataclass(frozen=True)
class RandomStep:
    direction: dict[str, Tensor]
    lr: float
