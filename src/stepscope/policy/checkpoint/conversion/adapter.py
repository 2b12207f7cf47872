"""Writing an adapter that was put together from shards, so that it loads on the base it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG, REFERENCE
from stepscope.policy.checkpoint.models import load_weights

BASE = "base"
"""Folder of an adapter's base, where nothing else has it."""


def write_adapter(model: Any, folder: Path, target: Path, half: torch.dtype | None) -> list[str]:
    """Write an adapter, and its base where no other place has it as it is in the model.

    Args:
        model: the adapted model.
        folder: of the source, to which its base may be relative.
        target: where they go.
        half: type of the adapter's weights, which PEFT widens on loading; None for the one they have.

    Returns:
        What is not as it was, a clause each.
    """
    kept: dict[str, Tensor] = {
        name: t.to(half) if half is not None and t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }
    model.save_pretrained(target, selected_adapters=["default"], state_dict=kept, save_embedding_layers=False)
    config = json.loads((target / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = _base_elsewhere(model, folder) or BASE
    if config["base_model_name_or_path"] == BASE:
        inner: Any = model.get_base_model()
        (target / BASE).mkdir()
        inner.config.save_pretrained(target / BASE)
        if inner.generation_config is not None:
            inner.generation_config.save_pretrained(target / BASE)
        save_file(_base_weights(model), target / BASE / "model.safetensors", {"format": "pt"})
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if (reference := folder / REFERENCE).is_dir():
        shutil.copytree(reference, target / REFERENCE)
    own = config["base_model_name_or_path"] == BASE
    return (
        ["the name of the adapter's base: it is not to be had as it is here, and stands in base/"]
        if own
        else []
    )


def _base_elsewhere(model: Any, folder: Path) -> str:
    """The name of the base that the adapter was loaded on, if it is there as it is in the model; else ""."""
    named = str(model.peft_config["default"].base_model_name_or_path or "")
    places = [place for place in (folder / named, folder.parent / named) if named and place.exists()]
    source: str | Path = places[0].resolve() if places else named
    if not source:
        return ""
    try:
        base = load_weights(source, dtype=next(model.get_base_model().parameters()).dtype, device="cpu")
    except CheckpointError:
        return ""
    own = _base_weights(model)
    same = all(n in own and torch.equal(own[n], t.detach()) for n, t in base.named_parameters())
    return str(source) if same else ""


def _base_weights(model: Any) -> dict[str, Tensor]:
    """Weights of the base inside an adapted model under their own names, a tied one once."""
    inner: nn.Module = model.get_base_model()
    parts = (".base_layer.", ".original_module.")
    found: dict[str, Tensor] = {}
    for name, parameter in inner.named_parameters():
        if any(mark in f".{name}" for mark in (".lora_", ".modules_to_save.")):
            continue
        for part in parts:
            name = name.replace(part, ".")
        found[name] = parameter.detach().contiguous()
    return found
