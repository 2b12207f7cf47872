"""The optimizer and the surroundings of a training under way, read without changing anything."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from stepscope.errors import MeasurementError
from stepscope.policy.distribution import held_in_parts
from stepscope.policy.group import Group, within
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.by_parameter import AsWhole, ByParameter
from stepscope.policy.optim.registry import kind_of, measurable, named_state
from stepscope.policy.shards import is_sharded, of_parts, part
from stepscope.policy.twin import twin_of


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


@contextmanager
def looking_at(
    model: Any, group: Group | None
) -> Iterator[tuple[nn.Module, Mapping[str, nn.Parameter] | None]]:
    """A block in which a training's model is measured with and not disturbed (:func:`undisturbed`).

    Args:
        model: of the training.
        group: the processes that hold parts of it, all of which measure; None where it is whole.

    Yields:
        What to measure with: the model itself and None, or where it is cut a twin on its parts as they are
        now and the training's parameters by their names in it.
    """
    with undisturbed(model):
        if group is None:
            yield model, None
            return
        with within(group):
            yield twin_of(model, group)


def gradient_of(model: nn.Module, own: Mapping[str, nn.Parameter] | None) -> dict[str, Tensor]:
    """The gradient that the parameters of a training hold, as what is measured with holds parameters.

    Args:
        model: as :func:`looking_at` gives it.
        own: as :func:`looking_at` gives it.
    """
    held = dict(model.named_parameters())
    found = {n: p.grad for n, p in (held if own is None else own).items() if p.grad is not None}
    return found if own is None else {n: of_parts(part(g), held[n]) for n, g in found.items()}


def optimizer_within(optimizer: Any, *, parts: bool = False) -> torch.optim.Optimizer:
    """The optimizer inside what accelerate wraps around it.

    Args:
        optimizer: of the trainer.
        parts: whether its state may be cut as FSDP2 cuts it.

    Raises:
        MeasurementError: one whose steps cannot be rebuilt, or whose state is spread over processes.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    sharded = isinstance(inner, torch.optim.Optimizer) and any(
        is_sharded(p) for group in inner.param_groups for p in group["params"]
    )
    kind = kind_of(inner)
    by_parts = parts and kind is not None and issubclass(kind, ByParameter) and not issubclass(kind, AsWhole)
    if kind is None or (sharded and not by_parts):
        raise MeasurementError(
            f"the optimizer is {'sharded ' if sharded else ''}{type(inner).__name__}, and {measurable()}, "
            "with its whole state on every process (one device or data parallelism, no FSDP, no DeepSpeed)"
            + "; under FSDP2 one that treats each number by itself"
            * parts
        )
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    after_backward: bool = True,
    own: Mapping[str, nn.Parameter] | None = None,
) -> OptimizerState:
    """An optimizer's state before the step it is about to take, by parameter name.

    Before the first step it is what the optimizer starts from.

    Args:
        optimizer: without wrappers.
        model: its named parameters are the optimizer's.
        after_backward: gradients are there; parameters that have none are left out, since the optimizer does
            not touch them.
        own: the optimizer's parameters by name, where they are cut and ``model`` is a twin on their parts.
    """
    kind = kind_of(optimizer)
    assert kind is not None
    names = {id(p): n for n, p in (own or dict(model.named_parameters())).items()}
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
    if own is None:
        return named_state({"state": entries, "param_groups": groups}, named, model, where=where)
    parts = {
        number: {key: part(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in entries.items()
    }
    held = {name: part(p).requires_grad_(p.requires_grad) for name, p in own.items()}
    saved = {"state": parts, "param_groups": groups}
    state = named_state(saved, named, model, where=where, parameters=held)
    if state.codes:
        raise MeasurementError(
            f"{state.label} keeps moments in blocks of 8 bits, which FSDP2 cuts; probe another optimizer"
        )
    return held_in_parts(state, dict(model.named_parameters()))


def successive_products(optimizer: torch.optim.Optimizer) -> tuple[float, float] | None:
    """Inner product of the gradient with the mean of those before it, and the gradient's squared norm.

    None before the second step, and for an optimizer that keeps no such mean. Where parameters are cut, every
    process has to call this.
    """
    kind = kind_of(optimizer)
    assert kind is not None
    inner: list[Tensor] = []
    square: list[Tensor] = []
    processes = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mean = kind.mean_gradient(optimizer.state.get(parameter, {}), group)
            if parameter.grad is None or mean is None:
                continue
            gradient = part(parameter.grad).reshape(-1)
            inner.append(torch.dot(gradient, part(mean).reshape(-1).to(gradient.dtype)))
            square.append(torch.dot(gradient, gradient))
            if isinstance(parameter, DTensor):
                processes = parameter.device_mesh.get_group()
    if not inner:
        return None
    found = torch.stack([torch.stack(inner).double().sum(), torch.stack(square).double().sum()])
    if processes is not None:
        dist.all_reduce(found, group=processes)
    return float(found[0]), float(found[1])
