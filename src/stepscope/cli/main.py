"""The app: its verbs in the order of the help, and the entry point."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from stepscope.cli.checkpoints import COMMAND, check, convert
from stepscope.cli.endings import mendable
from stepscope.cli.evaluate import evaluate
from stepscope.cli.examples import epilog
from stepscope.cli.explain import explain
from stepscope.cli.export import export
from stepscope.cli.ledger import ledger
from stepscope.cli.measure import measure
from stepscope.cli.report import report
from stepscope.cli.study import study
from stepscope.cli.train import demo, train
from stepscope.errors import printable

app = typer.Typer(
    name="stepscope",
    help="One reinforcement-learning step of a language model under the microscope.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"stepscope {version('stepscope')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """One reinforcement-learning step of a language model under the microscope."""


_VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "measure": measure,
    "explain": explain,
    "study": study,
    "ledger": ledger,
    "report": report,
    "export": export,
    "check": check,
    "convert": convert,
}

for _name, _verb in _VERBS.items():
    # The whole first line, which would be cut to a terminal's width.
    _first = (_verb.__doc__ or "").partition("\n")[0]
    app.command(_name, short_help=_first, epilog=epilog(_name))(mendable(_verb))


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as the user should see it."""
    return f"stepscope: warning: {printable(str(message))}\n"


def main() -> None:
    """Entry point of the ``stepscope`` command."""
    # OpenMP threads spin while they wait: with the cores shared, a training step took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = _one_line
    app(obj=COMMAND)
