"""Optimizers whose step is not linear in its gradient, even with all that scales it held as it is.

Their step is rebuilt exactly and so is the change that it makes. It is no sum over gradients: not over those
of a batch's sequences, and not over those of the steps before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stepscope.errors import MeasurementError
from stepscope.policy.optim.base import OptimizerState


@dataclass(frozen=True, repr=False, kw_only=True)
class NonlinearState(OptimizerState):
    """A state of such an optimizer; :attr:`nonlinear` says why, :attr:`throughs` what shares there are."""

    nonlinear: ClassVar[str]

    def carried(self, name: str, horizon: int) -> float:
        """There is no such thing.

        Raises:
            MeasurementError: always.
        """
        raise MeasurementError(f"{self.nonlinear}, so a batch has no part in later steps of its own")

    def own_shares(self, name: str) -> tuple[float, float]:
        """There is no such thing.

        Raises:
            MeasurementError: always.
        """
        raise MeasurementError(f"{self.nonlinear}, so a batch has no share of a step by arithmetic")
