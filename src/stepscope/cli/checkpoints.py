"""``stepscope check`` and ``stepscope convert``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stepscope.bounded import INSIDE, run_bounded
from stepscope.cli.options import Overrides, Prompts, Reward, TaskSpec, TemplateFile
from stepscope.console import say
from stepscope.errors import CheckpointError, ConfigError

COMMAND = "command"
"""The context of a call from a shell; a call from Python stays in its process."""


def check(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="CHECKPOINT|RUN|CONFIG", help="Folder, or YAML file.")],
    overrides: Overrides = None,
    task: TaskSpec = None,
    prompts: Prompts = None,
    reward: Reward = None,
    template: TemplateFile = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="SECONDS", min=1, help="After which looking is given up.")
    ] = 1800.0,
) -> None:
    """Is this fit to be measured? What is missing, and what to do? Takes the settings of measure.

    On the task, or the run's own prompts, a few responses are sampled from a checkpoint: shown are a prompt
    as the policy gets it, a response with its grade, what measuring takes, and the next command. Of a run's
    folder it is asked whether the run is healthy: moments kept at resumes, settings, and the log. All of it
    happens in a process of its own, bounded in time and memory.
    """
    from stepscope.pipeline.paths import need_path

    need_path(target, CheckpointError, "no such checkpoint folder or configuration file")
    own = {"task": task, "prompts": prompts, "reward": reward, "template": template}
    if context.obj == COMMAND and INSIDE not in os.environ:
        from stepscope.pipeline.check.asked import refuse_wrong

        refuse_wrong(target, overrides or [], own)
        raise typer.Exit(run_bounded(sys.argv[1:], seconds=time_limit, what=str(target)))
    from stepscope.pipeline import run_check

    if not run_check(target, overrides or [], own=own):
        raise ConfigError(f"{target}: not fit to be measured, or not healthy; see the findings above")
    say(f"check: {target}: nothing stands against it")


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any format that check names.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    merged: Annotated[
        bool, typer.Option(help="Weights alone, adapters merged, for an inference engine to serve.")
    ] = False,
) -> None:
    """A checkpoint of any format (FSDP, torch's shards, verl) in Hugging Face's layout, with its moments.

    The new folder is read back and compared with the source to the bit before it gets its name. Printed is
    what was read, what was written, and what could not be carried over.
    """
    from stepscope.pipeline.paths import need_checkpoint

    need_checkpoint(source)
    from stepscope.pipeline import run_convert

    run_convert(source, target, merged=merged)
