"""Estimates with honest errors; numpy and scipy only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A number with its error and its own verdict on whether it can be trusted.

    Attributes:
        value: the point estimate.
        stderr: its standard error (nan where none exists).
        n: number of independent units behind it (prompts, unless ``method`` says otherwise).
        unit: of value and stderr, for example ``nats/token``.
        method: how it was estimated, in words.
        reliable: False when a diagnostic failed; the number is still given.
        reason: why it is not reliable; empty when it is.
    """

    value: float
    stderr: float
    n: int
    unit: str
    method: str
    reliable: bool = True
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)
