"""Arrays on disk: safetensors that appear whole or not at all, with the version of their layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stepscope.errors import RunFolderError
from stepscope.results.files import whole, why_unreadable
from stepscope.results.records import CURE, VERSION

ARRAYS_METADATA = {VERSION: "1"}
"""Version of the names in such files."""


def write_arrays(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write arrays by name; the file appears whole or not at all."""
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    whole(path, lambda partial: save_file(contiguous, str(partial), ARRAYS_METADATA))


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """The arrays that :func:`write_arrays` wrote, by name.

    Args:
        path: of the file.
        names: of those wanted, where they are there; all by default.

    Raises:
        RunFolderError: the file is missing, damaged or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found = {VERSION: (file.metadata() or {}).get(VERSION)}
            chosen = file.keys() if names is None else set(file.keys()) & set(names)
            arrays = {name: file.get_tensor(name) for name in chosen}
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{path}: damaged ({why_unreadable(path, error)}); {CURE}") from error
    if found != ARRAYS_METADATA:
        raise RunFolderError(f"{path}: {found}, and this stepscope reads {ARRAYS_METADATA}; {CURE}")
    return arrays
