"""TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepscope.trackers.entry import FIGURE_COLUMNS, Entry, figure_rows
from stepscope.trackers.texts import figures_html, marked_html

EVENTS = "events.out.tfevents.*"


class TensorBoardTracker:
    """Writes scalars, histograms, and texts that the text plugin shows: figures with errors, responses.

    Args:
        writer: a ``SummaryWriter``; whoever made it closes it, but for :meth:`anew`.
    """

    name = "tensorboard"

    def __init__(self, writer: Any, *, own: bool = False) -> None:
        self.writer, self._own = writer, own

    @classmethod
    def anew(cls, folder: Path) -> TensorBoardTracker:
        """In a folder of its own, written from its beginning, so that no point is there twice."""
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob(EVENTS):
            old.unlink()
        return cls(SummaryWriter(log_dir=str(folder), purge_step=0), own=True)

    def log(self, entry: Entry) -> None:
        """Write an entry, and have it on disk."""
        for name, value in entry.named_scalars():
            self.writer.add_scalar(name, value, entry.step)
        for name, values in entry.named_histograms():
            self.writer.add_histogram(name, values, entry.step)
        if entry.figures:
            table = figures_html(figure_rows(entry.figures), FIGURE_COLUMNS)
            self.writer.add_text(entry.name("figures"), table, entry.step)
        if entry.responses is not None and entry.responses.shown:
            self.writer.add_text(entry.name("responses"), marked_html(entry.responses), entry.step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file, where it is its own."""
        if self._own:
            self.writer.close()
