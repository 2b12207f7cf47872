"""What the files of a model say of themselves, read before any weight is: stored types and quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stepscope.errors import CheckpointError

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NARROW = ("float16", "bfloat16")


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


def rounding_doubt(types: tuple[str, ...]) -> str:
    """Why a step rebuilt from weights of these types may not be the one the training takes; empty if it is.

    A training that keeps its weights in a half type rounds them after every step: at small learning rates
    most do not move at all. The rebuilt step is the one before the rounding.
    """
    narrow = [name for name in types if name in _NARROW]
    if not narrow:
        return ""
    return (
        f"the weights are stored in {'/'.join(narrow)}: a training that keeps them so rounds every step, and "
        "this is the step before rounding"
    )


def quantization(config: Mapping[str, Any]) -> str:
    """How a model's ``config.json`` says its weights are quantized; empty for plain weights."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(settings, Mapping):
            method = settings.get("quant_method") or "quantization_config"
            bits = next((b for b in (4, 8) if settings.get(f"load_in_{b}bit")), settings.get("bits"))
            return f"{method}, {bits} bits" if bits else str(method)
    return ""
