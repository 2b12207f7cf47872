"""What ``stepscope check`` shows of a trial: the prompt, a response and its grade, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from stepscope.pipeline.check.trial import Trial

LONGEST = 3000
"""Most characters of a prompt or response that are shown."""


def show_trial(console: Console, trial: Trial) -> None:
    """A prompt as the policy gets it, with a response and its grade, where there are some."""
    example = trial.example
    if example is None:
        return
    end = " (cut)" if example.truncated else ""
    for title, text in (
        ("a prompt, as the policy gets it", example.prompt),
        (f"its response{end}", example.response),
    ):
        console.print(Rule(Text(title), align="left", style="dim"))
        console.print(Text(_safe(text)), soft_wrap=True)
    console.print(Rule(Text("its grade"), align="left", style="dim"))
    console.print(Text(_safe(example.grade)), soft_wrap=True)
    if example.fault:
        console.print(Text(_safe(example.fault)), soft_wrap=True)
    console.print(Rule(style="dim"))


def command(verb: str, target: Path | str, options: Mapping[str, str | None], settings: Sequence[str]) -> str:
    """A command as a shell takes it.

    Args:
        verb: of stepscope.
        target: its first argument.
        options: by name; those that are None are left out.
        settings: ``section.field=value``.
    """
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return shlex.join(["stepscope", verb, str(target), *given, *dict.fromkeys(settings)])


def _safe(text: str) -> str:
    """Text of any origin with characters that a terminal can take, without its middle where it is long."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
