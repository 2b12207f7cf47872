"""Where PyTorch's derivatives are not those of the function: LayerNorm twice forward, and padding embeddings.

``torch.func.jvp`` of ``torch.func.jvp`` through ``torch.nn.functional.layer_norm`` is silently wrong (PyTorch
2.13): the inner rule treats the saved mean and scale as constants. Written out in elementary operations
the same function has the right derivatives of every order. ``tests/policy/test_differentiation.py``
shows both.

``nn.Embedding`` with a ``padding_idx`` has no gradient for that row in reverse mode, but a derivative in
forward mode. A policy can sample its padding token, so the two differ. A training step moves parameters by
the reverse-mode gradient, as it is; a quantity of the policy has the derivative of the function. Whatever
takes derivatives asks which of the two is meant (``as_trained``): :func:`frozen_padding` gives the former in
forward mode, :func:`whole_embeddings` the latter in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Substituted(TorchFunctionMode):
    """A block in which calls of some torch functions go to others.

    Args:
        chosen: function to what is called instead.
    """

    def __init__(self, chosen: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.chosen = chosen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, or what stands for it."""
        return self.chosen.get(func, func)(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` in elementary operations; half types are normalised in float32."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    centred = wide - wide.mean(dims, keepdim=True)
    result = (centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)).to(input.dtype)
    if weight is not None:
        result = result * weight
    return result if bias is None else result + bias


def twice_differentiable(model: nn.Module) -> AbstractContextManager[Any]:
    """A block in which forward mode can be nested through the model; nothing for one without LayerNorm."""
    if any(isinstance(m, nn.LayerNorm) for m in model.modules()):
        return Substituted({nn.functional.layer_norm: layer_norm})
    return nullcontext()


@contextmanager
def frozen_padding(model: nn.Module) -> Iterator[None]:
    """A block in which forward mode, too, sees no derivative through the embedding of padding tokens."""

    def freeze(module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        padding = torch.eq(inputs[0], cast(int, module.padding_idx)).unsqueeze(-1)
        return torch.where(padding, output.detach(), output)

    handles = [module.register_forward_hook(freeze) for module in _padded(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def whole_embeddings(model: nn.Module) -> Iterator[None]:
    """A block in which reverse mode differentiates through the embedding of padding tokens, too."""
    kept = {module: module.padding_idx for module in _padded(model)}
    try:
        for module in kept:
            module.padding_idx = None
        yield
    finally:
        for module, index in kept.items():
            module.padding_idx = index


def _padded(model: nn.Module) -> list[nn.Embedding]:
    """Trainable embeddings that leave a row without a gradient."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.weight.requires_grad
    ]
