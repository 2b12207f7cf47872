"""``stepscope eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from stepscope.cli.options import (
    ConfigFile,
    Device,
    DryRun,
    Open,
    Overrides,
    Precision,
    Prompts,
    Resume,
    Reward,
    TaskSpec,
    TemplateFile,
    first_or_override,
)
from stepscope.cli.pages import show_page
from stepscope.processes import said_once


def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT|RUN", help="A checkpoint, or a run folder for all of its checkpoints."
        ),
    ] = None,
    overrides: Overrides = None,
    task: TaskSpec = None,
    prompts: Prompts = None,
    reward: Reward = None,
    template: TemplateFile = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE|DIR",
            help="Parquet file, or a folder for eval.parquet; default: the run folder.",
        ),
    ] = None,
    precision: Precision = None,
    device: Device = None,
    config: ConfigFile = None,
    resume: Resume = False,
    show: Open = False,
    dry: DryRun = False,
) -> None:
    """pass@k, format, length and entropy with their errors, one row per checkpoint; and a page of curves."""
    from stepscope.pipeline.paths import need_file, need_source

    source, rest = first_or_override(source, overrides)
    need_file(config)
    need_source(source)
    from stepscope.config import EvalConfig, load_config

    values = {"source": source, "out": out, "precision": precision, "device": device}
    values |= {"task": task, "prompts": prompts, "reward": reward, "template": template}
    with said_once():
        settings = load_config(EvalConfig, config, rest, values)
    from stepscope.pipeline.early import refuse_early, table_of

    refuse_early(settings, resume=resume, dry=dry)
    if dry:
        from stepscope.pipeline import run_dry

        return run_dry(settings, resume=resume)
    from stepscope.pipeline import run_eval

    run_eval(settings, resume=resume)
    show_page(table_of(settings).with_suffix(".html"), show)
