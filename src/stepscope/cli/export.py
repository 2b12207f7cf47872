"""``stepscope export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.errors import RunFolderError


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a measurement, or of an evaluated run.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="inspect", help="Format: logs of Inspect (inspect_ai).")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the logs go; default: RUN/inspect.", show_default=False
        ),
    ] = None,
) -> None:
    """Responses with log-prob, entropy and influence of every token, as logs of another tool.

    One log per batch of a measurement, or per evaluated checkpoint.
    """
    from stepscope.pipeline.paths import need_path

    need_path(run, RunFolderError, "no such folder; expected what measure or eval left")
    from stepscope.pipeline import run_export

    run_export(run, to=to, out=out)
