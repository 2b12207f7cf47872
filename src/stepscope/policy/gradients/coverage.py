"""Which trainable parameters have a fast per-sequence gradient, and a numerical check that it is right.

Linear maps (``nn.Linear``, the ``Conv1D`` of GPT-2, both matrices of a LoRA pair), embeddings, layer norms
and RMS norms are differentiated from what goes in and what gradient comes back. Every other trainable
parameter takes the slow path, one sequence at a time. No parameter is ever left out: the first use of a
policy compares two rows of a short batch with plain autograd, parameter by parameter, and whatever differs
goes the slow way.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stepscope.errors import MeasurementError
from stepscope.policy.state import Policy

Kind = Literal["linear", "conv1d", "embedding", "layer_norm", "rms_norm", "broadcast"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tap:
    """A module whose inputs and output gradients are captured.

    Attributes:
        module: its name in the model.
        kind: how gradients follow from inputs and output gradients.
        params: the module's own trainable parameters: attribute name to ``named_parameters()`` name.
    """

    module: str
    kind: Kind
    params: tuple[tuple[str, str], ...]


class NotSeparableError(MeasurementError):
    """A tapped module mixes the sequences of a batch (a routed expert, say) or shares one row among all."""

    def __init__(self, tap: Tap, shape: tuple[int, ...], num_sequences: int) -> None:
        self.tap = tap
        super().__init__(
            f"module {tap.module}: its input of shape {shape} cannot be told apart by sequence "
            f"({num_sequences} sequences in the batch); freeze its parameters or report this architecture"
        )


@dataclass(frozen=True)
class Coverage:
    """How each trainable parameter's per-sequence gradient is obtained.

    Attributes:
        taps: modules on the fast path.
        slow: parameters differentiated one sequence at a time.
    """

    taps: tuple[Tap, ...]
    slow: tuple[str, ...]

    def without(self, names: set[str]) -> Coverage:
        """The same with ``names`` moved to the slow path."""
        taps = []
        for tap in self.taps:
            kept = tuple((a, n) for a, n in tap.params if n not in names)
            if kept:
                taps.append(Tap(tap.module, tap.kind, kept))
        return Coverage(tuple(taps), tuple(dict.fromkeys((*self.slow, *sorted(names)))))


_cache: WeakKeyDictionary[nn.Module, dict[tuple[bool, tuple[str, ...]], Coverage]] = WeakKeyDictionary()


def known(policy: Policy, as_trained: bool) -> Coverage | None:
    """The coverage settled earlier for these trainable parameters of this model, if any."""
    return _cache.get(policy.model, {}).get((as_trained, tuple(policy.parameters)))


def settle(policy: Policy, as_trained: bool, coverage: Coverage) -> None:
    """Remember a verified coverage and announce what goes the slow way."""
    _cache.setdefault(policy.model, {})[as_trained, tuple(policy.parameters)] = coverage
    if coverage.slow:
        shown = ", ".join(coverage.slow[:3]) + (", ..." if len(coverage.slow) > 3 else "")
        message = (
            f"{len(coverage.slow)} of {len(policy.parameters)} trainable parameters have no fast "
            f"per-sequence gradient ({shown}); they are differentiated one sequence at a time, exact but slow"
        )
        logger.warning(message)
        warnings.warn(message, stacklevel=3)


def classify(policy: Policy) -> Coverage:
    """Sort the trainable parameters by the module types that use them.

    A parameter is on the fast path when *every* module that owns it (tied weights have several) is of a known
    kind; its correctness is checked afterwards, see :func:`stepscope.policy.gradients.stream.coverage_of`.

    Raises:
        MeasurementError: the policy has no trainable parameter.
    """
    params = policy.parameters
    if not params:
        raise MeasurementError(
            "the policy has no trainable parameter, so there is no gradient; "
            "load a PEFT adapter as trainable or set requires_grad on what the run trained"
        )
    name_of = {id(p): n for n, p in params.items()}
    taps: list[Tap] = []
    unknown: set[str] = set()
    for module_name, module in policy.model.named_modules():
        own = tuple(
            (attribute, name_of[id(p)])
            for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in name_of
        )
        if not own:
            continue
        kind = _kind(module)
        if kind is None:
            unknown.update(name for _, name in own)
        else:
            taps.append(Tap(module_name, kind, own))
    seen = {name for tap in taps for _, name in tap.params} | unknown
    return Coverage(tuple(taps), ()).without(unknown | (set(params) - seen))


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "linear"
    if type(module) is Conv1D:
        return "conv1d"
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq:
        return "embedding" if type(module).forward is nn.Embedding.forward or _scaled(module) else None
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return "layer_norm"
    if type(module) is nn.RMSNorm and len(module.normalized_shape) == 1:
        return "rms_norm"
    if type(module).__name__.endswith("RMSNorm") and set(module._parameters) == {"weight"}:
        return "broadcast"
    return None


def _scaled(module: nn.Embedding) -> bool:
    """Whether the module is an embedding times a constant ``embed_scale`` (Gemma)."""
    return isinstance(getattr(module, "embed_scale", None), Tensor | float)


def embedding_scale(module: nn.Module) -> float:
    """The constant an embedding multiplies its rows with; 1 for a plain one."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "embed_scale", 1.0)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return float(torch.as_tensor(scale).to(weight.dtype))
