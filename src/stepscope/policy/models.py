"""Loading models: a hub id, a local folder, a GGUF file, or a PEFT adapter on one of these."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from stepscope.errors import CheckpointError
from stepscope.policy.differentiation import Substituted
from stepscope.policy.finiteness import refuse_broken_weights
from stepscope.policy.precision import lift_model

ADAPTER_CONFIG = "adapter_config.json"
"""Present in a folder that holds a PEFT adapter."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The adapter's weights beside it."""

REFERENCE = "ref"
"""Name of TRL's frozen copy of the starting adapter, and of its subfolder."""

NO_CODE = {"trust_remote_code": False}
"""For every ``from_pretrained`` of transformers: left unset, it asks on the terminal whether to run code."""

_LOADING = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def load_model(
    model: str | Path, *, dtype: torch.dtype, device: torch.device | str | None = None
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode (no dropout).

    Args:
        model: a hub id, a local folder with safetensors, or the path of a ``.gguf`` file.
        dtype: of the parameters; float64 derives rotary tables anew (:func:`lift_model`).
        device: where it goes; None for a GPU where there is one.

    Raises:
        CheckpointError: it does not exist, is damaged, lacks weights of its architecture, or holds some that
            are not finite.
    """
    source = _source(model)
    with _quiet():
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                **source, **NO_CODE, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**source, **NO_CODE)
        except ImportError as error:
            raise CheckpointError(
                f"{model}: reading it needs a package that is not installed ({brief(error)}); install "
                "it, for GGUF files: pip install 'stepscope[gguf]'"
            ) from error
        except _LOADING as error:
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"{model}: it needs Python code of its own, and stepscope runs none that a checkpoint "
                    "brings; use a model whose architecture transformers has"
                ) from None
            raise CheckpointError(
                f"{model}: the model cannot be loaded ({brief(error)}); check the name, or copy the "
                "files again"
            ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{model}: {len(missing)} weights of {type(loaded).__name__} are missing, {missing[0]} among "
            "them; copy the weights again or mend config.json"
        )
    if "gguf_file" in source:
        # PEFT records this name as an adapter's base; the folder alone would not say which file.
        loaded.name_or_path = str(Path(model).expanduser().resolve())
        # Its weights are plain tensors now; the Trainer refuses to train what is still marked as quantized.
        loaded.hf_quantizer.remove_quantization_config(loaded)
    refuse_broken_weights(loaded, str(model))
    return _placed(loaded, dtype, device), tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder.

    Raises:
        CheckpointError: its files are damaged.
    """
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(str(folder), **NO_CODE)
    except _LOADING as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded ({brief(error)}); copy its files again"
        ) from error


def load_adapter(
    folder: Path, *, dtype: torch.dtype, device: torch.device | str | None = None
) -> tuple[nn.Module, Any]:
    """Load a PEFT adapter, trainable, on its base model, and the base's tokenizer.

    The base is what ``adapter_config.json`` names: a hub id, a folder (also relative to the adapter), or a
    GGUF file. Every stored tensor is verified to have arrived. TRL's frozen copy of the starting adapter in
    the subfolder ``ref``, the reference of its KL penalty, is loaded too.

    Raises:
        CheckpointError: config, weights or base are missing or damaged, or do not fit each other.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: cannot be read ({brief(error)}); copy it again"
        ) from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {base!r}, expected the base model's "
            "name or folder; write it in"
        )
    stored = _adapter_weights(folder / ADAPTER_WEIGHTS)
    beside = folder / base
    model, tokenizer = load_model(beside if beside.exists() else base, dtype=dtype, device="cpu")
    try:
        with _quiet():
            peft_config = PeftConfig.from_pretrained(str(folder))
            if peft_config.is_prompt_learning:
                raise ValueError(f"{peft_config.peft_type.value} learns a prompt, not weights")
            adapted = PeftModel.from_pretrained(model, str(folder), config=peft_config, is_trainable=True)
            if (folder / REFERENCE / ADAPTER_CONFIG).is_file():
                adapted.load_adapter(str(folder / REFERENCE), REFERENCE)
    except (*_LOADING, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: the adapter does not load onto its base {base} ({brief(error)}); check that this "
            "is the base it was trained on"
        ) from error
    refuse_broken_weights(adapted, str(folder))
    _verify_adapter(folder, adapted, stored)
    return _placed(adapted, dtype, device), tokenizer


@contextmanager
def reference_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block an adapted model is its reference: under the adapter ``ref``, or else under none.

    What is trainable stays so: PEFT changes that with every switch, which no ``torch.func`` transform allows.
    """
    adapted: Any = model
    fixed_trainability = Substituted({Tensor.requires_grad_: _unchanged})
    if REFERENCE not in adapted.peft_config:
        with fixed_trainability, adapted.disable_adapter():
            yield
        return
    active = adapted.active_adapter
    with fixed_trainability:
        try:
            adapted.set_adapter(REFERENCE)
            yield
        finally:
            adapted.set_adapter(active)


def _unchanged(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor


def brief(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _source(model: str | Path) -> dict[str, Any]:
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
    return {"pretrained_model_name_or_path": str(model)}


def _verify_adapter(folder: Path, adapted: Any, stored: dict[str, torch.Tensor]) -> None:
    """Every stored tensor must be in the model as it is, and every adapter tensor of the model be stored."""
    arrived = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if set(stored) - set(arrived):
        arrived = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    for name in sorted(set(stored) | set(arrived)):
        if name not in stored or name not in arrived:
            raise CheckpointError(
                f"{folder}: adapter weight {name} is "
                f"{'not stored' if name in arrived else 'unknown to the model'}; check that the base is "
                "the one it was trained on, or copy the adapter again"
            )
        if not torch.equal(stored[name].to(arrived[name].dtype), arrived[name].cpu()):
            raise CheckpointError(f"{folder}: adapter weight {name} did not load as stored; copy it again")


def _adapter_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no adapter weights; save the adapter as safetensors, or copy the checkpoint again"
        )
    try:
        return dict(load_file(str(path)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({brief(error)}); copy the file again") from error


def _placed(model: Any, dtype: torch.dtype, device: torch.device | str | None) -> nn.Module:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    ready: nn.Module = model.to(device).eval()
    return lift_model(ready) if dtype == torch.float64 else ready


@contextmanager
def _quiet() -> Iterator[None]:
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
