"""How a change is estimated."""

from __future__ import annotations

from dataclasses import dataclass

from stepscope.errors import MeasurementError
from stepscope.measure.change.uncertainty import ERRORS
from stepscope.measure.quantity.baselines import LADDER
from stepscope.measure.quantity.estimators import ESTIMATORS
from stepscope.results import FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class ChangeOptions:
    """How a change is estimated.

    Attributes:
        baseline: ``best`` or a rung of the ladder: ``none``, ``current``, ``position``, ``ridge``.
        estimator: of the true change: ``per_decision``, ``self_normalised``, ``whole_sequence``,
            ``regression``.
        errors: standard errors by ``delta`` method, ``jackknife`` or ``bootstrap``; see
            ``measure.change.uncertainty``.
        second_order: whether to compute the second derivative.
        antithetic: whether to also evaluate at -lr, for the odd part of the true change.
        sequence_weights: (seq,) probabilities, where the probe enumerates all responses; errors are then 0.

    Raises:
        MeasurementError: unknown baseline, estimator or errors.
    """

    baseline: str = "best"
    estimator: str = "per_decision"
    errors: str = "delta"
    second_order: bool = False
    antithetic: bool = False
    sequence_weights: FloatArray | None = None

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        for what, chosen, known in (
            ("estimator", self.estimator, ESTIMATORS),
            ("baseline", self.baseline, ("best", *LADDER)),
            ("kind of errors", self.errors, ERRORS),
        ):
            if chosen not in known:
                raise MeasurementError(f"unknown {what} {chosen!r}; choose from {', '.join(known)}")
