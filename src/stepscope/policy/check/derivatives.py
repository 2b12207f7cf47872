"""Are the derivatives that torch gives those of the function? Compared with differences, on any model.

A model may detach what depends on its parameters, change gradients in hooks, or have a wrong rule: then the
slope of a quantity is not the derivative of its true change, and no error bar shows it. Three forward passes
and a backward pass over a few sequences tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy import vectors
from stepscope.policy.forward import TokenBatch, excluded_logit, forward
from stepscope.policy.numerics.attention import mathematical_attention
from stepscope.policy.numerics.differentiation import whole_function
from stepscope.policy.sharding import along, pulled_back
from stepscope.policy.shards import is_sharded, of_parts, part, span, sum_over_parts
from stepscope.policy.state import Policy

TOLERANCE = 0.02
"""Relative difference from which derivatives are doubted; DoRA's detached norm made .05 to .4."""

FARTHEST = 0.1
"""Largest share of the parameters' norm that the differences move: products of weights are curved beyond."""

UPPER = 0.75
"""Quantile of tokens that is compared: an expert chosen anew moves a few tokens by a jump."""


@dataclass(frozen=True)
class DerivativeErrors:
    """Relative errors of the derivatives of token log-probs along a direction.

    Attributes:
        forward: of forward mode against central differences, token by token.
        reverse: of reverse mode against forward mode, of the sum over tokens.
    """

    forward: float
    reverse: float

    @property
    def slope_doubt(self) -> str:
        """What is wrong with slopes, in words; empty where nothing is. An error of nan is wrong, too."""
        return _doubt("forward", self.forward)

    @property
    def doubt(self) -> str:
        """What is wrong with slopes or gradients."""
        return self.slope_doubt or _doubt("reverse", self.reverse)


def _doubt(mode: str, error: float) -> str:
    if error <= TOLERANCE:
        return ""
    return f"{mode}-mode derivatives of this model differ from those of its function by {error:.1%}"


def derivative_errors(
    policy: Policy,
    batch: TokenBatch,
    direction: Mapping[str, Tensor],
    *,
    temperature: float,
    reverse: bool = True,
) -> DerivativeErrors:
    """Compare derivatives of the function, as quantities use them, with central differences.

    The step of the differences moves log-probs by eps^(1/3), where rounding and curvature are both far below
    what is looked for, but parameters never by more than :data:`FARTHEST` (an adapter that says nearly
    nothing yet would be moved by many times its size); what rounding may explain is taken off.

    Args:
        policy: not changed.
        batch: a few sequences.
        direction: by parameter name.
        temperature: of the policy.
        reverse: compare reverse mode too, which holds a gradient of all parameters; else its error is 0.

    Raises:
        MeasurementError: the model loses parameters when it is run with other values of them.
    """
    params = {n: policy.parameters[n].detach() for n in direction}
    mask = batch.response_mask
    eps = torch.finfo(policy.dtype).eps

    def at(lr: Tensor) -> Tensor:
        here = along(direction, lr)
        logprobs = forward(policy.model, batch, temperature=temperature, params=here).logprobs
        return logprobs[mask]

    with mathematical_attention(), whole_function(policy.model):
        zero = torch.zeros((), dtype=policy.dtype, device=policy.device)
        with torch.no_grad():
            both = torch.func.jvp(at, (zero,), (torch.ones_like(zero),))
            level, slope = both[0], both[1]
            speed = slope.square().mean().sqrt()
            if speed == 0:
                return DerivativeErrors(0.0, 0.0)
            reach = eps ** (1 / 3) / speed
            size, moved = vectors.norm(params), vectors.norm(direction)
            if size > 0:
                reach = reach.clamp(max=FARTHEST * size / moved)
            difference = (at(reach) - at(-reach)) / (2 * reach)
        own = policy.parameters
        if lost := sorted(set(direction) - set(own)):
            raise MeasurementError(
                f"{lost[0]}: the adapter shares this parameter among layers and loses it when the model "
                "is run with other values, so no step can be taken; use an adapter of another kind"
            )
        summed = float(slope.sum())
        if reverse:
            with torch.enable_grad():
                total = forward(policy.model, batch, temperature=temperature).logprobs[mask].sum()
                grads = pulled_back(policy.model, total, [own[n] for n in direction], same=True)
            found = {n: g for n, g in zip(direction, grads, strict=True) if g is not None}
            summed = vectors.dot(found, direction)
    rounding = 200 * eps * float(1 + level.abs().mean()) / float(reach)
    apart = float((difference - slope).abs().float().quantile(UPPER)) - rounding
    typical, whole = float(slope.abs().float().quantile(UPPER)), float(slope.abs().sum())
    return DerivativeErrors(
        forward=_above(apart) / (typical or float(speed)),
        reverse=_above(abs(summed - float(slope.sum())) - 10 * eps * whole) / whole,
    )


def _above(error: float) -> float:
    """The error beyond rounding; nan stays nan."""
    return 0.0 if error <= 0 else error


def random_direction(policy: Policy) -> dict[str, Tensor]:
    """A direction in which every trainable parameter moves in proportion to its size, and grows.

    Growth moves what a random direction hardly does: the norm of a matrix. Rows of padding tokens stay put as
    in training; where they are zero, a norm after them bends at once. So do biases that exclude a token.
    """
    generator = torch.Generator().manual_seed(0)
    still = {
        id(module.weight): module.padding_idx
        for module in policy.model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    }
    found = {}
    for name, parameter in policy.parameters.items():
        values, rows = part(parameter), span(parameter)
        noise = torch.randn(parameter.shape, generator=generator)
        own = (noise[rows] if is_sharded(parameter) else noise).to(values)
        excluding = values < excluded_logit(values.dtype)
        squares = sum_over_parts(values.masked_fill(excluding, 0.0).square().sum(), [parameter])
        size = (squares / parameter.numel()).sqrt()
        moved = (values + own * (size + 1e-3)).masked_fill(excluding, 0.0)
        if id(parameter) in still and rows.start <= (row := still[id(parameter)]) < rows.stop:
            moved[row - rows.start] = 0.0
        found[name] = of_parts(moved, parameter)
    return found
