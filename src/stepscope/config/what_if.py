"""Configuration of ``stepscope ledger RUN --without RULE``."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from stepscope.config.base import Section
from stepscope.errors import ConfigError
from stepscope.rules import TokenRule


def _rule(text: str) -> str:
    try:
        TokenRule.parse(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


class WhatIfConfig(Section):
    """Configuration of ``stepscope ledger RUN --without RULE``.

    Steps, task, probe prompts and model are those of the ledger that lies in the folder.

    Attributes:
        run: folder of a recorded training.
        out: folder of its ledger, or null for the run's own.
        rule: which tokens are left out: ``WAY=CLASS`` or ``WAY=CLASS|CLASS``, with the ways and classes of a
            ledger's roll-ups, for example ``quadrant=wrong, rare``.
        doses: shares of their weight that are taken away; 1 takes them out of the loss.
        every: steps from one place where the curves are looked at to the next.
        samples: responses to each probe prompt, at every place and on every path.
        retrain: also train again without them, from the same policy and seeds, for every dose.
        state_every: steps from one whole state in the record of such a training to the next.
        device: torch device, or null for a GPU where there is one.
        batch_size: sequences per forward pass.
        memory: budget, in GiB; activations of a micro-batch come on top.
    """

    run: str
    out: str | None = None
    rule: Annotated[str, AfterValidator(_rule)]
    doses: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=lambda: [0.25, 0.5, 1.0], min_length=1
    )
    every: int = Field(default=5, ge=1)
    samples: int = Field(default=4, ge=1)
    retrain: bool = False
    state_every: int = Field(default=5, ge=1)
    device: str | None = None
    batch_size: int = Field(default=64, ge=1)
    memory: float = Field(default=4.0, gt=0)

    @field_validator("doses")
    @classmethod
    def _distinct(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("each dose may be named once")
        return sorted(value)
