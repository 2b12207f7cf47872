"""Estimates per token of the KL divergence to a reference policy, as penalties in a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def schulman(gap: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = l_ref - l (TRL's; "k3" of Schulman 2020, "Approximating KL divergence")."""
    return torch.exp(gap) - gap - 1


def _bounded(gap: Tensor) -> Tensor:
    return schulman(gap.clamp(-20, 20)).clamp(-10, 10)


KL_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: -gap,
    "abs": torch.abs,
    "k2": lambda gap: 0.5 * gap.square(),
    "k3": _bounded,
}
"""verl's, of d = l_ref - l: -d, |d|, d^2/2, and exp(d) - d - 1 with d within 20 and the whole within 10."""

ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
"""verl's other names of them."""


def known_penalty(name: str) -> bool:
    """Whether verl has a penalty of this name, which may end in ``+``."""
    base = name.removesuffix("+")
    return ALIASES.get(base, base) in KL_PENALTIES


def kl_penalty(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(seq, tok) penalty; a name that ends in ``+`` has that value and the gradient of ``k2``.

    Source: verl's ``kl_penalty``. Pinned by ``tests/policy/test_verl_losses.py``.
    """
    base = name.removesuffix("+")
    base = ALIASES.get(base, base)
    gap = ref_logprobs - logprobs
    value = KL_PENALTIES[base](gap)
    if base == "k2" or not name.endswith("+"):
        return value
    pull = KL_PENALTIES["k2"](gap)
    return pull - pull.detach() + value.detach()
