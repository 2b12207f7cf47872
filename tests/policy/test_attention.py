"""Attention in blocks of queries is torch's, with its derivatives, and holds no square of positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import cases
from stepscope.policy.gradients.derivatives import directional_derivative, response_logprob
from stepscope.policy.numerics import attention

QUERIES, KEYS = 11, 13


def tensors(heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(3, heads, QUERIES, 8, dtype=torch.float64)
    return query, *torch.randn(2, 3, groups, KEYS, 8, dtype=torch.float64).unbind()


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "causal": lambda: {"is_causal": True},
    "scaled": lambda: {"scale": 0.7},
    "True where seen": lambda: {"attn_mask": torch.rand(3, 1, QUERIES, KEYS) < 0.7},
    "added": lambda: {"attn_mask": torch.randn(QUERIES, KEYS, dtype=torch.float64)},
    "one row for all": lambda: {"attn_mask": torch.randn(3, 1, 1, KEYS, dtype=torch.float64)},
}


@pytest.mark.parametrize("mask", MASKS)
def test_blocks_are_the_whole(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors()
    options = {"enable_gqa": True, **MASKS[mask]()}
    moved = torch.randn_like(query)

    def along(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            found: tuple[Tensor, Tensor] = torch.func.jvp(
                lambda q: function(q, key, value, **options), (query,), (moved,)
            )
        return found

    whole = along(scaled_dot_product_attention)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 3 * 4 * KEYS * 8 * 3)  # three queries
    monkeypatch.setattr(attention, "FEWEST", 1)
    torch.testing.assert_close(along(attention.in_blocks), whole, rtol=1e-13, atol=1e-13)


def test_token_derivatives_of_a_long_response_hold_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = cases.policy()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, cases.VOCAB, (120,), generator=generator).tolist()
    update = cases.rollouts([tuple(ids[:4])], [tuple(ids[4:])], temperature=1.0)
    whole = directional_derivative(policy, update, response_logprob, dict(policy.parameters))
    heads, length = policy.model.config.num_attention_heads, len(ids)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 8 * heads * length * 10)  # ten queries
    monkeypatch.setattr(attention, "FEWEST", 1)
    with cases.Largest(Tensor.is_floating_point) as largest:
        found = directional_derivative(policy, update, response_logprob, dict(policy.parameters))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    assert 0 < largest.found < heads * length**2 / 2
