"""Reading ``training_args.bin`` of a Hugging Face or TRL run without running it.

The file is a pickle. Here every class it names, one of the user's own too, becomes an inert stand-in that
only records what it was given; nothing of it is imported. What has no place in training arguments (functions
of Python itself, tensors) is refused, and so is a file out of all proportion.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError

TRAINING_ARGS_FILE = "training_args.bin"
"""Name of the file inside a checkpoint folder."""

LARGEST_PICKLE = 2**20
"""Bytes; that of a real run has about ten thousand."""

MOST_OPERATIONS = 20_000
"""Pickle operations, and the highest number of its memo; a real run has about two thousand."""

_PYTHON = sys.stdlib_module_names | {"__builtin__", "copy_reg"}
_PLAIN: dict[tuple[str, str], type] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
}
_TORCH = frozenset({"device", "dtype", "float64", "float32", "float16", "bfloat16", "uint8", "int8"})


_QUANTIZING = ("quantization_config", "load_in_4bit", "load_in_8bit")
_LOADING_ONLY = frozenset(
    {
        *_QUANTIZING, "dtype", "torch_dtype", "attn_implementation", "device_map", "max_memory", "tp_plan",
        "offload_folder", "offload_state_dict", "offload_buffers", "low_cpu_mem_usage", "use_safetensors",
        "use_cache", "use_kernels", "revision", "token", "cache_dir", "force_download", "local_files_only",
        "proxies", "trust_remote_code", "weights_only",
    }
)  # fmt: skip
"""Arguments of ``from_pretrained`` that leave the model's function as it is stored, quantizing apart."""


class Record:
    """An inert stand-in: whatever the pickle builds becomes one of these, with its attributes."""

    origin = ""

    def __new__(cls, *args: Any) -> Record:
        """Keep the arguments, call nothing."""
        record = object.__new__(cls)
        record.__dict__["arguments"] = args
        return record

    def __init__(self, *args: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Take over attributes that are plain names."""
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"state of type {type(state).__name__}")
        self.__dict__.update(state)


@dataclass(frozen=True)
class TrainingArguments:
    """What a run kept of its arguments.

    Attributes:
        origin: ``module.name`` of their class.
        values: the attributes; objects in it are inert :class:`Record` stand-ins.
    """

    origin: str
    values: dict[str, Any]


class _RecordingUnpickler(pickle.Unpickler):
    """Resolves every allowed global to a fresh subclass of :class:`Record`, and refuses the others."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for ``module.name``; the module is not imported."""
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        top = module.partition(".")[0]
        if top in _PYTHON or (top == "torch" and (module != "torch" or name not in _TORCH)):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return type(name, (Record,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """Tensors have no place in training arguments."""
        raise pickle.UnpicklingError("it refers to stored tensors")


def read_training_args(path: Path) -> TrainingArguments:
    """The pickled training arguments, as plain data.

    Raises:
        CheckpointError: the file is damaged, or holds anything but plain data and objects of named classes.
    """
    try:
        root = _RecordingUnpickler(io.BytesIO(_pickle_in(path))).load()
    except (
        OSError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        RecursionError,
        OverflowError,
    ) as error:
        reason = (str(error).splitlines() or ["damaged"])[0][:120]
        raise CheckpointError(
            f"{path}: the training arguments are not read ({reason}); copy the file again, or pass the loss "
            "settings yourself"
        ) from error
    if not isinstance(root, Record):
        raise CheckpointError(
            f"{path}: got {type(root).__name__}, expected training arguments; copy the file again"
        )
    values = {name: value for name, value in vars(root).items() if name != "arguments"}
    return TrainingArguments(root.origin, values)


def base_revision(path: Path) -> str | None:
    """The revision of the base model that TRL was told to load (``model_init_kwargs``), if the file is there.

    Raises:
        CheckpointError: the file is damaged, or TRL was told to quantize the base or to change its config: on
            the base as it is stored the adapter is another policy.
    """
    if not path.is_file():
        return None
    try:
        told = read_training_args(path).values.get("model_init_kwargs")
    except CheckpointError as error:
        reason = str(error).rpartition("; ")[0]
        raise CheckpointError(
            f"{reason}: so it is not known which base the adapter was trained on; if it is the one that "
            "adapter_config.json names, not quantized, remove this file and give the loss settings yourself"
        ) from error
    if isinstance(told, str):
        try:
            told = json.loads(told)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: model_init_kwargs is no JSON object ({error}); copy the file again"
            ) from error
    if not isinstance(told, Mapping):
        return None
    packed = [n for n in _QUANTIZING if told.get(n) not in (None, False)]
    if packed:
        raise CheckpointError(
            f"{path}: the base was quantized in training ({packed[0]}), and on the full-precision base the "
            "adapter is another policy; dequantize that base, save it, name it in adapter_config.json, and "
            "remove this file (then give the loss settings yourself)"
        )
    changed = sorted(str(n) for n, v in told.items() if v is not None and n not in _LOADING_ONLY)
    if changed:
        raise CheckpointError(
            f"{path}: the base was loaded with another config in training ({', '.join(changed)[:80]} in "
            "model_init_kwargs), which adapter_config.json does not keep; load it so, save it, name that "
            "folder in adapter_config.json, and remove this file (then give the loss settings yourself)"
        )
    revision = told.get("revision")
    return revision if isinstance(revision, str) else None


def _pickle_in(path: Path) -> bytes:
    """The pickle inside the archive, once it is known to be of the size and depth of training arguments."""
    with zipfile.ZipFile(path) as archive:
        member = next((m for m in archive.infolist() if m.filename.endswith("/data.pkl")), None)
        if member is None:
            raise pickle.UnpicklingError("no data.pkl inside")
        if member.file_size > LARGEST_PICKLE:
            raise pickle.UnpicklingError(f"a pickle of {member.file_size} bytes")
        data = archive.read(member)
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        large = "PUT" in operation.name and isinstance(argument, int) and argument > MOST_OPERATIONS
        if large or count > MOST_OPERATIONS:
            raise pickle.UnpicklingError("a pickle with more in it than training arguments have")
    return data
