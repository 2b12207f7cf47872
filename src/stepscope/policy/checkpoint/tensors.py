"""Models of weights that come one by one, under names, from files that transformers does not read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.foreign import refuse_disproportion
from stepscope.policy.checkpoint.names import Names
from stepscope.policy.numerics.precision import type_name

_ADAPTERS = (".lora_", ".modules_to_save.")
"""In the names of an adapter's weights, and in none of its base's."""


class Stored(Protocol):
    """A tensor that need not have been read yet; ``[...]`` reads it. Every tensor is one."""

    @property
    def shape(self) -> Sequence[int]:
        """Lengths of its axes."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    def __getitem__(self, index: EllipsisType, /) -> Tensor:
        """The tensor itself; several threads may ask at a time."""


def types_of(tensors: Iterable[Stored]) -> tuple[str, ...]:
    """Names of the floating-point types among them, each once."""
    return tuple(sorted({type_name(t.dtype) for t in tensors if t.dtype.is_floating_point}))


def trained_types(tensors: Mapping[str, Stored]) -> tuple[str, ...]:
    """The types of what was trained: of an adapted model its adapter's where names tell, else of all."""
    own = [t for name, t in tensors.items() if any(mark in name for mark in _ADAPTERS)]
    return types_of(own or tensors.values())


def filled(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored], wanted: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """The model that ``config.json`` describes with given weights, and transformers' report of what fits.

    Args:
        folder: with ``config.json``, and ``generation_config.json`` where there is one.
        config: its content.
        tensors: by name, wrappers' parts of which are left out.
        wanted: further arguments of ``from_pretrained``.

    Raises:
        CheckpointError: no weights, two of one name, or a config out of proportion to them.
    """
    if not tensors:
        raise CheckpointError(f"{folder}: there are no weights to fill the model with; copy them again")
    empty = refuse_disproportion(folder, config, [math.prod(t.shape) for t in tensors.values()])
    assert empty is not None
    names = Names([*empty.state_dict()])
    own: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if (found := names.own(name) or name) in own:
            raise CheckpointError(f"{folder}: two stored weights are {found}; copy the weights again")
        own[found] = tensor
    generation = None
    if (folder / GENERATION_CONFIG_NAME).is_file():
        generation = GenerationConfig.from_pretrained(str(folder))
    architecture: Any = type(empty)
    loaded, report = architecture.from_pretrained(
        None, config=empty.config, state_dict=own, generation_config=generation, **wanted
    )
    loaded.name_or_path = str(folder)
    return loaded, report


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Stored], *, where: str) -> None:
    """Put given weights into a model: all that train, and whichever others there are.

    Args:
        model: with ``requires_grad`` as in training.
        tensors: by name, as :class:`~stepscope.policy.checkpoint.names.Names` finds them.
        where: what to name in an error.

    Raises:
        CheckpointError: a weight is missing, is there twice with different values, has another shape, or has
            no place in the model.
    """
    names = Names.of(model)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    filled_by: dict[str, str] = {}
    for name, tensor in tensors.items():
        found = names.own(name)
        if found is None:
            raise CheckpointError(
                f"{where}: weight {name} has no place in the model; check that the adapter's config and base "
                "are those of the training"
            )
        if tuple(tensor.shape) != tuple(own[found].shape):
            raise CheckpointError(
                f"{where}: weight {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(own[found].shape)}; check that config and base are those of the training"
            )
        value = tensor[...].to(own[found].dtype)
        if found in filled_by and not torch.equal(own[found].cpu(), value.cpu()):
            raise CheckpointError(
                f"{where}: {filled_by[found]} and {name} are one weight of the model and not the same; copy "
                "the weights again"
            )
        filled_by[found] = name
        own[found].copy_(value)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in filled_by]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} trained weights are missing, {missing[0]} among them; copy the weights "
            "again"
        )
