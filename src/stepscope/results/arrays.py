"""Arrays on disk: safetensors that appear whole or not at all, with the version of their layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stepscope.errors import RunFolderError
from stepscope.results.files import whole, why_unreadable
from stepscope.results.records import CURE, VERSION

ARRAYS_VERSION = "1"
"""Raised when a name means something else."""


def write_arrays(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write arrays by name; the file appears whole or not at all."""
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    whole(path, lambda partial: save_file(contiguous, str(partial), {VERSION: ARRAYS_VERSION}))


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays that :func:`write_arrays` wrote, by name.

    Raises:
        RunFolderError: the file is missing, damaged or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found = (file.metadata() or {}).get(VERSION)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{path}: damaged ({why_unreadable(path, error)}); {CURE}") from error
    if found != ARRAYS_VERSION:
        raise RunFolderError(
            f"{path}: {VERSION} {found}, and this stepscope reads version {ARRAYS_VERSION}; {CURE}"
        )
    return arrays
