"""The exception tree: every error a user can mend.

The command line turns a :class:`StepscopeError`, and what the machine refuses, into one line on standard
error and exit code 2 (:func:`mendable_line`). Anything else that escapes is a bug and keeps its traceback
(exit code 1).
"""

from __future__ import annotations

import errno
import os
import re
import reprlib

LONGEST_LINE = 2000
"""Characters of an error line; what a file says may have any length."""


class StepscopeError(Exception):
    """Something the user can mend. The message says what, where, got against expected, and what to do."""


class ConfigError(StepscopeError):
    """A setting is unknown, missing, of the wrong type, or contradicts another."""


class RunFolderError(StepscopeError):
    """A run folder or one of its artifacts is missing, damaged, or would be overwritten."""


class InUseError(RunFolderError):
    """Another process is at work in a run folder."""


class StudyError(StepscopeError):
    """Some measurements of a study could not be made, or what is to make them is not there."""


class TaskError(StepscopeError):
    """A task is unknown or its data cannot be read."""


class CheckpointError(StepscopeError):
    """A checkpoint is missing, incomplete, damaged, or does not fit its own optimizer state."""


class TrainingError(StepscopeError):
    """A training cannot go on from where it is."""


class BatchError(StepscopeError):
    """An update or probe batch cannot carry the measurement asked of it."""


class RewardError(BatchError):
    """Rewards cannot be had, or make no step; the message shows one response with its prompt and its grade.

    Args:
        message: what is wrong.
        example: the response, as :mod:`stepscope.tasks.example` keeps it, or None where there is none.
    """

    def __init__(self, message: str, example: object = None) -> None:
        super().__init__(message if example is None else f"{message}. For example: {example}")
        self.example = example


class MeasurementError(StepscopeError):
    """The measurement asked for does not exist for this policy or these settings."""


class PeerError(StepscopeError):
    """Another of the processes that work together has failed or gone."""


def mendable_line(error: BaseException) -> str:
    """What to tell the user about an error in one printable line, or "" for a bug.

    The machine's own refusals count, whichever library met them: a full disk, a folder that cannot be written
    or has been removed, a name that is too long, no memory.
    """
    if isinstance(error, StepscopeError):
        return printable(str(error))
    if _out_of_memory(error):
        return printable(f"there is not enough memory ({error}); lower batch_size, or take a larger machine")
    number = _system_error(error)
    if number is None:
        return ""
    reason = str(error) or os.strerror(number)
    return printable(
        f"the system refuses a file: {reason}; {_CURES.get(number, 'see to it, then run again')}"
    )


def printable(text: str) -> str:
    """Text of any origin in one line, of a length and with characters that a terminal can take."""
    line = " ".join(text.split())
    if len(line) > LONGEST_LINE:
        half = LONGEST_LINE // 2
        line = f"{line[:half]} [{len(line) - 2 * half} characters left out] {line[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shown(value: object) -> str:
    """A value that a file or a user gave, for a message: its ``repr``, cut to some eighty characters."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return f"a {type(value).__name__} too large to show"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80

_WRITABLE = "choose a place that can be written"
_CURES = {
    errno.ENOSPC: "make room on the disk, then run again",
    errno.EDQUOT: "make room in your quota, then run again",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "it is not there, or was removed meanwhile; check the path, then run again",
}


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error, also where a library written in Rust has put it into words."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d{1,5})\)", str(error))
    return None if found is None else int(found[1])


def _out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch, on a processor or a GPU, could not have the memory they asked for."""
    torch_says = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(said in str(error) for said in torch_says)
    )
