"""The optimizer and the surroundings of a training under way, read without changing anything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.registry import kind_of, measurable, named_state


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Inside the block anything may be sampled and computed; the training goes on as if it had not been.

    Random states (Python, NumPy, torch on CPU and GPU) and the mode of every module come back afterwards.
    The model is in evaluation mode and free of automatic mixed precision: it computes in the type of its
    weights, because the change of one step is smaller than the rounding of bfloat16. It is also free of the
    hooks that gradient checkpointing puts on the embeddings, which forward mode cannot pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules() if module._forward_hooks]
    kept = vars(model).get("forward")
    if "_original_forward" in vars(model):  # where accelerate keeps what it wrapped
        model.forward = model._original_forward
    for module, registered in hooks:
        for number, hook in registered.items():
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[number]
    model.eval()
    try:
        yield
    finally:
        for module, registered in hooks:
            module._forward_hooks.clear()
            module._forward_hooks.update(registered)
        for module, mode in modes:
            module.training = mode
        if kept is not None:
            model.forward = kept
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def optimizer_within(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside what accelerate wraps around it.

    Raises:
        MeasurementError: one whose steps cannot be rebuilt, or whose state is spread over processes.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    sharded = isinstance(inner, torch.optim.Optimizer) and any(
        hasattr(p, "device_mesh") for group in inner.param_groups for p in group["params"]
    )
    if kind_of(inner) is None or sharded:
        raise MeasurementError(
            f"the optimizer is {'sharded ' if sharded else ''}{type(inner).__name__}, and {measurable()}, "
            "with its whole state on every process (one device or data parallelism, no FSDP, no DeepSpeed)"
        )
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, after_backward: bool = True
) -> OptimizerState:
    """An optimizer's state before the step it is about to take, by parameter name.

    Before the first step it is what the optimizer starts from.

    Args:
        optimizer: without wrappers.
        model: its named parameters are the optimizer's.
        after_backward: gradients are there; parameters that have none are left out, since the optimizer does
            not touch them.
    """
    kind = kind_of(optimizer)
    assert kind is not None
    names = {id(p): n for n, p in model.named_parameters()}
    saved = optimizer.state_dict()
    entries, groups, named = dict(saved["state"]), [], []
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        every = zip(group["params"], live["params"], strict=True)
        numbers = [(i, p) for i, p in every if p.grad is not None or not after_backward]
        for number, parameter in numbers:
            if not entries.get(number):
                entries[number] = kind.fresh(parameter, group)
        groups.append(group | {"params": [i for i, _ in numbers]})
        named.append([names[id(p)] for _, p in numbers])
    where = "the running optimizer"
    return named_state({"state": entries, "param_groups": groups}, named, model, where=where)


def successive_products(optimizer: torch.optim.Optimizer) -> tuple[float, float] | None:
    """Inner product of the gradient with the mean of those before it, and the gradient's squared norm.

    None before the second step, and for an optimizer that keeps no such mean.
    """
    kind = kind_of(optimizer)
    assert kind is not None
    inner: list[Tensor] = []
    square: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mean = kind.mean_gradient(optimizer.state.get(parameter, {}), group)
            if parameter.grad is None or mean is None:
                continue
            gradient = parameter.grad.reshape(-1)
            inner.append(torch.dot(gradient, mean.reshape(-1).to(gradient.dtype)))
            square.append(torch.dot(gradient, gradient))
    if not inner:
        return None
    return float(torch.stack(inner).double().sum()), float(torch.stack(square).double().sum())
