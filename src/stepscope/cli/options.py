"""Options that several verbs have, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.errors import ConfigError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.field=value]...", help="Settings that win over the configuration file."),
]
TaskSpec = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="arithmetic, gsm8k, gsm8k:DIR, rg:NAME or jsonl:FILE; default: the task of the training.",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="The run's own prompts in place of a task: JSON lines, parquet or CSV with a column prompt.",
    ),
]
Reward = Annotated[
    str | None,
    typer.Option(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="The run's own reward function, as TRL calls it; your code, imported from this folder and run.",
    ),
]
TemplateFile = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="FILE|TEXT",
        help="What prompts are asked in: a text with {prompt}, or a file of it or of a chat template.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="float32 (default), float64 or bfloat16.", show_default=False),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Torch device; default: a GPU where there is one.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings as YAML.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the settings and what would be done; do and write nothing."),
]
Open = Annotated[bool, typer.Option("--open", help="Open the page in a browser at the end.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder already holds.")]


def split(text: str | None) -> list[str] | None:
    """``a,b`` as a list."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str | None, option: str) -> list[float] | None:
    """``0.5,1`` as a list."""
    parts = split(text)
    try:
        return None if parts is None else [float(part) for part in parts]
    except ValueError as error:
        raise ConfigError(f"{option}: expected numbers such as 0.25,0.5,1, got {text!r}") from error


def first_or_override(first: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """A leading ``section.field=value`` belongs to the overrides, not to the first argument."""
    rest = overrides or []
    if first is not None and "=" in first and not Path(first).exists():
        return None, [first, *rest]
    return first, rest
