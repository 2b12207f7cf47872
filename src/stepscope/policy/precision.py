"""float64 that is float64: lift the float32 casts inside model code, without editing it.

Model code in transformers casts to float32 inside norms, rotary tables and attention softmax, so a ``.double()``
model computes with float32 round-off. :func:`true_float64` turns every request for a narrower floating type into
float64 while it is active; :func:`lift_model` converts a model and recomputes its rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepscope.errors import MeasurementError

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_CASTS: frozenset[Callable[..., Any]] = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_NARROW_TYPE_NAMES = {"torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"}


class _Lift(TorchFunctionMode):
    """Replaces narrower floating types by float64 in the arguments of every torch function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        lifted = {k: _lift(v) for k, v in (kwargs or {}).items()}
        return func(*(_lift(a) for a in args), **lifted)


def _lift(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, str) and value in _NARROW_TYPE_NAMES:
        return "torch.DoubleTensor"
    return value


@contextmanager
def true_float64() -> Iterator[None]:
    """Inside the block every floating-point computation torch is asked for happens in float64.

    Explicit dtypes (``dtype=torch.float32``, ``.to(torch.float32)``, ``.float()``, ``softmax(..., dtype=...)``) are
    replaced and the default dtype is float64, so tables built without a dtype are exact too. Both are restored on
    leaving. Works under autograd, ``torch.func.jvp`` and nested transforms.

    Pinned by ``tests/policy/test_precision.py``.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lift():
            yield
    finally:
        torch.set_default_dtype(before)


def lift_model(model: nn.Module) -> nn.Module:
    """Convert a model to float64 in place, rotary frequencies recomputed rather than rounded.

    ``.double()`` would keep the float32 rounding of tables that were computed at construction, such as
    ``inv_freq``; each module that owns one is built afresh from its config in float64 and its tables are taken over.

    Raises:
        MeasurementError: a recomputed table disagrees with the model's own by more than float32 rounding, as for
            frequencies changed after construction; such a model cannot be lifted.
    """
    model.double()
    for path, module in model.named_modules():
        tables = [n for n, _ in module.named_buffers(recurse=False) if n.endswith("inv_freq")]
        if not tables:
            continue
        with true_float64():
            fresh = type(module)(module.config)
        for name in tables:
            old, new = getattr(module, name), getattr(fresh, name).to(getattr(module, name).device)
            if old.shape != new.shape or not torch.allclose(old, new, rtol=1e-5, atol=0.0):
                raise MeasurementError(
                    f"{path}.{name}: the rotary frequencies recomputed in float64 differ from the model's own by "
                    "more than rounding; measure this model with --precision float32"
                )
            setattr(module, name, new)
    return model


@contextmanager
def matching_precision(model: nn.Module) -> Iterator[None]:
    """:func:`true_float64` for a model with float64 parameters, nothing for any other."""
    if next(model.parameters()).dtype == torch.float64:
        with true_float64():
            yield
    else:
        yield
