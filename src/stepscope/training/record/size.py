"""How large a record will be, said before the training starts, and what fits a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from stepscope.errors import ConfigError

BYTES_PER_TOKEN = 48
"""Of a response token in the table of tokens, at most: log-prob, entropy, weight, advantage, the log-prob
that the loss divides by, and what its columns of ids and text take compressed."""

BYTES_PER_SEQUENCE = 1024
"""Of a row in the table of sequences: the prompt's tokens and text, the response's text."""

BYTES_PER_STEP = 16_384
"""Of the files themselves."""


@dataclass(frozen=True)
class RecordSize:
    """What a record takes on the disk.

    Attributes:
        gradient: bytes of a step's gradient.
        batch: bytes of its batch, at most (with prompts of usual length).
        state: bytes of parameters and both moments.
        steps: steps to be recorded.
        state_every: a state is kept at every so many steps, besides start and end; 0 for those two alone.
    """

    gradient: int
    batch: int
    state: int
    steps: int
    state_every: int

    @property
    def total(self) -> int:
        """Bytes of the whole record, at most."""
        between = self.steps // self.state_every if self.state_every else 0
        return self.steps * (self.gradient + self.batch) + (2 + between) * self.state

    def within(self, limit: int, what: str) -> RecordSize:
        """The same with fewer states, where that makes it fit.

        Args:
            limit: bytes.
            what: sets the limit, in words.

        Raises:
            ConfigError: even start and end alone do not fit.
        """
        if self.total <= limit:
            return self
        if self.state_every:
            spared = limit - replace(self, state_every=0).total
            between = spared // self.state if spared >= 0 else -1
            if between >= 0:
                every = -(-self.steps // (between + 1)) if between else 0
                return replace(self, state_every=max(every, self.state_every) if every else 0)
        fewest = replace(self, state_every=0)
        raise ConfigError(
            f"a record of {self.steps} steps takes {said(fewest.total)} "
            f"({said(self.gradient + self.batch)} a step), and {what} is {said(limit)}; train an adapter, "
            "record a shorter training, or raise it"
        )

    def __str__(self) -> str:
        """The sizes in a line."""
        often = f"every {self.state_every} steps" if self.state_every else "at start and end alone"
        return (
            f"{said(self.gradient + self.batch)} a step at most (gradient {said(self.gradient)}) and "
            f"{said(self.state)} of parameters and moments {often}: {said(self.total)} for {self.steps} steps"
        )


def record_size(
    parameters: Mapping[str, Tensor],
    *,
    sequences: int,
    max_response_tokens: int,
    steps: int,
    state_every: int,
) -> RecordSize:
    """The size of a record.

    Args:
        parameters: that are trained, by name.
        sequences: of an optimizer step, over all processes.
        max_response_tokens: longest response.
        steps: optimizer steps.
        state_every: steps from one state that is kept to the next.
    """
    gradient = sum(p.numel() * p.element_size() for p in parameters.values())
    each = BYTES_PER_SEQUENCE + BYTES_PER_TOKEN * max_response_tokens
    return RecordSize(gradient, BYTES_PER_STEP + sequences * each, 3 * gradient, steps, state_every)


def said(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
