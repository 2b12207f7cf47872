# ruff: noqa: RUF001 (typographic signs are meant)
"""The unit in which a page writes changes: one power of ten for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.results.change import Change
from stepscope.stats import Estimate

_STEP = 3
"""Powers of ten come in multiples of this, as prefixes of units do."""

_ROOM = 2
"""Digits that the largest change has before the point at least, since parts of it are smaller."""


@dataclass(frozen=True)
class Unit:
    """How changes by one step are written.

    Attributes:
        lr: learning rate that influences are multiplied by; 1 where the step's own is 0.
        exponent: of the power of ten.
        quantity: what changes, in words.
        name: unit of the quantity.
    """

    lr: float
    exponent: int
    quantity: str
    name: str

    @property
    def label(self) -> str:
        """The power of ten with the unit, for example ``10⁻⁶ nats/token``."""
        power = f"{text.power_of_ten(self.exponent)} " if self.exponent else ""
        return f"{power}{self.name}"

    @property
    def times(self) -> str:
        """What follows a number in this unit, for example ``× 10⁻⁶ nats/token``."""
        return f"× {self.label}" if self.exponent else self.label

    @property
    def factor(self) -> float:
        """What an influence per unit of learning rate is multiplied by."""
        return self.lr / 10.0**self.exponent

    def change(self, value: Estimate) -> Estimate:
        """A change in this unit."""
        return value.scaled(10.0**-self.exponent)

    def influence(self, value: Estimate) -> Estimate:
        """An influence per unit of learning rate as the change by this step, in this unit."""
        return value.scaled(self.factor)


def unit_of(change: Change | None) -> Unit:
    """The unit for the changes and influences of one measurement.

    Its power of ten is a multiple of three that leaves the largest of change and interval three to five
    digits before the point.
    """
    if change is None or not change.points:
        return Unit(1.0, 0, "entropy", "change per unit lr")
    name = change.points[0].linear.unit
    quantity = text.quantity_name(change.quantity)
    if not change.lr > 0:
        return Unit(1.0, 0, quantity, f"{name} per unit lr")
    point = next((p for p in change.points if math.isclose(p.lr, change.lr, rel_tol=1e-6)), None)
    known = [point.true, point.linear] if point else []
    sizes = [abs(e.value) for e in known] + [e.stderr for e in known]
    largest = max((s for s in sizes if math.isfinite(s) and s > 0), default=1.0)
    return Unit(change.lr, _exponent(largest), quantity, name)


def unit_in(measurement: Measurement) -> Unit:
    """The unit for changes and influences of a measurement, and of influences in memory."""
    known, rows = measurement.influence_unit, measurement.influence_sequences
    if measurement.change is not None or known is None or rows is None:
        return unit_of(measurement.change)
    lr, name = known
    quantity = text.quantity_name(measurement.quantity)
    if not lr > 0:
        return Unit(1.0, 0, quantity, f"{name} per unit lr")
    whole = lr * abs(float(rows.influence[rows.component == "sequence"].sum()))
    return unit_for(lr, whole, quantity, name)


def unit_for(lr: float, largest: float, quantity: str, name: str) -> Unit:
    """The unit for changes whose largest is known; arguments as the attributes of :class:`Unit`."""
    return Unit(lr, _exponent(largest) if largest > 0 else 0, quantity, name)


def unit_beside(change: Change | None, lr: float, effect: Estimate, quantity: str) -> Unit:
    """The unit for changes of one quantity on a page: that of the page, if they are of one kind.

    Args:
        change: what the page's unit is of.
        lr: learning rate of the changes.
        effect: what the whole step does to the quantity, in the quantity's own unit.
        quantity: its name.
    """
    own = unit_of(change)
    return own if own.name == effect.unit else unit_for(lr, abs(effect.value), quantity, effect.unit)


def _exponent(largest: float) -> int:
    return _STEP * math.floor((math.floor(math.log10(largest)) - _ROOM) / _STEP)
