"""``stepscope study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.cli.options import DryRun, Open, Overrides
from stepscope.cli.pages import show_page


def study(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML).")],
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Study folder.")] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            "--executor",
            metavar="local|slurm|ray",
            help="What measures: this process (default), jobs of SLURM, or tasks of Ray.",
            show_default=False,
        ),
    ] = None,
    show: Open = False,
    dry: DryRun = False,
) -> None:
    """Many measurements: checkpoints x settings x repeats. Goes on where an earlier call was stopped.

    On a cluster each measurement is a job or task of its own; a killed one is taken again, and the table is
    the same; docs/CLUSTERS.md has the settings.
    """
    from stepscope.pipeline.paths import need_file

    need_file(config)
    from stepscope.config import StudyConfig, load_config

    settings = load_config(StudyConfig, config, overrides or [], {"out": out, "executor": executor})
    from stepscope.pipeline.early import refuse_early

    refuse_early(settings)
    if dry:
        from stepscope.pipeline import run_dry

        return run_dry(settings)
    from stepscope.pipeline import run_study

    run_study(settings)
    show_page(Path(settings.out) / "study.html", show)
