"""Which of a checkpoint's tensors are the model's weights, whatever the trainer calls the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.formats.distributed.tensors import ChunkedTensor
from stepscope.policy.checkpoint.formats.frame import frame_of
from stepscope.policy.checkpoint.models import NO_CODE, quiet
from stepscope.policy.checkpoint.names import ADAPTED, unwrapped


@reads_foreign
def weights_among(folder: Path, tensors: Mapping[str, ChunkedTensor]) -> dict[str, ChunkedTensor]:
    """A model's weights under its own names: all tensors below one prefix.

    The prefix (``model.`` of accelerate and NeMo-RL, ``app.model.`` of prime-rl) is what stands before names
    that the model of the config beside has, or before an adapted model's ``base_model.model.``.

    Args:
        folder: the checkpoint.
        tensors: by name, all that are no part of an optimizer's state.

    Raises:
        CheckpointError: no tensor has a name of the model, or those of several models are there.
    """
    frame = frame_of(folder)
    if frame is None:
        return dict(tensors)  # there is no model to be made of them
    bare = {unwrapped(name): tensor for name, tensor in tensors.items()}
    if (frame / ADAPTER_CONFIG).is_file():
        prefixes = {name[: name.index(ADAPTED)] for name in bare if ADAPTED in name}
    else:
        prefixes = _prefixes(bare, frame)
    if len(prefixes) != 1:
        some = ", ".join(sorted(bare)[:3])
        what = f"those of {len(prefixes)} models" if prefixes else "none of its model"
        raise CheckpointError(
            f"{folder}: among the tensors of its shards ({some}, ...) are {what}, expected one model's; make "
            f"sure that the config in {frame} is that of the run"
        )
    (prefix,) = prefixes
    return {name.removeprefix(prefix): t for name, t in bare.items() if name.startswith(prefix)}


def _prefixes(names: Mapping[str, ChunkedTensor], frame: Path) -> set[str]:
    """What stands before the longest part of each name that the model has."""
    with quiet(), torch.device("meta"):
        described = AutoConfig.from_pretrained(str(frame), **NO_CODE)
        own = frozenset(AutoModelForCausalLM.from_config(described, **NO_CODE).state_dict())
    found = set()
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        if (end := next((e for e in ends if e in own), None)) is not None:
            found.add(name.removesuffix(end))
    return found
