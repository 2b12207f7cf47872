"""``stepscope explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.cli.options import (
    ConfigFile,
    Device,
    Overrides,
    Precision,
    Prompts,
    Reward,
    TaskSpec,
    TemplateFile,
)
from stepscope.processes import said_once


def explain(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder with its optimizer state.")
    ],
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
) -> None:
    """Who moves the entropy in a checkpoint's next step, in one command: the sentence, its parts, the tokens.

    The stages of measure that this needs, on batches sized for the time. Examples:

    stepscope explain runs/demo/checkpoints/step-60

    stepscope explain out/checkpoint-500 --task gsm8k --minutes 20 --out runs/why
    """
    from stepscope.config import MeasureConfig, load_config

    where = Path(checkpoint).resolve()
    run = where.parent.parent if where.parent.name == "checkpoints" else where.parent
    out = out or str(Path("runs", "explain", f"{run.name}-{where.name}"))
    values = {"checkpoint": checkpoint, "out": out, "precision": precision, "device": device}
    values |= {"task": task, "prompts": prompts, "reward": reward, "template": template}
    with said_once():
        settings = load_config(MeasureConfig, config, overrides or [], values)
    given = {name for name in ("update", "probe") for text in overrides or [] if text.startswith(f"{name}.")}
    from stepscope.pipeline import run_explain

    run_explain(settings, minutes=minutes, fixed=frozenset(given), as_json=as_json)
