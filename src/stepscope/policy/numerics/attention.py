"""Attention with derivatives of every order in both modes, for some queries at a time.

Of torch's kernels only the mathematical one has forward-mode rules, and it holds a number for every pair of
positions and head. Queries are independent, so they go in blocks that keep within a fixed number of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stepscope.policy.numerics.differentiation import Substituted, num_lanes

BLOCK_BYTES = 2 * 2**20
"""Scores of queries against keys that are made at a time; a few times as much is held while they are used."""

FEWEST = 16
"""Queries that are taken at a time, at least."""

ON_GPU = 64
"""How many times as much on a GPU, which has no use for little at a time."""


@contextmanager
def mathematical_attention() -> Iterator[None]:
    """Inside, ``scaled_dot_product_attention`` runs on the mathematical kernel, in blocks of queries."""
    with sdpa_kernel(SDPBackend.MATH), Substituted({scaled_dot_product_attention: in_blocks}):
        yield


def in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, the same sums for some queries at a time.

    Args:
        query: (..., pos, head) as torch takes it, like the others.
        key: (..., pos, head).
        value: (..., pos, head).
        attn_mask: (..., queries or 1, keys) True or a number to add, or None.
        dropout_p: as torch takes it.
        is_causal: query i sees keys up to the i-th.
        options: ``scale`` and ``enable_gqa``.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    each = query.shape[:-2].numel() * keys * query.element_size() * num_lanes()
    most = BLOCK_BYTES * (1 if query.device.type == "cpu" else ON_GPU)
    size = max(FEWEST, most // max(1, each))
    if size >= queries:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    found = []
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        mask, seen = attn_mask, keys
        if is_causal:
            seen = min(stop, keys)
            mask = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device).tril(start)
        elif mask is not None and mask.shape[-2] > 1:
            mask = mask[..., start:stop, :]
        block = query[..., start:stop, :], key[..., :seen, :], value[..., :seen, :]
        found.append(scaled_dot_product_attention(*block, mask, dropout_p, **options))
    return torch.cat(found, -2)
