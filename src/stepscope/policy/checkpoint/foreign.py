"""Files of unknown origin: bounds that hold before a parser runs, and one guard around all that reads them.

The parsers (transformers, tokenizers, PEFT, safetensors, torch, gguf, jinja2) and the models they build raise
whatever comes up on files they do not expect, from ``AssertionError`` to a panic of Rust.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from stepscope.errors import CheckpointError, mendable_line, printable

P = ParamSpec("P")
R = TypeVar("R")

LARGEST_TEXT = 2**28
"""Bytes of a JSON file; the largest tokenizers have some 30 million."""

LARGEST_PICKLE = 2**26
"""Bytes of what ``optimizer.pt`` holds beside its tensors."""

ROOM = 3
"""Parameters a model may have per stored number; tied weights count twice."""


def reads_foreign(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap what reads a checkpoint or makes first use of one: any failure is an error of its files.

    The first argument says where they are: a path, or a policy. What the machine refuses goes on as it came.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"  # of Rust, and no Exception
            if not (panic or isinstance(error, Exception)) or mendable_line(error):
                raise
            where = getattr(args[0], "path", args[0])
            raise CheckpointError(
                f"{where}: its files are not those of a sound checkpoint ({what_and_where(error)}); copy "
                "them again, or load and save the model with the library that wrote it"
            ) from error

    return guarded


def what_and_where(error: BaseException) -> str:
    """Kind, message and origin of an error that a library raised, in a line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f", {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return f"{type(error).__name__}: {printable(str(error))[:160]}{place}"


def refuse_large_texts(folder: Path) -> None:
    """Refuse JSON files that no parser should be given.

    Raises:
        CheckpointError: naming the file.
    """
    for file in sorted(folder.glob("*.json")):
        if (size := file.stat().st_size) > LARGEST_TEXT:
            raise CheckpointError(f"{file}: {size} bytes, expected at most {LARGEST_TEXT}; copy it again")


def refuse_packed(path: Path) -> None:
    """Refuse an archive of tensors that unpacks to more than it is: torch stores them as they are.

    Raises:
        CheckpointError: it is compressed, its directory says other sizes than its own, or what it holds
            beside tensors is out of all proportion.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    plain = max((m.file_size for m in members if m.filename.endswith(".pkl")), default=0)
    if unpacked > path.stat().st_size or plain > LARGEST_PICKLE:
        raise CheckpointError(
            f"{path}: {unpacked} bytes unpacked from a file of {path.stat().st_size}, {plain} of them no "
            "tensors; torch writes no such file, copy it again"
        )


def refuse_disproportion(
    folder: Path, config: Mapping[str, Any], sizes: Sequence[int] | None = None
) -> nn.Module | None:
    """Refuse a model whose ``config.json`` describes far more than its files hold, before any of it is made.

    Args:
        folder: of the model.
        config: content of its ``config.json``.
        sizes: numbers in each stored tensor; None for those of the folder's safetensors files.

    Returns:
        The model without any memory of its own, or None where nothing is stored: the loader says so.

    Raises:
        CheckpointError: more layers than stored tensors, or many more parameters than stored numbers.
    """
    sizes = list(_stored_sizes(folder)) if sizes is None else sizes
    if not sizes:
        return None
    layers = max(_layers(config), default=0)
    if layers > len(sizes):
        raise CheckpointError(
            f"{folder / 'config.json'}: {layers:.3g} layers, and the files hold {len(sizes)} tensors; mend "
            "config.json, or copy the weights again"
        )
    described = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    with torch.device("meta"):
        model: nn.Module = auto_class(described).from_config(described, trust_remote_code=False)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > ROOM * sum(sizes):
        raise CheckpointError(
            f"{folder / 'config.json'}: a model of {parameters:.3g} parameters, and the files hold "
            f"{sum(sizes):.3g} numbers; mend config.json, or copy the weights again"
        )
    return model


def auto_class(described: PreTrainedConfig) -> Any:
    """What of transformers makes a model: of language, or of images and text, whose text path is used."""
    if type(described) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    pictured = type(described) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if pictured else AutoModelForCausalLM


def _stored_sizes(folder: Path) -> Iterator[int]:
    """Numbers in each tensor of a folder's safetensors files, by their headers."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield math.prod(weights.get_slice(name).get_shape())


def _layers(config: Mapping[str, Any]) -> Iterator[int]:
    """Every whole number that a configuration calls its number of layers."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _layers(value)
        elif _LAYERS.fullmatch(str(key)) and isinstance(value, int):
            yield value


_LAYERS = re.compile(r"(num_(hidden_|decoder_)?layers|n_layers?|decoder_layers)")
