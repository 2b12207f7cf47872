"""What counts as equal where values are ranked."""

from __future__ import annotations

import numpy as np

from stepscope.results import FloatArray

ROUND_OFF = 1e-12
"""Share of the largest size by which values may differ and are equal all the same."""


def without_round_off(values: FloatArray) -> FloatArray:
    """Values made equal, along the last axis, that differ in size by no more than round-off; 0 within it.

    The first tokens of the responses to a prompt have one prefix, so that many are equal by their definition;
    round-off, which depends on what a sequence is padded with, must not put them in an order.
    """
    sizes = np.abs(values)
    within = ROUND_OFF * sizes.max(-1, keepdims=True, where=np.isfinite(values), initial=0.0)
    order = np.argsort(sizes, axis=-1, kind="stable")
    ascending = np.take_along_axis(sizes, order, -1)
    apart = np.diff(ascending, axis=-1, prepend=0.0) > within
    first = np.maximum.accumulate(np.where(apart, np.arange(values.shape[-1]), -1), axis=-1)
    common = np.where(first < 0, 0.0, np.take_along_axis(ascending, np.maximum(first, 0), -1))
    found = np.empty_like(values)
    np.put_along_axis(found, order, common, -1)
    return np.copysign(found, values)
