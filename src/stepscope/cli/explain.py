"""``stepscope explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.cli.measuring import PAGE, Checkpoint, apart, measure_settings, sizes_asked
from stepscope.cli.options import (
    ConfigFile,
    Device,
    DryRun,
    Open,
    Overrides,
    Precision,
    Prompts,
    Reward,
    TaskSpec,
    TemplateFile,
    first_or_override,
)
from stepscope.cli.pages import show_page


def explain(
    checkpoint: Checkpoint = None,
    overrides: Overrides = None,
    task: TaskSpec = None,
    prompts: Prompts = None,
    reward: Reward = None,
    template: TemplateFile = None,
    minutes: Annotated[
        float, typer.Option("--minutes", help="What it may take; batches are sized for it.", min=0.1)
    ] = 5.0,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Run folder; default: runs/explain and its name."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    precision: Precision = None,
    device: Device = None,
    config: ConfigFile = None,
    show: Open = False,
    dry: DryRun = False,
) -> None:
    """Who moves the entropy in a checkpoint's next step, in one command: the sentence, its parts, the tokens.

    The stages of measure that this needs, on batches sized for the time.
    """
    checkpoint, rest = first_or_override(checkpoint, overrides)
    values = {"checkpoint": checkpoint, "out": out, "precision": precision, "device": device}
    values |= {"task": task, "prompts": prompts, "reward": reward, "template": template}
    settings = measure_settings(config, rest, values, lambda folder: apart("explain", folder))
    from stepscope.pipeline.early import refuse_early

    refuse_early(settings, resume=True)
    if dry:
        from stepscope.pipeline import run_dry

        return run_dry(settings, resume=True, minutes=minutes)
    from stepscope.pipeline import run_explain

    run_explain(settings, minutes=minutes, fixed=sizes_asked(rest), as_json=as_json)
    show_page(Path(settings.out) / PAGE, show)
