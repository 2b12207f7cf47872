"""``profile.json``: where the time of a measurement went, by stage and kind of pass."""

from __future__ import annotations

from dataclasses import dataclass

from stepscope.results.records import Record
from stepscope.stats import Number

REST = "outside passes"
"""Work of the row with what a stage took besides its passes."""


@dataclass(frozen=True)
class ProfileRow(Record):
    """The passes of one kind in one stage; or, under :data:`REST`, what the stage took besides them.

    Attributes:
        stage: name of the stage.
        work: the function that passes the batch, ``generate`` for sampling.
        asked_by: the function that asked for it.
        passes: times a batch, or part of one, was gone through.
        micro_batches: forward passes of a micro-batch, each with its backward pass if it has one.
        sequences: of all micro-batches.
        tokens: of these, prompts and responses, without padding.
        padded: with padding.
        seconds: wall time.
        rise: bytes by which memory rose at most within a micro-batch; nan where nothing tells. Of a device,
            what torch holds there, otherwise what the process has resident.
    """

    stage: str
    work: str
    asked_by: str
    passes: int
    micro_batches: int
    sequences: int
    tokens: int
    padded: int
    seconds: float
    rise: Number


@dataclass(frozen=True)
class Profile(Record):
    """Where the time went.

    Attributes:
        rows: by stage in their order, the longest first.
        seconds: of all stages.
        peak: largest number of bytes in use, of the device or resident; nan where nothing tells.
    """

    rows: tuple[ProfileRow, ...]
    seconds: float
    peak: Number

    def table(self) -> str:
        """A line per row, in columns."""
        head = ("stage", "work", "asked by", "passes", "batches", "tokens", "padding", "s", "share", "MiB")
        lines = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        texts = len(("stage", "work", "asked by"))
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < texts else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _cells(self, row: ProfileRow) -> tuple[str, ...]:
        counts = [str(row.passes), str(row.micro_batches), str(row.tokens)]
        counts.append(f"{1 - row.tokens / row.padded:.0%}" if row.padded else "")
        rise = f"{row.rise / 2**20:.0f}" if row.rise == row.rise else ""
        if row.work == REST:
            counts, rise = [""] * len(counts), ""
        time = f"{row.seconds:.2f}", f"{row.seconds / self.seconds:.1%}" if self.seconds else ""
        return (row.stage, row.work, row.asked_by, *counts, *time, rise)
