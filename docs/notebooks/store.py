"""``make notebooks``: execute the gallery on a run and keep what it shows, small enough for a repository.

A figure is kept as plotly's JSON, without plotly.js; what changes with every execution (bars, what is said
on standard error) is left out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LIMIT = 300_000
"""Bytes of a notebook with its outputs."""

BARS = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> int:
    """Execute a notebook in place; the bytes that it has then.

    Raises:
        ValueError: it is larger than a repository should have to carry.
    """
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(book, timeout=600, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(path.parent))
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                out for out in cell.outputs if BARS not in out.get("data", {}) and out.get("name") != "stderr"
            ]
    text = nbformat.writes(book) + "\n"
    if len(text) > LIMIT:
        raise ValueError(
            f"{path}: {len(text):,} bytes with its outputs, expected at most {LIMIT:,}; show less"
        )
    path.write_text(text, encoding="utf-8")
    return len(text)


if __name__ == "__main__":
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    for book in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        print(f"{book.name}: {execute(book):,} bytes")
