"""A command in a process of its own: whatever its files do to that process, the user gets one line.

Files can make a parser take all memory, loop for ever, or take the interpreter down with it; none of these is
an exception that could be caught in the same process.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stepscope.errors import CheckpointError

INSIDE = "STEPSCOPE_INSIDE"
"""Set in the environment of such a process."""


def run_bounded(arguments: Sequence[str], *, seconds: float, what: str) -> int:
    """Run ``stepscope ARGUMENTS`` in another process with the same terminal; its exit code.

    On a machine without a GPU it may allocate as much as there is memory: beyond, it meets a refusal instead
    of the system's out-of-memory killer. CUDA reserves more than it ever uses and allows no such limit.

    Args:
        arguments: of the command line.
        seconds: after which it is ended.
        what: what is looked at, for the error.

    Raises:
        CheckpointError: it took too long, or died of a signal.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", _INSIDE, *arguments],
        env={**os.environ, INSIDE: "1"},
    )
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{what}: looking at it took more than {seconds:g} s; if it is only large, give more with "
            "--time-limit, else a file in it makes its reader loop"
        ) from None
    finally:
        child.kill()
        child.wait()
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as where memory runs out" if code == -signal.SIGKILL else ""
        raise CheckpointError(
            f"{what}: the process that looked at it died of {name}{hint}; a file in it is damaged, or the "
            "model needs a larger machine"
        )
    return code


def limit_memory() -> None:
    """Let this process allocate no more than the machine has."""
    if Path("/dev/nvidiactl").exists():
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard < 0 else min(memory, hard), hard))


_INSIDE = f"from {__name__} import limit_memory; limit_memory(); from stepscope.cli import main; main()"
