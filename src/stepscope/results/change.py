"""``change.json``: the change of quantities over a sweep of learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.loglog import LogLogFit
from stepscope.results.frames import flat, frame
from stepscope.results.records import Record
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Taken(Record):
    """The change at the step's own learning rate by a training that rounds its weights, and without rounding.

    Attributes:
        true: F(theta') - F(theta), theta' as the training leaves it.
        unrounded: F(params + lr * direction) - F(params), from the same samples.
        difference: true - unrounded, with the error of the paired difference.
        ratio: true / unrounded, with the error of the paired ratio; None where nothing changes without
            rounding.
        effective_sample_size: of the importance weights at theta'.
        pareto_k: tail of those weights; nan if they hardly differ.
    """

    true: Estimate
    unrounded: Estimate
    difference: Estimate
    ratio: Estimate | None
    effective_sample_size: Number
    pareto_k: Number


@dataclass(frozen=True)
class ChangePoint(Record):
    """The change at one learning rate.

    Attributes:
        lr: learning rate; the parameters move by ``lr * direction``.
        true: F(params + lr * direction) - F(params), from the same samples.
        linear: lr * grad F . direction.
        second_order: lr^2/2 * direction' (Hess F) direction; None if not asked for.
        excess: true - linear, with the error of the paired difference.
        odd: half the difference of the true changes at +lr and -lr, free of second order; None if not asked
            for.
        effective_sample_size: of the importance weights.
        pareto_k: tail of the importance weights; nan if they hardly differ.
    """

    lr: float
    true: Estimate
    linear: Estimate
    second_order: Estimate | None
    excess: Estimate
    odd: Estimate | None
    effective_sample_size: Number
    pareto_k: Number


@dataclass(frozen=True, repr=False)
class Change(Plotted, Record):
    """The change of one quantity, in one normalisation and version, over a sweep of learning rates.

    Attributes:
        quantity: its name.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        lr: the step's own learning rate.
        points: by increasing learning rate.
        fit: log|true| against log lr over the reliable points up to ``linear_up_to`` or the own lr, whichever
            is larger (all, where ``linear_up_to`` is not known); None with fewer than two.
        value: the quantity before the step.
        slope: grad F . direction.
        curvature: direction' (Hess F) direction; None if not asked for.
        baseline: rung of the baseline ladder in use.
        baseline_stderr: standard error of ``slope`` that each rung tried leaves.
        baseline_explained: share of the variance of the returns that the baseline in use explains.
        estimator: of the true change.
        round_off: round-off error of a true change, in the quantity's unit.
        measurable_from: lr at which the linear change is ten times ``round_off``.
        linear_up_to: lr at which second order is a tenth of linear; None if second order was not asked for or
            is in doubt.
        taken: the change by the rounded step of a training in a half type; None where nothing is rounded.
    """

    quantity: str
    normalisation: str
    version: str
    lr: float
    points: tuple[ChangePoint, ...]
    fit: LogLogFit | None
    value: Estimate
    slope: Estimate
    curvature: Estimate | None
    baseline: str
    baseline_stderr: Mapping[str, Number]
    baseline_explained: Number
    estimator: str
    round_off: Number
    measurable_from: Number
    linear_up_to: float | None
    taken: Taken | None

    @property
    def series(self) -> tuple[Change, ...]:
        """All that it holds: itself."""
        return (self,)

    def to_pandas(self) -> pd.DataFrame:
        """A row per series and learning rate, in the columns of :func:`stepscope.results.frames.frame`."""
        return frame(
            {"quantity": s.quantity, "normalisation": s.normalisation, "version": s.version, **flat(point)}
            for s in self.series
            for point in s.points
        )

    def _viewed(self) -> Parts:
        own = {field.name: getattr(self, field.name) for field in fields(Change)}
        others = tuple(series for series in self.series if series is not self)
        return Parts(f"Change of {self.quantity}", {"change": Changes(**own, others=others)})

    def at(self, lr: float) -> ChangePoint:
        """The point at a learning rate of the sweep.

        Raises:
            MeasurementError: the sweep has no such point.
        """
        for point in self.points:
            if np.isclose(point.lr, lr, rtol=1e-9, atol=0):
                return point
        raise MeasurementError(
            f"the sweep has no lr {lr:g}, only {', '.join(f'{p.lr:g}' for p in self.points)}; add it to lrs"
        )


@dataclass(frozen=True, repr=False)
class Changes(Change):
    """All series of a measurement: the primary one, and the rest.

    Attributes:
        others: the series besides the primary one.
    """

    others: tuple[Change, ...]

    @property
    def series(self) -> tuple[Change, ...]:
        """All of them, the primary one first."""
        return (self, *self.others)
