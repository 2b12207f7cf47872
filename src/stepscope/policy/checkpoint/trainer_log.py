"""What the Hugging Face Trainer logged, as ``trainer_state.json`` of a checkpoint keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import LARGEST_TEXT, reads_foreign

TRAINER_STATE = "trainer_state.json"
"""Where the Trainer keeps the number of steps and its log."""


@reads_foreign
def read_log(folder: Path) -> tuple[dict[str, Any], ...] | None:
    """The entries of ``log_history`` in the order they were logged; None where there is no such file.

    Raises:
        CheckpointError: the file is damaged, or its log is no list of objects.
    """
    path = folder / TRAINER_STATE
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise CheckpointError(f"{path}: {size} bytes, expected at most {LARGEST_TEXT}; copy it again")
    try:
        history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0][:120]
        raise CheckpointError(f"{path}: cannot be read ({reason}); copy it again") from error
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{path}: cannot be read (log_history is no list of objects); copy it again")
    return tuple(history)
