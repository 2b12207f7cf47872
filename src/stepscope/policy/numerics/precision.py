"""float64 that is float64: lift the float32 casts inside model code, without editing it.

Model code in transformers casts to float32 inside norms, rotary tables and attention softmax, so a
``.double()`` model computes with float32 round-off, which drowns the change made by a small step.
:func:`true_float64` turns every request for a narrower floating type into float64 while it is active;
:func:`lift_model` converts a model and derives its constants anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepscope.errors import MeasurementError

HALF_TYPES = ("float16", "bfloat16")
"""Names of the types in which a training's weights are rounded after every step."""

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS: frozenset[Callable[..., Any]] = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_LIKE: frozenset[Callable[..., Any]] = frozenset({Tensor.to, Tensor.type_as})
_NARROW_TYPE_NAMES = frozenset(
    f"torch.{place}{kind}Tensor" for place in ("", "cuda.") for kind in ("Float", "Half", "BFloat16")
)


def type_name(kind: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(kind).removeprefix("torch.")


class _Lift(TorchFunctionMode):
    """Replaces narrower floating types by float64 in the arguments of every torch function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in _CASTS:
            return args[0].double()
        if func in _LIKE:
            like = named.get("other", args[1] if len(args) > 1 else None)
            if isinstance(like, Tensor) and like.dtype in _NARROW:
                return args[0].to(device=like.device, dtype=torch.float64)
        return func(*(_lift(a) for a in args), **{k: _lift(v) for k, v in named.items()})


def _lift(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, str) and value in _NARROW_TYPE_NAMES:
        return "torch.cuda.DoubleTensor" if "cuda" in value else "torch.DoubleTensor"
    return value


@contextmanager
def true_float64() -> Iterator[None]:
    """Inside the block every floating-point computation torch is asked for happens in float64.

    Explicit types (``dtype=torch.float32``, ``.to(torch.float32)``, ``.float()``, ``.type``,
    ``softmax(..., dtype=...)``, a cast to the type of a narrower tensor) are replaced, autocast is off, and
    the default type is float64, so tables built without a type are exact too. All is restored on leaving.
    Works under autograd, ``torch.func.jvp`` and nested transforms. A tensor that is float32 already and meets
    no cast stays float32: convert the model with :func:`lift_model` first.

    Pinned by ``tests/policy/test_precision.py``.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), _Lift():
            yield
    finally:
        torch.set_default_dtype(before)


def is_float64(model: nn.Module) -> bool:
    """Whether the model computes in float64, judged by its first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point()) == torch.float64


def matching_precision(model: nn.Module) -> AbstractContextManager[None]:
    """:func:`true_float64` for a model with float64 parameters, nothing for any other."""
    return true_float64() if is_float64(model) else nullcontext()


def lift_model(model: nn.Module) -> nn.Module:
    """Convert a model to float64 in place, constants included.

    Parameters are converted exactly. ``.double()`` would keep the float32 rounding of constants that were
    computed at construction: each module that owns rotary frequencies is built afresh from its config in
    float64 and its tables are taken over, and Gemma's embedding scale is set from the number it came from.

    Raises:
        MeasurementError: rotary frequencies cannot be derived anew, or differ from the model's own by more
            than float32 rounding, as for frequencies changed after construction.
    """
    model.double()
    for path, module in model.named_modules():
        tables = [n for n, _ in module.named_buffers(recurse=False) if n.endswith("inv_freq")]
        if tables:
            _renew_tables(path, module, tables)
        embedding_scale = getattr(module, "scalar_embed_scale", None)
        if isinstance(embedding_scale, float) and isinstance(getattr(module, "embed_scale", None), Tensor):
            module.embed_scale.fill_(embedding_scale)
    return model


def _renew_tables(path: str, module: nn.Module, tables: list[str]) -> None:
    """Build a rotary module afresh from its config in float64 and take over its frequencies."""
    config = getattr(module, "config", None)
    if config is None:
        raise MeasurementError(
            f"{path}: {type(module).__name__} keeps no config, so its rotary frequencies cannot be derived "
            "in float64; measure this model with --precision float32"
        )
    with true_float64():
        fresh = type(module)(config)
    for name in tables:
        old = getattr(module, name)
        new = getattr(fresh, name).to(old.device)
        if old.shape != new.shape or not torch.allclose(old, new, rtol=1e-5, atol=0.0):
            raise MeasurementError(
                f"{path}.{name}: the rotary frequencies derived in float64 differ from the model's own by "
                "more than rounding; measure this model with --precision float32"
            )
        setattr(module, name, new)
