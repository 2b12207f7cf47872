"""Random projections of per-sequence gradients: kernels of batches whose gradients fit nowhere.

Each parameter's gradient is multiplied by random signs, its entries are dealt at random into ``dim`` bins of
equal size, and each bin is summed (a count sketch, Charikar et al. 2002). Inner products of sketches are
unbiased for those of the gradients, E over signs, with standard deviation at most about
sqrt((|a|^2 |b|^2 + (a.b)^2) / dim): an error of 1/sqrt(dim) on a cosine.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy.gradients.layer_gradient import LayerGradient
from stepscope.policy.gradients.products import check_metrics, compute_dtype
from stepscope.policy.gradients.store import Metrics
from stepscope.policy.gradients.stream import SequenceGradients, stream
from stepscope.policy.group import current
from stepscope.policy.passes import Budget
from stepscope.policy.sharding import sharded
from stepscope.policy.state import Policy

SLICE = 2**22
CACHE_NUMBERS = 2**26


class Sketch:
    """The fixed random map from parameter space to ``dim`` numbers; equal seeds give equal maps.

    Args:
        dim: numbers kept per sequence.
        seed: of signs and bins.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        self.dim = dim
        self.seed = seed
        self._cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._cached = 0

    def add(self, gradient: LayerGradient, out: Mapping[str, Tensor], roots: Mapping[str, Tensor]) -> None:
        """Add one parameter's sketch to ``out``.

        Args:
            gradient: of some sequences.
            out: metric to (seq, dim) sketches of those sequences.
            roots: metric to sqrt(P) of this parameter, flat; metrics without an entry are the identity.
        """
        rows, cols = gradient.shape
        step = max(1, SLICE // cols)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            plain = gradient.dense(start, stop).flatten(1)
            signs, order = self._draw(gradient.name, start, plain.shape[1], plain.device)
            for metric, target in out.items():
                root = roots.get(metric)
                weights = signs if root is None else signs * root[start * cols : stop * cols]
                values = plain * weights.to(plain.dtype)
                padding = len(order) - values.shape[1]
                dealt = torch.nn.functional.pad(values, (0, padding))[:, order]
                target += dealt.view(len(values), self.dim, -1).sum(-1)

    def _draw(self, name: str, start: int, numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (name, start)
        if key in self._cache:
            return self._cache[key]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{start}".encode()))
        signs = torch.randint(0, 2, (numel,), generator=generator, dtype=torch.int8) * 2 - 1
        size = math.ceil(numel / self.dim) * self.dim
        drawn = signs.to(device), torch.randperm(size, generator=generator).to(device)
        if self._cached + size <= CACHE_NUMBERS:
            self._cache[key] = drawn
            self._cached += size
        return drawn


def sketches(
    policy: Policy,
    gradients: SequenceGradients,
    sketch: Sketch,
    *,
    metrics: Metrics,
    budget: Budget = Budget(),
) -> dict[str, Tensor]:
    """Metric to (seq, dim) sketches of sqrt(P) times each sequence's gradient, by one pass.

    Args:
        policy: its trainable parameters are differentiated.
        gradients: of what.
        sketch: the random map; inner products need the same on both sides.
        metrics: name to nonnegative diagonal P, or None for the identity.
        budget: what may be used at a time.
    """
    check_metrics(policy, metrics)
    if sharded(policy.model) is not None:
        raise MeasurementError(
            "random projections of gradients need whole parameters; measure without --shard"
        )
    order = current().share(gradients.order)
    dtype = compute_dtype(next(iter(policy.parameters.values())))
    total = {m: torch.zeros(len(order), sketch.dim, dtype=dtype, device=policy.device) for m in metrics}

    def consume(gradient: LayerGradient, rows: slice) -> None:
        roots = {
            m: gradient.oriented(w[gradient.name]).reshape(-1).to(policy.device, dtype).sqrt()
            for m, w in metrics.items()
            if w is not None
        }
        sketch.add(gradient, {m: t[rows] for m, t in total.items()}, roots)

    stream(policy, gradients, consume, order=order, in_parts=True, budget=budget)
    return {m: current().scatter(t, order, len(gradients)) for m, t in total.items()}
