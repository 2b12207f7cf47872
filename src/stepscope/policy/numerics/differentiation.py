"""Where PyTorch's derivatives are not those of the function, and functions that torch cannot differentiate.

``torch.func.jvp`` of ``torch.func.jvp`` through ``torch.nn.functional.layer_norm`` is silently wrong (PyTorch
2.13): the inner rule treats the saved mean and scale as constants. Written out in elementary operations
the same function has the right derivatives of every order. ``tests/policy/test_differentiation.py``
shows both. The same goes for functions that have no forward-mode rule at all: LoHa's, RandLoRA's and Bloom's
own ``autograd.Function``, and LoRA on parameters, which registers a parametrization in every forward pass.

``nn.Embedding`` with a ``padding_idx`` has no gradient for that row in reverse mode, but a derivative in
forward mode. A policy can sample its padding token, so the two differ. DoRA detaches the norm of the weight,
so that neither mode sees it move. A training step moves parameters by the reverse-mode gradient, as it is; a
quantity of the policy has the derivative of the function. Whatever takes derivatives asks which of the two is
meant (``as_trained``): :func:`frozen_padding` gives the former in forward mode, :func:`whole_function` the
latter in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from peft.tuners.loha import layer as loha
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.randlora import layer as randlora
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.bloom import modeling_bloom

_lanes = [1]


@contextmanager
def lanes(count: int) -> Iterator[None]:
    """A block in which tensors stand for so many that are computed together."""
    _lanes.append(count)
    try:
        yield
    finally:
        _lanes.pop()


def num_lanes() -> int:
    """For how many a tensor stands here; what is made a few bytes at a time counts all of them."""
    return _lanes[-1]


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


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """A block in which forward mode can be nested through the model; nothing where it can be anyway."""
    kinds = {type(module) for module in model.modules()}
    with ExitStack() as stack:
        for owner, name, plain in _ELEMENTARY:
            if any(kind.__module__ == owner.__name__ for kind in kinds):
                stack.enter_context(_patched(owner, name, plain))
        if ParamWrapper in kinds:
            stack.enter_context(_patched(ParamWrapper, "_activate_lora", _adapted_parameter))
        if any(issubclass(kind, nn.LayerNorm) for kind in kinds):
            stack.enter_context(Substituted({nn.functional.layer_norm: layer_norm}))
        yield


def _hadamard_product(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor) -> Tensor:
    """LoHa's weight; its own function differs in how the backward pass saves memory."""
    return ((w1a @ w1b) * (w2a @ w2b)) * scale


class _ScaledBase:
    """RandLoRA's scaled base; its own function differs in how the backward pass saves memory."""

    @staticmethod
    def apply(base: Tensor, scales: Tensor, gains: Tensor) -> Tensor:
        """(base, row, col) base times a scale per base and row, and a gain per row and column."""
        return scales[:, :, None] * base * gains[None,]


@contextmanager
def _adapted_parameter(wrapper: ParamWrapper, active_adapters: Sequence[str]) -> Iterator[None]:
    """LoRA on a parameter: inside the block the module has the adapted tensor in its place."""
    adapters = [name for name in active_adapters if name in wrapper.lora_A]
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    own = module._parameters[name]
    adapted = own
    for adapter in adapters:
        adapted = adapted + wrapper.get_delta_weight(adapter)
    module._parameters[name] = adapted
    try:
        yield
    finally:
        module._parameters[name] = own


class _Gelu:
    """Bloom's GELU, whose own function writes out the backward pass."""

    apply = staticmethod(modeling_bloom.bloom_gelu_forward)


_ELEMENTARY = (
    (loha, "make_weight", _hadamard_product),
    (randlora, "UniqueBaseGrad", _ScaledBase),
    (modeling_bloom, "GeLUFunction", _Gelu),
)


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A block in which an attribute of a module or class is another."""
    own = vars(owner)[name]
    try:
        setattr(owner, name, value)
        yield
    finally:
        setattr(owner, name, own)


def frozen_padding(model: nn.Module) -> AbstractContextManager[Any]:
    """A block in which forward mode, too, sees no derivative through the embedding of padding tokens."""
    return Substituted({nn.functional.embedding: _embedding_as_trained}) if _padded(model) else nullcontext()


def _embedding_as_trained(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **named: Any
) -> Tensor:
    output: Tensor = nn.functional.embedding(input, weight, padding_idx, *rest, **named)
    if padding_idx is None:
        return output
    padding = torch.eq(input, padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(padding, output.detach(), output)


@contextmanager
def whole_function(model: nn.Module) -> Iterator[None]:
    """A block in which derivatives are those of the function, whatever training leaves out of them.

    Reverse mode differentiates through the embedding of padding tokens, and both modes through DoRA's norm.
    """
    kept = {module: module.padding_idx for module in _padded(model)}
    with ExitStack() as stack:
        for kind in _detaching(model):
            stack.enter_context(_patched(kind, "forward", _attached(kind.forward)))
        try:
            for module in kept:
                module.padding_idx = None
            yield
        finally:
            for module, index in kept.items():
                module.padding_idx = index


def has_detached_parts(model: nn.Module) -> bool:
    """Whether training passes over more of the model than embeddings of padding, so that uses differ."""
    return bool(_detaching(model))


def _detaching(model: nn.Module) -> set[type[nn.Module]]:
    """Classes of DoRA layers in the model, by the class that defines the forward pass."""
    found = {type(module) for module in model.modules() if isinstance(module, DoraLinearLayer)}
    return {next(base for base in kind.__mro__ if "forward" in vars(base)) for kind in found}


def _attached(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Substituted({Tensor.detach: _itself}):
            return forward(*args, **kwargs)

    return run


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _padded(model: nn.Module) -> list[nn.Embedding]:
    """Embeddings that leave a row without a gradient; LoRA on one of them does as its base."""
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None]


def lacks_a_rule(error: Exception) -> bool:
    """Whether torch says that some operation cannot be differentiated in forward mode."""
    text = str(error)
    return "forward AD" in text or "forward mode AD" in text or "setup_context" in text
