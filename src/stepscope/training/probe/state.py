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
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.state import OptimizerState


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


def adamw_of(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside what accelerate wraps around it.

    Raises:
        MeasurementError: another optimizer, or one whose state is spread over processes.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    sharded = isinstance(inner, torch.optim.Optimizer) and any(
        hasattr(p, "device_mesh") for group in inner.param_groups for p in group["params"]
    )
    if type(inner).__name__ != "AdamW" or not isinstance(inner, torch.optim.AdamW) or sharded:
        raise MeasurementError(
            f"the optimizer is {'sharded ' if sharded else ''}{type(inner).__name__}, expected "
            "torch's AdamW with its whole state on every process; set optim='adamw_torch' and train on one "
            "device or with plain data parallelism (no FSDP, no DeepSpeed)"
        )
    return inner


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, after_backward: bool = True
) -> OptimizerState:
    """AdamW's state before the step it is about to take, by parameter name.

    Before the first step the moments are zero.

    Args:
        optimizer: without wrappers.
        model: its named parameters are the optimizer's.
        after_backward: gradients are there; parameters that have none are left out, since the optimizer does
            not touch them.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    saved = optimizer.state_dict()
    entries = dict(saved["state"])
    groups = []
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        every = zip(group["params"], live["params"], strict=True)
        numbers = [(i, p) for i, p in every if p.grad is not None or not after_backward]
        for number, parameter in numbers:
            if number not in entries:
                entries[number] = _fresh(parameter, amsgrad=bool(group.get("amsgrad")))
        groups.append(
            group | {"params": [i for i, _ in numbers], "param_names": [names[id(p)] for _, p in numbers]}
        )
    return match_optimizer({"state": entries, "param_groups": groups}, model, where="the running optimizer")


def _fresh(parameter: Tensor, *, amsgrad: bool) -> dict[str, Any]:
    """AdamW's state before a first step."""
    zero = torch.zeros_like(parameter)
    entry: dict[str, Any] = {"step": 0, "exp_avg": zero, "exp_avg_sq": zero}
    return entry | {"max_exp_avg_sq": zero} if amsgrad else entry


def successive_products(optimizer: torch.optim.Optimizer) -> tuple[float, float] | None:
    """Inner product of the gradient with the bias-corrected first moment, and the gradient's squared norm.

    None before the second step, when there is no first moment.
    """
    inner: list[Tensor] = []
    square: list[Tensor] = []
    for group in optimizer.param_groups:
        beta = float(group["betas"][0])
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            if parameter.grad is None or "exp_avg" not in entry:
                continue
            gradient = parameter.grad.reshape(-1)
            corrected = 1 - beta ** float(entry["step"])
            inner.append(torch.dot(gradient, entry["exp_avg"].reshape(-1).to(gradient.dtype)) / corrected)
            square.append(torch.dot(gradient, gradient))
    if not inner:
        return None
    return float(torch.stack(inner).double().sum()), float(torch.stack(square).double().sum())
