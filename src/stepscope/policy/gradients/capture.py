"""Hooks that turn one backward pass of a whole micro-batch into per-sequence gradients, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepscope.policy.gradients.coverage import Coverage, NotSeparableError, Tap, embedding_scale
from stepscope.policy.gradients.layer_gradient import (
    LayerGradient,
    Lookup,
    Outer,
    Part,
    Whole,
    joined,
    matrix_shape,
)
from stepscope.policy.head import replaying
from stepscope.policy.sharding import still

Deliver = Callable[[LayerGradient], None]


class Capture:
    """Collects, during the backward pass, the gradient parts of every tapped parameter.

    The parameters themselves are frozen meanwhile, so autograd spends nothing on their summed gradients.
    A parameter is delivered as soon as all its uses in the forward pass have reported, and then forgotten:
    no more than one layer's gradients is alive at a time.
    """

    def __init__(self, model: nn.Module, coverage: Coverage, params: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._coverage = coverage
        self._params = params
        self._shapes = {n: matrix_shape(p.shape) for n, p in params.items()}
        linear = {n for tap in coverage.taps if tap.kind in ("linear", "conv1d") for _, n in tap.params}
        other = {n for tap in coverage.taps if tap.kind not in ("linear", "conv1d") for _, n in tap.params}
        self._tall = {n for n in linear - other if 1 < self._shapes[n][1] < self._shapes[n][0]}
        dtype = next(iter(params.values())).dtype
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._deliver: Deliver = _nowhere
        self._in_parts = False
        self._num_sequences = 0
        self._recording = False
        self._left: dict[str, int] = {}
        self._parts: dict[str, list[Part]] = {}
        self._swapped: list[tuple[nn.Module, nn.Parameter]] = []
        self._own: dict[nn.Module, Tensor | None] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks in place and parameters frozen inside the block; everything as before afterwards."""
        handles: list[Any] = []
        try:
            for param in self._params.values():
                param.requires_grad_(False)
            for tap in self._coverage.taps:
                module = self._model.get_submodule(tap.module)
                if tap.kind == "broadcast":
                    handles.append(module.register_forward_pre_hook(self._spread(tap)))
                else:
                    handles.append(module.register_forward_hook(self._watch(tap)))
            with still(self._model):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._restore()
            for param in self._params.values():
                param.requires_grad_(True)

    @contextmanager
    def recording(self, num_sequences: int) -> Iterator[None]:
        """The forward pass whose layers are to be captured; other passes of the model go unrecorded."""
        self._num_sequences = num_sequences
        self._left, self._parts = {}, {}
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            self._restore()

    def backward(self, value: Tensor, deliver: Deliver, *, in_parts: bool = False) -> None:
        """Differentiate the scalar ``value`` and deliver each parameter's per-sequence gradient.

        Args:
            value: what the forward pass that was recorded led to.
            deliver: called with the gradients.
            in_parts: deliver what each use of a parameter adds as soon as it is known, instead of their sum.
        """
        self._deliver, self._in_parts = deliver, in_parts
        try:
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
            for name in list(self._parts):
                self._flush(name)
        finally:
            self._deliver = _nowhere
            self._parts = {}

    def _restore(self) -> None:
        for module, weight in self._swapped:
            module._parameters["weight"] = weight
        self._swapped, self._own = [], {}

    def _add(self, name: str, part: Part) -> None:
        parts = self._parts.setdefault(name, [])
        parts.append(part)
        self._left[name] -= 1
        if self._in_parts or not self._left[name]:
            self._flush(name)
        elif len(parts) > 1 and sum(p.numel for p in parts) > math.prod(self._shapes[name]):
            parts[:] = [Whole(self._gradient(name).dense())]

    def _flush(self, name: str) -> None:
        gradient = self._gradient(name)
        del self._parts[name]
        self._deliver(gradient)

    def _gradient(self, name: str) -> LayerGradient:
        """What is known of a parameter's gradient so far."""
        rows, cols = self._shapes[name]
        tall = name in self._tall
        shape = (cols, rows) if tall else (rows, cols)
        return LayerGradient(name, shape, joined(self._parts[name]), transposed=tall)

    def _by_sequence(self, x: Tensor, tap: Tap, trailing: int) -> Tensor:
        """X with the sequence as first axis and all token axes merged into the second."""
        count, tail = self._num_sequences, x.shape[x.dim() - trailing :]
        rows = x.numel() // max(1, tail.numel())
        if rows % count or (x.dim() - trailing > 1 and x.shape[0] != count):
            raise NotSeparableError(tap, tuple(x.shape), count)
        return x.reshape(count, rows // count, *tail)

    def _watch(self, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            again = replaying()
            if not (self._recording or again):
                return None
            root = None if output.requires_grad else output.detach().requires_grad_()
            if again:
                return root
            held = [args[0].detach()]
            for _, name in tap.params:
                self._left[name] = self._left.get(name, 0) + 1
            watched = output if root is None else root

            def arrived(grad: Tensor) -> None:
                self._report(tap, module, held.pop(), grad.detach())

            watched.register_hook(arrived)  # type: ignore[no-untyped-call]
            return root

        return hook

    @torch.no_grad()
    def _report(self, tap: Tap, module: nn.Module, inputs: Tensor, grad: Tensor) -> None:
        d = self._by_sequence(grad.to(self._dtype), tap, 1)
        for attribute, name in tap.params:
            if attribute == "bias":
                self._add(name, Whole(d.sum(1).unsqueeze(-1)))
            elif tap.kind == "embedding":
                self._add(name, self._lookup(tap, module, inputs, d))
            else:
                x = self._by_sequence(inputs.to(self._dtype), tap, 1)
                self._add(name, _weight_part(tap, module, x, d, name in self._tall))

    def _lookup(self, tap: Tap, module: nn.Module, ids: Tensor, d: Tensor) -> Lookup:
        rows = self._by_sequence(ids, tap, 0)
        scale = embedding_scale(module)
        values = d if scale == 1.0 else d * scale
        padding = module.padding_idx
        if isinstance(padding, int):
            values = values.masked_fill((rows == padding).unsqueeze(-1), 0.0)
        return Lookup(rows, values)

    def _spread(self, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Give every sequence its own copy of an elementwise weight, so that autograd keeps them apart."""
        ((attribute, name),) = tap.params

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._recording or replaying():
                return
            x, count = args[0], self._num_sequences
            weight = self._own.setdefault(module, module._parameters[attribute])
            assert weight is not None
            if x.shape[0] != count:
                raise NotSeparableError(tap, tuple(x.shape), count)
            middle = (1,) * (x.dim() - 1 - weight.dim())
            copies = weight.detach().expand(count, *middle, *weight.shape).clone().requires_grad_()
            self._left[name] = self._left.get(name, 0) + 1

            def arrived(grad: Tensor) -> None:
                self._add(name, Whole(grad.detach().to(self._dtype).reshape(count, *self._shapes[name])))

            copies.register_hook(arrived)  # type: ignore[no-untyped-call]
            self._swapped.append((module, self._params[name]))
            module._parameters[attribute] = copies  # type: ignore[assignment]

        return hook


def _weight_part(tap: Tap, module: nn.Module, x: Tensor, d: Tensor, transposed: bool) -> Part:
    match tap.kind:
        case "linear":
            return Outer(x, d) if transposed else Outer(d, x)
        case "conv1d":
            return Outer(d, x) if transposed else Outer(x, d)
        case "layer_norm":
            normal = functional.layer_norm(x, _shape(module), eps=_eps(module))
        case "rms_norm":
            normal = functional.rms_norm(x, list(_shape(module)), eps=_eps(module))
        case _:
            raise AssertionError(tap.kind)
    return Whole((d * normal).sum(1).unsqueeze(-1))


def _shape(module: nn.Module) -> tuple[int, ...]:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return tuple(module.normalized_shape)


def _eps(module: nn.Module) -> Any:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return module.eps


def _nowhere(gradient: LayerGradient) -> None:
    """Where gradients go when no backward pass of ours is running."""
