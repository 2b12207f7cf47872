"""A function of the user's own, ``module:function``: imported when they name it, never because a file does.

Whoever names a function on the command line or in a configuration of theirs runs it as they run their own
training: it is trusted, and not kept from anything. A checkpoint never names one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepscope.errors import ConfigError

SHOWN = 300
"""Most characters of a message of somebody else's code that are shown."""


def own_function(name: str, setting: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        name: ``module:function``, given by the user; a module beside the working directory will do.
        setting: that named it, for the error.

    Raises:
        ConfigError: there is no such module or function, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py"):
        raise ConfigError(
            f"{setting}: {name!r} names a file; give its module, {Path(module_name).stem}:{attribute}, and "
            "run beside it"
        )
    try:
        with _working_folder():
            module = importlib.import_module(module_name)
    except Exception as error:
        inner = error.name if isinstance(error, ModuleNotFoundError) else module_name
        missing = isinstance(error, ModuleNotFoundError) or not module_name
        if missing and inner is not None and f"{module_name}.".startswith(f"{inner}."):
            raise ConfigError(
                f"{setting}: no module {module_name!r} to take {attribute!r} from; run beside "
                f"{module_name}.py, or put it on PYTHONPATH"
            ) from error
        raise ConfigError(
            f"{setting}: {module_name} cannot be imported: {what_happened(error)}; mend it"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{setting}: {module_name} has no function {attribute!r}; give module:function")
    found: Callable[..., Any] = function
    return found


def own_source(name: str) -> dict[str, str]:
    """Where a function comes from, for the provenance: its name, and file and SHA-256 of its module.

    What the module itself imports is not looked at. Nothing is imported for it but the packages around the
    module. Without a file (a built-in, or nothing there) both are empty.
    """
    module_name = name.partition(":")[0]
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None and module_name:
        try:
            with _working_folder():
                found = importlib.util.find_spec(module_name)
        except (ImportError, ValueError):
            found = None
        file = None if found is None else found.origin
    if file is None or not Path(file).is_file():
        return {"name": name, "file": "", "sha256": ""}
    return {"name": name, "file": file, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}


def what_happened(error: BaseException) -> str:
    """An exception of somebody else's code in a line: kind, place, message."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    last = frames[-1] if frames else None
    place = f" at {Path(last.filename).name}:{last.lineno}" if last is not None else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" at {Path(error.filename).name}:{error.lineno}"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{place}: {words if len(words) <= SHOWN else words[:SHOWN] + ' ...'}"


@contextmanager
def _working_folder() -> Iterator[None]:
    """Modules of the working directory are found, in the block alone."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
