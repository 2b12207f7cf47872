"""``stepscope report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.cli.options import Open
from stepscope.cli.pages import show_page
from stepscope.errors import ConfigError, RunFolderError


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, folder of a measurement, or study folder.")
    ],
    others: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[OTHER]...",
            help="A second measurement, or further evaluated runs, whose entropy laws are compared.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Page of the comparison.", show_default=False)
    ] = None,
    show: Open = False,
) -> None:
    """Rebuild a page from its artifacts, or compare runs; nothing is computed again.

    A run or a measurement gets report.html, a study study.html. With further folders the page compares two
    measurements, or the entropy laws of evaluated runs: compare-OTHER.html in RUN, or FILE.
    """
    if not others and out is not None:
        raise ConfigError("--out names the page of a comparison; give two runs, or leave it out")
    from stepscope.pipeline.paths import need_path

    for folder in (run, *(others or [])):
        need_path(folder, RunFolderError, "no such folder; expected what measure, study or train left")
    from stepscope.pipeline import run_comparison, run_report

    page = run_comparison(run, others, out) if others else run_report(run)
    show_page(page, show)
