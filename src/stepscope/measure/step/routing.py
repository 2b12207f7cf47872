"""How many choices of a mixture's routers one step flips.

In each layer a router sends every token to k of the experts. A quantity of the policy is smooth but where
such a choice flips, and first order knows nothing of flips: it is that of the choices as they are. Counted
are tokens of prompts and responses, padding left out, at theta and at theta' = theta + lr * direction (or
where a training in a half type is), both at the measurement's precision and in the same micro-batches:

    share of choices = mean over tokens, layers and their k experts of [the expert is not chosen at theta']
    share of tokens  = mean over tokens of [some choice of some layer flips]

What a router has chosen is what transformers hands to the experts. Pinned by
``tests/measure/test_routing.py`` against the largest router logits of each sequence alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepscope.measure.step.reconstruct import Step
from stepscope.policy.forward import TokenBatch, forward
from stepscope.policy.group import current
from stepscope.policy.passes import Budget, sweep
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, placed, shifted
from stepscope.results.step import Routing
from stepscope.stats import Estimate, exact

_CHOSEN = ("top_k_index", "router_indices")
"""What transformers calls the (token, k) chosen experts where it hands them on."""


def routing_change(
    policy: Policy,
    step: Step,
    *,
    lr: float,
    taken: ParameterVector | None = None,
    budget: Budget = Budget(),
) -> Routing | None:
    """The choices that differ before and after the step, on its own batch.

    Args:
        policy: where the step starts; its parameters are restored bitwise.
        step: the step.
        lr: learning rate at which it is taken.
        taken: theta', where it is not theta + lr * direction.
        budget: what may be used at a time.

    Returns:
        None for a model without experts, or one that does not hand choices on.
    """
    layers = {module: place for module in policy.model.modules() if (place := _place(module)) is not None}
    if not layers:
        return None
    before = list(_choices(policy, step, layers, budget))
    parameters = policy.parameters
    with shifted(parameters, step.direction, lr) if taken is None else placed(parameters, taken):
        after = list(_choices(policy, step, layers, budget))
    parts = current().gather([_flipped(old, new) for old, new in zip(before, after, strict=True)])
    flipped = torch.cat([part for own in parts for part in own], dim=1)
    by_layer = flipped.double().mean((1, 2))
    return Routing(
        lr=lr,
        num_tokens=flipped.shape[1],
        experts_per_token=flipped.shape[2],
        share_choices=float(by_layer.mean()),
        share_tokens=float(flipped.any(2).any(0).double().mean()),
        share_by_layer=tuple(by_layer.tolist()),
    )


def routing_figures(found: Routing, count: int) -> dict[str, Estimate]:
    """The headline figures of what the routers flipped.

    Args:
        found: of the step.
        count: prompts of the update batch.
    """
    how = (
        f"experts chosen at theta and after the step at lr {found.lr:g}, on {found.num_tokens} tokens of the "
        "update batch and its prompts; exact for this update batch"
    )
    return {
        "routing_share_choices": exact(found.share_choices, count, "share of choices", how),
        "routing_share_tokens": exact(found.share_tokens, count, "share of tokens", how),
    }


def _choices(
    policy: Policy, step: Step, layers: dict[nn.Module, tuple[str, int]], budget: Budget
) -> Iterator[Tensor]:
    """Of each micro-batch (layer, token, k) chosen experts, without padding."""

    def run(batch: TokenBatch) -> Tensor:
        with torch.no_grad(), _recorded(layers) as found:
            forward(policy.model, batch, temperature=policy.settings.temperature)
        real = batch.attention_mask.bool().flatten()
        return torch.stack([chosen.reshape(len(real), -1)[real].cpu() for chosen in found])

    for _, chosen in sweep(policy, step.update, run, budget=budget):
        yield chosen


def _flipped(old: Tensor, new: Tensor) -> Tensor:
    """(layer, token, k) whether an expert of ``old`` is none of ``new``."""
    return torch.stack([~(a[:, :, None] == b[:, None]).any(2) for a, b in zip(old, new, strict=True)])


def _place(module: nn.Module) -> tuple[str, int] | None:
    """Name and position of the argument in which a module is given chosen experts."""
    names = list(inspect.signature(module.forward).parameters)
    return next(((name, names.index(name)) for name in _CHOSEN if name in names), None)


@contextmanager
def _recorded(layers: dict[nn.Module, tuple[str, int]]) -> Iterator[list[Tensor]]:
    """A block in which what the modules are given is noted, in the order of their calls."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, position = layers[module]
        found.append(kwargs[name] if name in kwargs else args[position])

    with ExitStack() as stack:
        for module in layers:
            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield found
