"""How a verb ends: done, with one line on what the user can mend, or interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import typer

from stepscope.errors import mendable_line

_P = ParamSpec("_P")
_R = TypeVar("_R")


def mendable(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn what the user can mend into one line and exit code 2, and an interrupt into 130."""

    @wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except Exception as error:  # what is no refusal goes on as it came
            if not (line := mendable_line(error)):
                raise
            print(f"stepscope: error: {line}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            print("stepscope: interrupted; what is finished is kept", file=sys.stderr)
            raise typer.Exit(130) from interrupt

    return wrapped
