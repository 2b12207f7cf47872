"""A page in a notebook."""

from __future__ import annotations

import html
import os
from pathlib import Path
from urllib.parse import quote

from stepscope.errors import RunFolderError
from stepscope.pipeline.report import run_report
from stepscope.results.ledger import LEDGER, LEDGER_PAGE
from stepscope.results.views import Inline

_PAGES = {"study.json": "study.html", "summary.json": "report.html", "checkpoints": "report.html"}
_PAGES |= {"eval.parquet": "report.html", "measure": "report.html", LEDGER: LEDGER_PAGE}
"""Page of a folder by what is in it, the first that is there."""


def show_report(run: str | Path, *, height: int = 720, embed: bool = True, rebuild: bool = False) -> Inline:
    """The page of a measurement, run, study or ledger, in a frame below the cell.

    Args:
        run: its folder, or the HTML file itself.
        height: of the frame, in pixels.
        embed: put the page into the notebook, which grows by it (1 to 2 MB) and shows it anywhere; else the
            frame names the file, which has to lie where the notebook's server reads.
        rebuild: write the page again from its artifacts; otherwise one that is there is shown as it is.

    Returns:
        What a notebook shows, with the page cut off from it: the frame runs scripts and has no other rights.

    Raises:
        RunFolderError: the folder holds nothing to report.
    """
    given = Path(run)
    page = given if given.suffix == ".html" else _page(given, rebuild=rebuild)
    if not page.is_file():
        raise RunFolderError(f"{page}: no such page; run `stepscope report` on its folder")
    if embed:
        source = f'srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"'
    else:
        source = f'src="{quote(Path(os.path.relpath(page)).as_posix())}"'
    frame = (
        f'<iframe {source} sandbox="allow-scripts allow-downloads" title="stepscope report" width="100%" '
        f'height="{int(height)}" style="border:1px solid rgba(128,128,128,.3)"></iframe>'
    )
    return Inline(frame, str(page))


def _page(folder: Path, *, rebuild: bool) -> Path:
    found = next((page for name, page in _PAGES.items() if (folder / name).exists()), None)
    if found is None:
        raise RunFolderError(
            f"{folder}: nothing to report; expected what measure, train, eval, study or ledger leave"
        )
    if rebuild or not (folder / found).is_file():
        run_report(folder)
    return folder / found
