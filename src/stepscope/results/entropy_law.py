"""The record of the entropy law."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.frames import frame
from stepscope.results.records import Record
from stepscope.results.views import Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LawPrediction(Record):
    """Late points predicted from the law fitted to the first ones alone.

    Attributes:
        fitted: points fitted to, the first of the run.
        rmse: root mean square of predicted minus measured R over the other points, in units of R.
        final_error: predicted minus measured R at the last point.
        noise: what ``rmse`` would be from the sampling errors of the late points alone.
        predicted: (late,) predicted R.
    """

    fitted: int
    rmse: Estimate
    final_error: Estimate
    noise: Number
    predicted: tuple[Number, ...]


@dataclass(frozen=True, repr=False)
class EntropyLaw(Plotted, Record):
    """``entropy_law.json``: R = -a exp(H) + b fitted to the checkpoints of a run.

    Attributes:
        a: performance bought per unit of exp(H).
        b: performance at exp(H) = 0; only b - a e^H has a meaning for H >= 0.
        ceiling: b - a, performance at H = 0.
        covariance: (2, 2) of a and b.
        scatter: standard deviation of R about the law beyond the sampling errors; 0 where they suffice.
        p_value: probability of a chi^2 at least as large as that of the fit without scatter, if the law held.
        r2: share of the variance of R explained.
        steps: (checkpoint,) optimizer steps.
        entropy: (checkpoint,) H, nats per token.
        entropy_stderr: (checkpoint,) its standard errors.
        performance: (checkpoint,) R.
        performance_stderr: (checkpoint,) its standard errors.
        prediction: of late points from the first; None with too few points.
        intervals: 95 % percentile intervals of ``a``, ``b`` and ``ceiling`` from a bootstrap over prompts;
            empty where none was asked for.
        num_prompts: prompts that the errors of the points are over; 0 where only the errors were given.
    """

    a: Estimate
    b: Estimate
    ceiling: Estimate
    covariance: tuple[tuple[Number, Number], tuple[Number, Number]]
    scatter: Number
    p_value: Number
    r2: Number
    steps: tuple[int, ...]
    entropy: tuple[Number, ...]
    entropy_stderr: tuple[Number, ...]
    performance: tuple[Number, ...]
    performance_stderr: tuple[Number, ...]
    prediction: LawPrediction | None
    intervals: Mapping[str, tuple[Number, Number]]
    num_prompts: int = 0

    def to_pandas(self) -> pd.DataFrame:
        """A row per checkpoint."""
        names = ("entropy", "entropy_stderr", "performance", "performance_stderr")
        rows = zip(self.steps, *(getattr(self, name) for name in names), strict=True)
        return frame({"step": step, **dict(zip(names, row, strict=True))} for step, *row in rows)
