"""Standard errors of a series: delta method, delete-one-prompt jackknife, or bootstrap over prompts.

All are clustered by probe prompt and conditional on the update batch, that is on the direction of the step;
repeats with fresh update batches (``stepscope study``) show what the update batch adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stepscope.measure.estimators import Probe, Sampled
from stepscope.measure.line import TokenTable
from stepscope.results import FloatArray, IntArray
from stepscope.stats import Estimate, bootstrap

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

    probe: Probe
    slopes: tuple[TokenTable, ...]
    moved: Mapping[float, TokenTable]

    def select(self, indices: IntArray) -> Evidence:
        """Some sequences, with repeats if asked; the baseline stays as it was fitted on all."""
        return Evidence(
            self.probe.select(indices),
            tuple(s.select(indices) for s in self.slopes),
            {lr: t.select(indices) for lr, t in self.moved.items()},
        )


Statistic = Callable[[Evidence], Sampled]


def estimate(evidence: Evidence, statistic: Statistic, *, errors: str, unit: str, method: str) -> Estimate:
    """A statistic with its standard error.

    Args:
        evidence: tables of the probe batch.
        statistic: what to estimate.
        errors: ``delta`` (influence values), ``jackknife`` (delete one prompt; also removes the bias of
            order 1/prompts from the value) or ``bootstrap`` (400 resamples of prompts).
        unit: of the value.
        method: how it was estimated, in words; the kind of error is added.

    Returns:
        The estimate; with enumerated responses an exact expectation with error 0.
    """
    found = statistic(evidence)
    probe = evidence.probe
    by_delta = probe.estimate(found, unit=unit, method=f"{method}; {_WORDS[errors]}")
    if errors == "delta" or probe.sequence_weights is not None or by_delta.n < 2:
        return by_delta
    if errors == "bootstrap":
        spread = bootstrap(
            lambda rows: statistic(evidence.select(rows)).value,
            probe.clusters,
            num_resamples=NUM_RESAMPLES,
        )
        return Estimate(found.value, spread.stderr, by_delta.n, unit, by_delta.method)
    without = _without_each(evidence, statistic)
    count = len(without)
    stderr = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    value = count * found.value - (count - 1) * float(without.mean())
    return Estimate(value, stderr, count, unit, by_delta.method)


_WORDS = {
    "delta": "delta-method error by prompt, given the update batch",
    "jackknife": "jackknife error by prompt, given the update batch",
    "bootstrap": "bootstrap error by prompt, given the update batch",
}


def _without_each(evidence: Evidence, statistic: Statistic) -> FloatArray:
    """(prompt,) the statistic without each prompt in turn."""
    clusters = evidence.probe.clusters
    return np.array(
        [statistic(evidence.select(np.flatnonzero(clusters != c))).value for c in np.unique(clusters)]
    )
