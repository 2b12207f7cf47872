"""bitsandbytes' AdamW in 8 bits: states that it wrote, and the step that it takes next."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

import cases
import real_steps
from stepscope.errors import CheckpointError
from stepscope.policy import vectors
from stepscope.policy.check.examination import examine
from stepscope.policy.checkpoint.optimizer_state import match_optimizer, read_optimizer
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.bitsandbytes import BitsAndBytesAdamW
from stepscope.policy.optim.registry import kind_of, recognised
from stepscope.policy.state import Policy

NESTED = "__bnb_optimizer_quant_state__"


def trained(
    *,
    kind: Any = bitsandbytes.optim.AdamW8bit,
    dtype: torch.dtype = torch.float32,
    steps: int = 6,
    **options: Any,
) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after real steps in two groups; below 300 elements they keep 32 bits, one is frozen."""
    policy = cases.policy(dtype=dtype, max_grad_norm=0.02)
    named = policy.parameters
    still = next(name for name in named if name.endswith("layers.0.input_layernorm.weight"))
    named[still].requires_grad_(False)
    groups = [
        [p for n, p in named.items() if n != still and (p.dim() > 1) is large] for large in (True, False)
    ]
    optimizer = kind(
        [
            {"params": groups[0], "lr": 1e-3, "weight_decay": 0.1},
            {"params": groups[1], "lr": 2e-3, "weight_decay": 0.0},
        ],
        min_8bit_size=300,
        **options,
    )
    real_steps.train(policy, optimizer, steps=steps)
    for group in optimizer.param_groups:
        group["lr"] *= 300  # steps that are large beside the round-off of float32 weights
    return policy, optimizer


def matched(policy: Policy, optimizer: torch.optim.Optimizer) -> Policy:
    """With the optimizer's state by name."""
    wide = torch.float64 if policy.dtype == torch.float64 else None
    policy = real_steps.matched(policy, optimizer, dtype=wide)
    assert isinstance(policy.optimizer, BitsAndBytesAdamW)
    return policy


def of_cpu(policy: Policy) -> Policy:
    assert isinstance(policy.optimizer, BitsAndBytesAdamW)
    return replace(policy, optimizer=policy.optimizer.of_cpu())


@pytest.mark.parametrize("max_grad_norm", [0.02, 0.0])
def test_the_step_is_the_librarys(max_grad_norm: float) -> None:
    policy, optimizer = trained(dtype=torch.float64)  # which the library rounds to float32 and back
    policy = of_cpu(matched(policy, optimizer))
    policy = replace(policy, settings=replace(policy.settings, max_grad_norm=max_grad_norm))
    assert policy.optimizer is not None
    assert 0 < len(policy.optimizer.codes["exp_avg"]) < len(policy.optimizer.names)
    step = cases.step(policy, seed=50)
    assert (step.clip_coefficient < 1) == (max_grad_norm > 0)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=1e-5, atol=1e-6)


def test_parameters_in_bfloat16_are_rounded_once_by_a_step() -> None:
    """The library computes in float32: where it ends is the number nearest to params + lr * direction."""
    policy, optimizer = trained(dtype=torch.bfloat16)
    state = of_cpu(matched(policy, optimizer)).optimizer
    assert state is not None
    assert not state.moment_types  # nothing in the state tells the type of the parameters
    before = {n: p.detach().float() for n, p in policy.parameters.items() if p.grad is not None}
    ascent = {n: 0.01 * torch.randn_like(p).bfloat16() for n, p in before.items()}
    made = state.update(before, ascent, clip=1.0, lr=1e-2)
    direction = vectors.add(made.made_of(ascent), *made.parts.values())
    for name, own in ascent.items():
        policy.parameters[name].grad = -own
    optimizer.step()
    for name, p in before.items():
        expected = (p + 1e-2 * direction[name]).bfloat16()
        moved = policy.parameters[name].detach()
        assert not torch.equal(moved.float(), p)
        # a sum on the edge between two numbers may fall to either
        assert float((moved != expected).float().mean()) < 0.01
        torch.testing.assert_close(moved, expected, rtol=2**-7, atol=0)


def kernel(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, group: Any) -> Tensor:
    """One step as ``kOptimizerStatic8bit2StateBlockwise`` takes it (``csrc/kernels.cu``), in float64."""
    b1, b2 = group["betas"]
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    root = (1 - b2**t) ** 0.5
    moved = p - group["lr"] * root / (1 - b1**t) * m / (v.sqrt() + group["eps"] * root)
    return moved * (1 - group["lr"] * group["weight_decay"])


def test_on_a_gpu_the_decay_comes_last() -> None:
    """No GPU here: the step is held to the kernel's formula, and its distance from the CPU's to its bound."""
    policy, optimizer = trained(dtype=torch.float64)
    policy = matched(policy, optimizer)
    state = policy.optimizer
    assert isinstance(state, BitsAndBytesAdamW)
    step = cases.step(policy, seed=50)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in policy.parameters.items():
        moments = state.exp_avg[name], state.exp_avg_sq[name]
        g = -step.clip_coefficient * step.ascent[name]
        after = kernel(p.detach(), g, *moments, state.steps[name] + 1, groups[id(p)])
        torch.testing.assert_close(
            step.direction[name], (after - p.detach()) / step.lr, rtol=1e-9, atol=1e-12
        )
    other = cases.step(of_cpu(policy), seed=50)
    apart = vectors.norm(vectors.add(step.direction, vectors.scale(other.direction, -1)))
    bound = max(g["lr"] * g["weight_decay"] for g in optimizer.param_groups)
    update = vectors.add(*(part for name, part in other.components.items() if name != "decay"))
    assert 0 < apart <= bound * vectors.norm(update) * (1 + 1e-9)


def test_its_derivative_is_that_of_its_step() -> None:
    policy, optimizer = trained(dtype=torch.float64)
    policy = matched(policy, optimizer)
    real_steps.assert_derivative_is_that_of_the_step(
        policy, cases.step(policy, seed=50), h=1e-6, rtol=1e-4, relative_atol=1e-5
    )


def flat(saved: dict[str, Any]) -> dict[str, Any]:
    """As before 2026."""
    state = {n: {"step": entry["step"], **entry[NESTED]} for n, entry in saved["state"].items()}
    return {**saved, "state": state}


def test_layouts_and_classes_are_one_state(tmp_path: Path) -> None:
    policy, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    torch.save(saved, tmp_path / "optimizer.pt")
    first = match_optimizer(read_optimizer(tmp_path / "optimizer.pt"), policy.model, where="here")
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        _, paged = trained(kind=bitsandbytes.optim.PagedAdamW8bit)
    for other in (flat(saved), paged.state_dict()):
        second = match_optimizer(other, policy.model, where="here")
        assert second.groups == first.groups
        for key, tensors in first.tensors().items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(second.tensors()[key][name], tensor, rtol=0, atol=0)
    for kind in (bitsandbytes.optim.AdamW, bitsandbytes.optim.Adam8bit, bitsandbytes.optim.PagedAdamW32bit):
        assert kind_of(kind([torch.nn.Parameter(torch.ones(2))])) is BitsAndBytesAdamW
    for kind in (bitsandbytes.optim.AdEMAMix, bitsandbytes.optim.LAMB, bitsandbytes.optim.Adagrad8bit):
        assert kind_of(kind([torch.nn.Parameter(torch.ones(2))], lr=1e-3)) is not BitsAndBytesAdamW


def test_check_tells_what_8_bits_lost() -> None:
    settings = StepSettings(group_size=2, prompts_per_step=2, max_response_tokens=6)
    policy = Policy(cases.model(), cases.tokenizer(), settings)
    optimizer: Any = bitsandbytes.optim.AdamW8bit(policy.parameters.values(), lr=1e-3, min_8bit_size=300)
    real_steps.train(policy, optimizer, steps=2)
    (told,) = [f for f in examine(matched(policy, optimizer)) if "8 bits" in f.what]
    assert told.level == "ok"
    lost = {key: float(value) for key, value in re.findall(r"(exp_avg\w*) (\S+) of its norm", told.what)}
    assert list(lost) == ["exp_avg", "exp_avg_sq"]
    assert all(1e-3 < value < 0.1 for value in lost.values())


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("qmap1", None, "codes without a map"),
        ("absmax2", torch.ones(1), "magnitudes of shape"),
        ("qmap2", torch.ones(256), "not ascending"),
        ("state1", torch.ones(32, 16, dtype=torch.float16), "codes of type torch.float16"),
        ("new_max1", torch.ones(1), "without blocks"),
        ("gnorm_vec", torch.ones(100), "percentile clipping"),
        ("unorm_vec", torch.ones(1), "LAMB"),
    ],
)
def test_what_is_not_such_a_state_is_refused(key: str, value: Any, told: str) -> None:
    policy, optimizer = trained(steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    entry = next(e[NESTED] for e in saved["state"].values() if "qmap1" in e[NESTED])
    if value is None:
        del entry[key]
    else:
        entry[key] = value
    with pytest.raises(CheckpointError, match=told):
        match_optimizer(saved, policy.model, where="here")


def test_optimizers_of_bitsandbytes_that_are_not_adamw_are_refused() -> None:
    for kind, named in (
        (bitsandbytes.optim.AdEMAMix8bit, "not AdamW"),
        (bitsandbytes.optim.LAMB8bit, "LAMB"),
        (bitsandbytes.optim.RMSprop8bit, "not AdamW"),
        (bitsandbytes.optim.Adagrad8bit, "not AdamW"),
        (bitsandbytes.optim.SGD8bit, "not AdamW"),
    ):
        parameter = torch.nn.Parameter(torch.ones(80, 80))
        options = {"momentum": 0.9} if "SGD" in kind.__name__ else {}
        optimizer = kind([parameter], lr=1e-3, **options)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with pytest.raises(CheckpointError, match=named):
            recognised(optimizer.state_dict(), "here")
