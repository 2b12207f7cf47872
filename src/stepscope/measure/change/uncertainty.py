"""Standard errors of a series: delta method, delete-one-prompt jackknife, or bootstrap over prompts.

The delta method linearises the statistic by its residuals (Liang & Zeger 1986); the jackknife deletes
one prompt at a time (Quenouille 1956, Tukey 1958); the bootstrap draws whole prompts with replacement (Efron
1979). All are clustered by probe prompt and conditional on the update batch, that is on the direction of the
step; repeats with fresh update batches (``stepscope study``) show what the update batch adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepscope.measure.quantity.estimators import ProbeValues, Sampled
from stepscope.measure.quantity.values import TokenValues
from stepscope.results import IntArray
from stepscope.stats import (
    Estimate,
    bootstrap,
    clustered_ratio,
    estimate_from_sums,
    jackknife,
    jackknife_ratio,
    leave_out,
    ratio_residuals,
)

ERRORS = ("delta", "jackknife", "bootstrap")
NUM_RESAMPLES = 400


@dataclass(frozen=True)
class Evidence:
    """Everything a series is estimated from.

    Attributes:
        probe: values at the parameters, with the baseline in use.
        slopes: first, or first and second, derivatives along the step.
        moved: values at shifted parameters by learning rate.
    """

    probe: ProbeValues
    slopes: tuple[TokenValues, ...]
    moved: Mapping[float, TokenValues]

    def select(self, indices: IntArray) -> Evidence:
        """Some sequences, with repeats if asked; the baseline stays as it was fitted on all."""
        return Evidence(
            self.probe.select(indices),
            tuple(s.select(indices) for s in self.slopes),
            _Selection(self.moved, indices),
        )


@dataclass(frozen=True)
class _Selection(Mapping[float, TokenValues]):
    """Some sequences of the tables by learning rate, each selected when it is asked for."""

    tables: Mapping[float, TokenValues]
    indices: IntArray

    def __getitem__(self, lr: float) -> TokenValues:
        return self.tables[lr].select(self.indices)

    def __iter__(self) -> Iterator[float]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)


Statistic = Callable[[Evidence], Sampled]


def estimate(evidence: Evidence, statistic: Statistic, *, errors: str, unit: str, method: str) -> Estimate:
    """A statistic with its standard error.

    Args:
        evidence: tables of the probe batch.
        statistic: what to estimate.
        errors: ``delta`` (residuals), ``jackknife`` (delete one prompt; also removes the bias of
            order 1/prompts from the value) or ``bootstrap`` (400 resamples of prompts).
        unit: of the value.
        method: how it was estimated, in words; the kind of error is added.

    Returns:
        The estimate; with enumerated responses an exact expectation with error 0.
    """
    found = statistic(evidence)
    probe = evidence.probe
    how = f"{method}; {_KINDS[errors]} error by prompt, given the update batch"
    by_delta = probe.estimate(found, unit=unit, method=how)
    if errors == "delta" or probe.sequence_weights is not None or by_delta.n < 2:
        return by_delta
    if errors == "bootstrap":
        spread = bootstrap(
            lambda rows: statistic(evidence.select(rows)).value,
            probe.clusters,
            num_resamples=NUM_RESAMPLES,
        )
        return probe.estimate(found, unit=unit, method=how, stderr=spread.stderr)
    without = leave_out(lambda kept: statistic(evidence.select(kept)).value, probe.clusters)
    value, stderr = jackknife(without, found.value)
    return probe.estimate(Sampled(value, found.residuals), unit=unit, method=how, stderr=stderr)


def estimate_ratio(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    errors: str,
    unit: str,
    method: str,
) -> Estimate:
    """A ratio of sums over a batch, with the same choice of standard errors as :func:`estimate`.

    Args:
        numerator: (seq,) x.
        denominator: (seq,) y.
        clusters: (seq,) prompt of each sequence.
        errors: ``delta``, ``jackknife`` or ``bootstrap``.
        unit: of the ratio.
        method: how it was estimated, in words; the kind of error is added.
    """
    x, y = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    ratio = jackknife_ratio if errors == "jackknife" else clustered_ratio
    found = ratio(x, y, clusters, unit=unit, method=f"{method}, {_KINDS[errors]} error clustered by prompt")
    if errors != "bootstrap" or found.n < 2:
        return found
    spread = bootstrap(
        lambda rows: float(x[rows].sum() / y[rows].sum()), clusters, num_resamples=NUM_RESAMPLES
    )
    return estimate_from_sums(
        found.value, ratio_residuals(x, y, clusters), unit=unit, method=found.method, stderr=spread.stderr
    )


_KINDS = {"delta": "delta-method", "jackknife": "jackknife", "bootstrap": "bootstrap"}
