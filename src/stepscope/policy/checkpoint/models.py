"""Loading models and tokenizers: a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from stepscope.errors import CheckpointError, ConfigError
from stepscope.policy.checkpoint.foreign import (
    auto_class,
    reads_foreign,
    refuse_disproportion,
    refuse_large_texts,
)
from stepscope.policy.checkpoint.tensors import Stored, filled
from stepscope.policy.group import current
from stepscope.policy.numerics.finiteness import refuse_broken_weights
from stepscope.policy.numerics.precision import lift_model

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*")
"""Files of which a folder with a tokenizer has at least one."""

LOADING = (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError)
"""What transformers (configs by huggingface_hub), PEFT and safetensors raise for files that cannot be
loaded."""

NO_CODE = {"trust_remote_code": False}
"""For every ``from_pretrained`` of transformers: left unset, it asks on the terminal whether to run code."""

_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_types_in_files: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

_OLD_BUFFERS = re.compile(r"\.masked_bias$")
"""A constant that old versions of GPT-2 stored: no weight. Other buffers transformers passes over itself."""


@reads_foreign
def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode (no dropout).

    Args:
        model: a hub id, a local folder with safetensors, or the path of a ``.gguf`` file.
        dtype: of the parameters; float64 derives rotary tables anew (:func:`lift_model`).
        device: where it goes; None for a GPU where there is one.
        revision: branch, tag or commit of a model on the hub.

    Raises:
        CheckpointError: it does not exist, is damaged or quantized, or its weights are not those of its
            architecture, or not finite.
    """
    weights = load_weights(model, dtype=dtype, device=device, revision=revision)
    return weights, load_tokenizer(model, revision=revision)


@reads_foreign
def model_of_tensors(
    folder: Path,
    tensors: Mapping[str, Stored],
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Any]:
    """What :func:`load_model` gives, with weights that come from elsewhere than the folder's files.

    Args:
        folder: with ``config.json`` and a tokenizer.
        tensors: by name, as the model's ``state_dict()`` has it, with whatever wrappers put into names. Each
            is read once.
        dtype: of the parameters.
        device: where it goes; None for a GPU where there is one.

    Raises:
        CheckpointError: as :func:`load_model`; weights that are missing, have no place in the model, or have
            another shape are named.
    """
    return load_weights(folder, dtype=dtype, device=device, tensors=tensors), load_tokenizer(folder)


@reads_foreign
def load_weights(
    model: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    revision: str | None = None,
    tensors: Mapping[str, Stored] | None = None,
) -> nn.Module:
    """The model of :func:`load_model` or :func:`model_of_tensors` without its tokenizer."""
    source = _source(model, revision)
    folder = Path(source["pretrained_model_name_or_path"])
    if folder.is_dir():
        refuse_large_texts(folder)
    with quiet():
        try:
            config = {} if "gguf_file" in source else PreTrainedConfig.get_config_dict(**source)[0]
            if packed := _quantization(config):
                raise CheckpointError(
                    f"{model}: the weights are quantized ({packed}), and a step is measured on weights that "
                    "can move; dequantize the model (model.dequantize()), save it, and use that folder"
                )
            wanted: dict[str, Any] = {
                "dtype": dtype,
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,
            }
            if tensors is not None:
                loaded, report = filled(folder, config, tensors, wanted)
            else:
                if config and folder.is_dir():
                    refuse_disproportion(folder, config)
                made: Any = AutoModelForCausalLM
                if config:
                    made = auto_class(AutoConfig.from_pretrained(**source, **NO_CODE))
                loaded, report = made.from_pretrained(**source, **NO_CODE, **wanted, use_safetensors=True)
        except ImportError as error:
            raise CheckpointError(
                f"{model}: reading it needs a package that is not installed ({brief(error)}); install "
                "it, for GGUF files: pip install 'stepscope[gguf]'"
            ) from error
        except LOADING as error:
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"{model}: it needs Python code of its own, and stepscope runs none that a checkpoint "
                    "brings; use a model whose architecture transformers has"
                ) from None
            raise CheckpointError(
                f"{model}: the model cannot be loaded ({brief(error)}); check the name, or copy the "
                "files again"
            ) from error
    _check_arrival(model, type(loaded).__name__, report)
    if "gguf_file" in source:
        # PEFT records this name as an adapter's base; the folder alone would not say which file.
        loaded.name_or_path = str(Path(model).expanduser().resolve())
        # Its weights are plain tensors now; the Trainer refuses to train what is still marked as quantized.
        loaded.hf_quantizer.remove_quantization_config(loaded)
    refuse_broken_weights(loaded, str(model))
    _types_in_files[loaded] = str(config.get("dtype") or config.get("torch_dtype") or "")
    return placed(loaded, dtype, device)


def type_in_files(model: nn.Module) -> str:
    """The type of a model's weights as its own ``config.json`` has it; empty where it says nothing."""
    return _types_in_files.get(model, "")


def stored_types(folder: Path) -> tuple[str, ...]:
    """Floating-point types of the weights in a folder's safetensors files, by their headers alone.

    A type that is none of torch's four common ones (an 8-bit float, say) keeps the name the file has for it.

    Raises:
        CheckpointError: a header is damaged.
    """
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: damaged ({str(error)[:160]}); copy the file again") from error
        found |= {_STORED.get(kind, kind) for kind in kinds if "F" in kind}
    return tuple(sorted(found))


def _quantization(config: Mapping[str, Any]) -> str:
    """How a model's ``config.json`` says its weights are quantized; empty for plain weights."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(settings, Mapping):
            method = settings.get("quant_method") or "quantization_config"
            bits = next((b for b in (4, 8) if settings.get(f"load_in_{b}bit")), settings.get("bits"))
            return f"{method}, {bits} bits" if bits else str(method)
    return ""


def _check_arrival(model: str | Path, architecture: str, report: Mapping[str, Any]) -> None:
    """Every weight of the architecture must come from the files, and every weight in the files go into it."""
    resized = sorted(report["mismatched_keys"])
    left = sorted(n for n in report["unexpected_keys"] if not _OLD_BUFFERS.search(n))
    missing = sorted(report["missing_keys"])
    if resized:
        name, got, expected = resized[0]
        raise CheckpointError(
            f"{model}: {len(resized)} weights of {architecture} have another shape than config.json says, "
            f"{name} among them: got {tuple(got)}, expected {tuple(expected)}; mend config.json, or copy the "
            "weights again"
        )
    if missing:
        raise CheckpointError(
            f"{model}: {len(missing)} weights of {architecture} are missing, {missing[0]} among "
            "them; copy the weights again or mend config.json"
        )
    if left:
        raise CheckpointError(
            f"{model}: {len(left)} stored weights have no place in {architecture}, {left[0]} among them, so "
            "this is not the model they are of; mend config.json, or remove from the file what is no part of "
            "the model"
        )


@reads_foreign
def load_tokenizer(model: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, named as in :func:`load_model`.

    Raises:
        CheckpointError: there is none, or its files are damaged.
    """
    source = _source(model, revision)
    folder = Path(source["pretrained_model_name_or_path"])
    if (
        folder.is_dir()
        and "gguf_file" not in source
        and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    ):
        raise CheckpointError(
            f"{folder}: there is no tokenizer beside the model; save it there "
            "(tokenizer.save_pretrained), or pass it to the trainer as processing_class so that checkpoints "
            "have it"
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(**source, **NO_CODE)
    except (*LOADING, ImportError) as error:
        raise CheckpointError(
            f"{model}: the tokenizer cannot be loaded ({brief(error)}); copy its files again"
        ) from error


def brief(error: BaseException) -> str:
    """The first line of an error's message, and the next where it only announces that one; shortened."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    announced = lines[1:2] if lines[0].endswith(":") else []
    return " ".join(map(str.strip, (lines[0], *announced)))[:200]


def _source(model: str | Path, revision: str | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{model}: no such GGUF file; check the path")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise CheckpointError(f"{model}: no such model folder; check the path")
    return {"pretrained_model_name_or_path": str(model)} | ({"revision": revision} if revision else {})


def placed(model: Any, dtype: torch.dtype, device: torch.device | str | None) -> nn.Module:
    """The model in evaluation mode on its device, at true float64 where that is asked for."""
    ready: nn.Module = model.to(usable_device(device)).eval()
    return lift_model(ready) if dtype == torch.float64 else ready


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device, given that tensors can be put there; None for a GPU where there is one.

    Of several processes each has a GPU of its own.

    Raises:
        ConfigError: torch does not know it, or this machine or this build of torch does not have it.
    """
    if (own := current().device) is not None and device in (None, "cuda"):
        return own
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device: {str(device)!r} cannot be used ({reason}); give cpu, or leave it out for a GPU "
            "where there is one"
        ) from error
    if found.type == "meta":
        raise ConfigError("device: 'meta' holds no numbers; give cpu, or leave it out")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, load reports and warnings inside the block: what matters in them is checked here."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
