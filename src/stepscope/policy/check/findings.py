"""What an examination says: one thing found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepscope.errors import StepscopeError


@dataclass(frozen=True)
class Finding:
    """One thing found about a checkpoint.

    Attributes:
        level: ``ok``; ``warn`` for what limits a measurement; ``fail`` for what prevents it.
        what: what was found.
        cure: what to do; empty when all is well.
    """

    level: Literal["ok", "warn", "fail"]
    what: str
    cure: str = ""

    @classmethod
    def from_error(cls, error: StepscopeError) -> Finding:
        """A failure: our errors end with the cure, after the last semicolon."""
        what, _, cure = str(error).rpartition("; ")
        return cls("fail", what or cure, cure if what else "")
