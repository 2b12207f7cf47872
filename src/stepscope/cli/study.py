"""``stepscope study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.cli.options import Overrides


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
) -> None:
    """Many measurements: checkpoints x settings x repeats. Goes on where an earlier call was stopped.

    On a cluster each measurement is a job or task of its own; a killed one is taken again, and the table is
    the same. Examples (more in docs/CLUSTERS.md):

    stepscope study CONFIG --executor slurm slurm.partition=gpu slurm.gpus=1 slurm.time=120 slurm.mem=32GB

    stepscope study CONFIG --executor ray ray.address=auto ray.cpus=4

    stepscope study CONFIG --executor slurm slurm.cluster=local slurm.parallel=4   (processes on this machine)
    """
    from stepscope.config import StudyConfig, load_config

    settings = load_config(StudyConfig, config, overrides or [], {"out": out, "executor": executor})
    from stepscope.pipeline import run_study

    run_study(settings)
