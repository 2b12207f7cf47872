"""``stepscope measure``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepscope.cli.measuring import PAGE, Checkpoint, apart, in_run, measure_settings, sizes_asked
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
    split,
)
from stepscope.cli.pages import show_page
from stepscope.errors import ConfigError


def measure(
    checkpoint: Checkpoint = None,
    overrides: Overrides = None,
    task: TaskSpec = None,
    prompts: Prompts = None,
    reward: Reward = None,
    template: TemplateFile = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR", help="Run folder; default: measure/step-N in the run of the checkpoint."
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            "--stages",
            metavar="A,B",
            help="Only these stages, on the run that the folder already holds: rollouts, step, change, "
            "influence, validation, kernel, models, curvature, kinship, noise, criteria, frontier, "
            "report.",
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Also hold influence against steps re-made without some sequences."),
    ] = False,
    quantity: Annotated[
        str | None,
        typer.Option(
            "--quantity",
            metavar="A,B",
            help="entropy (default), reward, length, kl, logprob; the first is primary.",
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            "--update",
            metavar="FILE",
            help="The step's batch as the training dumped it: TRL's completions, verl's rollouts, a table.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="GIB", help="Budget for gradients that are kept (default 4)."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also write where time and memory go, pass by pass, and print it."),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Each of several processes (torchrun) holds a part of the parameters and moments."
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="An answer in about a minute: small batches, and the stages of explain. To runs/quick.",
        ),
    ] = False,
    precision: Precision = None,
    device: Device = None,
    config: ConfigFile = None,
    resume: Resume = False,
    show: Open = False,
    dry: DryRun = False,
) -> None:
    """Measure what a checkpoint's next optimizer step does to its policy, and who did it."""
    checkpoint, rest = first_or_override(checkpoint, overrides)
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "task": task,
        "prompts": prompts,
        "reward": reward,
        "template": template,
        "out": out,
        "stages": split(stages),
        "quantities": split(quantity),
        "update.file": update,
        "memory": memory,
        "profile": profile or None,
        "shard": shard or None,
        "precision": precision,
        "device": device,
    }
    if quick and (stages is not None or validate):
        raise ConfigError("--quick chooses the stages itself; leave out --stages and --validate, or --quick")
    settings = measure_settings(
        config, rest, values, (lambda folder: apart("quick", folder)) if quick else in_run
    )
    if validate and "validation" not in settings.stages:
        settings = settings.model_copy(update={"stages": [*settings.stages, "validation"]})
    if show and not quick and "report" not in settings.stages:
        raise ConfigError("--open: the stage report makes the page, and it is not among the stages; add it")
    resume = resume or stages is not None
    from stepscope.pipeline.early import refuse_early

    refuse_early(settings, resume=resume, dry=dry)
    if dry:
        from stepscope.pipeline import run_dry

        return run_dry(settings, resume=resume, minutes=1.0 if quick else None)
    from stepscope.pipeline import run_measure, run_quick

    if quick:
        run_quick(settings, fixed=sizes_asked(rest), resume=resume)
    else:
        run_measure(settings, resume=resume)
    show_page(Path(settings.out) / PAGE, show)
