"""Part of ``curvature.json``: learning rate and batch size by the second-order expansion of a quantity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.frames import frame
from stepscope.results.records import Record
from stepscope.results.views import Plotted
from stepscope.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

LEFT = 0.05
"""Share of the gain of an infinite batch below which a larger one is said to buy nothing."""


@dataclass(frozen=True)
class StepTerms(Record):
    """The terms of E[Delta Q] = lr slope + lr^2/2 (curvature + noise/B) for a step of B prompt groups.

    Attributes:
        slope: grad Q . u, u the expected direction.
        curvature: u' (Hess Q) u.
        noise: tr(P (Hess Q) P S), S the covariance of the gradient of one prompt group.
        noise_batch: noise/curvature, in prompts: the batch at which both are equal; no number where the
            curvature is not resolved from zero.
        lr_limit: -slope/curvature: the best learning rate of an infinite batch; no number without one.
    """

    slope: Estimate
    curvature: Estimate
    noise: Estimate
    noise_batch: Estimate
    lr_limit: Estimate


@dataclass(frozen=True)
class BestRow(Record):
    """The best learning rate at one batch size, and the change it makes.

    Attributes:
        prompts: B.
        lr: -slope/(curvature + noise/B) of the batch's part of the step alone.
        gain: the expected change of the quantity at that learning rate, slope x lr/2.
        lr_whole: of the whole step, momentum and decay as the checkpoint has them.
        gain_whole: the expected change at that.
    """

    prompts: int
    lr: Estimate
    gain: Estimate
    lr_whole: Estimate
    gain_whole: Estimate


@dataclass(frozen=True, repr=False)
class BestStep(Plotted, Record):
    """Batch size and learning rate for one quantity, predicted.

    Attributes:
        quantity: its name.
        unit: of it.
        lr: the step's own learning rate.
        prompts: prompt groups of the update batch.
        run_prompts: prompt groups per step of the run.
        batch: of the batch's part of the step, u = P G.
        whole: of the whole step, u = P G + momentum + decay, these held as they are in the checkpoint: they
            do not answer to the batch, and the noise in them is not averaged over.
        of_parts: what momentum and decay have to do with ``whole``: ``slope`` of them, ``curvature`` among
            themselves, and ``cross``, twice their curvature with P G.
        kinds: the curvature and noise of ``batch`` by part of the Hessian: ``fisher_curvature``,
            ``fisher_noise``, ``rest_curvature``, ``rest_noise``; empty where the quantity has no Fisher part.
        rows: one per batch size.
    """

    quantity: str
    unit: str
    lr: float
    prompts: int
    run_prompts: int
    batch: StepTerms
    whole: StepTerms
    of_parts: Mapping[str, Estimate]
    kinds: Mapping[str, Estimate]
    rows: tuple[BestRow, ...]

    def to_pandas(self) -> pd.DataFrame:
        """A row per batch size."""
        return frame(self.rows)

    @property
    def advice(self) -> str:
        """What batch size and learning rate do to the quantity, in words; why nothing can be said, if so."""
        terms, B = self.batch, self.run_prompts
        limit = terms.lr_limit
        own = next((row for row in self.rows if row.prompts == B), None)
        does = "raises" if terms.slope.value > 0 else "lowers"
        lead = "By this batch's part of the step alone"
        if not limit.reliable:
            if own is None or not own.lr.reliable:
                return f"No best learning rate for {self.quantity}: {limit.reason}."
            return (
                f"{lead} a batch of {B} prompts {does} {self.quantity} most at learning rate "
                f"{own.lr.value:.2g} ({own.lr.low:.2g} to {own.lr.high:.2g}); that of an infinite batch is "
                f"not known, nor what a larger one admits: {limit.reason}."
            )
        said = (
            f"{lead} an infinite batch {does} {self.quantity} most at learning rate {limit.value:.2g} "
            f"({limit.low:.2g} to {limit.high:.2g})"
        )
        scale = terms.noise_batch
        if not scale.reliable:
            return f"{said}; what noise takes of it is not resolved: {scale.reason}."
        if scale.high <= 0:
            return f"{said}; noise takes nothing of it, so that a larger batch buys nothing."
        scales = [max(n, 0.0) for n in (scale.value, scale.low, scale.high)]
        admits = [(1 + n / B) / (1 + n / (2 * B)) for n in scales]
        enough = [n * (1 - LEFT) / LEFT for n in scales]
        return (
            f"{said}. Doubling the batch of {B} prompts admits {admits[0]:.2f} times the learning rate "
            f"({admits[1]:.2f} to {admits[2]:.2f}); beyond {enough[0]:.0f} prompts ({enough[1]:.0f} to "
            f"{enough[2]:.0f}) less than {LEFT * 100:.0f} % is left to win."
        )
