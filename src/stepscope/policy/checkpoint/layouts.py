"""Checkpoints whose weights or optimizer state are spread over files: named, with what to do about each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_UNSHARDED = "train on one device or with plain data parallelism (DDP), whose checkpoints can be measured"


@dataclass(frozen=True)
class Layout:
    """One way to spread a checkpoint.

    Attributes:
        name: what wrote it.
        parts: files found of it, one per process where it has such.
        weights: what makes plain weights of it, enough to evaluate.
    """

    name: str
    parts: int
    weights: str

    def __str__(self) -> str:
        """What was found and what to do, in one sentence."""
        spread = f" of {self.parts} processes" if self.parts > 1 else ""
        return (
            f"a checkpoint of {self.name}{spread}, whose optimizer state is not read yet; {_UNSHARDED}, "
            f"and to evaluate this one, {self.weights}"
        )


def layout_of(folder: Path) -> Layout | None:
    """What spread this checkpoint over files; None where nothing known did."""
    return next((found for look in _LOOKS for found in look(folder)), None)


def missing_state(folder: Path) -> str:
    """Why there is no ``optimizer.pt`` in a folder, and what to do."""
    if (layout := layout_of(folder)) is not None:
        return str(layout)
    return (
        "no optimizer state, and a step cannot be rebuilt without it; save the run with "
        "save_only_model=False (the default), or point at a checkpoint folder that has it"
    )


def _deepspeed(folder: Path) -> Iterator[Layout]:
    for inner in (folder, *sorted(folder.glob("global_step*"))):
        parts = len(list(inner.glob("*zero_pp_rank_*_optim_states.pt")))
        if parts or list(inner.glob("mp_rank_*_model_states.pt")):
            yield Layout("DeepSpeed (ZeRO)", parts, "make weights with its zero_to_fp32.py")


def _verl(folder: Path) -> Iterator[Layout]:
    for inner in (folder, folder / "actor"):
        for file in inner.glob("model_world_size_*_rank_*.pt"):
            found = re.match(r"model_world_size_(\d{1,6})_rank_", file.name)
            if found is not None:
                yield Layout("verl (FSDP)", int(found[1]), "make weights with python -m verl.model_merger")


def _fsdp(folder: Path) -> Iterator[Layout]:
    whole = [folder / "optimizer.bin", folder / "pytorch_model_fsdp.bin"]
    if any(file.is_file() for file in whole):
        yield Layout("FSDP (full state)", 1, "save it with FSDP's state dict as safetensors")
    sharded = [*folder.glob("optimizer_[0-9]*"), *folder.glob("pytorch_model_fsdp_[0-9]*")]
    if sharded:
        parts = max(len(list(inner.glob("*.distcp"))) for inner in sharded)
        yield Layout("FSDP (sharded state)", parts, "make weights with accelerate merge-weights")


def _megatron(folder: Path) -> Iterator[Layout]:
    for inner in (folder, folder / "dist_ckpt", folder / "model" / "dist_ckpt", *folder.glob("iter_*")):
        if (inner / "common.pt").is_file() or list(inner.glob("mp_rank_*/model_optim_rng.pt")):
            parts = len(list(inner.glob("*.distcp"))) or len(list(inner.glob("mp_rank_*")))
            yield Layout("Megatron", parts, "convert it to Hugging Face's layout with Megatron's own tools")


def _torch(folder: Path) -> Iterator[Layout]:
    for inner in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())):
        if (inner / ".metadata").is_file() and (parts := len(list(inner.glob("*.distcp")))):
            yield Layout(
                "torch.distributed.checkpoint",
                parts,
                "make weights with torch's dcp_to_torch_save, then save them",
            )


_LOOKS: tuple[Callable[[Path], Iterator[Layout]], ...] = (_deepspeed, _verl, _fsdp, _megatron, _torch)
