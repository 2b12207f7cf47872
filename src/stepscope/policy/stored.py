"""What the files of a model say of themselves, read before any weight is: stored types and quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepscope.errors import CheckpointError

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HALF_TYPES = ("float16", "bfloat16")
"""Names of the types in which a training's weights are rounded after every step."""


def type_name(kind: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(kind).removeprefix("torch.")


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
        found |= {_TYPES.get(kind, kind) for kind in kinds if "F" in kind}
    return tuple(sorted(found))


def rounding_doubt(types: tuple[str, ...], moments: Mapping[str, torch.dtype] | None = None) -> str:
    """Why params + lr * direction may not be where the training goes; empty if it is.

    A training that keeps its weights in a half type rounds them after every step: at small learning rates
    most do not move at all. The direction is that of the step before the rounding.

    Args:
        types: of the stored weights.
        moments: types of AdamW's moments in the file by parameter, where torch made them: it gives them the
            type of the parameter.
    """
    kinds = {type_name(kind) for kind in (moments or {}).values()}
    if kept := sorted(kinds & set(HALF_TYPES)):
        return (
            f"the weights are stored in {'/'.join(kept)} and rounded after every step, and this is of the "
            "step before rounding"
        )
    narrow = [name for name in types if name in HALF_TYPES]
    if not narrow:
        return ""
    if kinds:
        return (
            f"the weights are stored in {'/'.join(narrow)} and AdamW's moments in {'/'.join(sorted(kinds))}: "
            "the training had finer weights than those that this step starts from"
        )
    return (
        f"the weights are stored in {'/'.join(narrow)}: a training that keeps them so rounds every step, and "
        "this is the step before rounding"
    )


def finer_than_kept(parameters: Mapping[str, Tensor], moments: Mapping[str, torch.dtype]) -> str:
    """Which weights are no numbers of the half type that their moments have; empty where all are."""
    for name, kept in moments.items():
        value = parameters[name].detach()
        if type_name(kept) in HALF_TYPES and not torch.equal(value.to(kept).to(value.dtype), value):
            return (
                f"{name} is no {type_name(kept)} number although AdamW's moments are: another optimizer than "
                "torch's AdamW made this, or the weights were changed after it"
            )
    return ""


def quantization(config: Mapping[str, Any]) -> str:
    """How a model's ``config.json`` says its weights are quantized; empty for plain weights."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(settings, Mapping):
            method = settings.get("quant_method") or "quantization_config"
            bits = next((b for b in (4, 8) if settings.get(f"load_in_{b}bit")), settings.get("bits"))
            return f"{method}, {bits} bits" if bits else str(method)
    return ""
