"""Checkpoints whose weights or optimizer state are spread over files: named, with what to do about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.base import Contents, Format, Part

_UNSHARDED = "train on one device or with plain data parallelism (DDP), whose checkpoints can be measured"


@dataclass(frozen=True)
class Refused(Format):
    """A way to spread a checkpoint that is known and not read.

    Attributes:
        name: what wrote it.
        cure: what makes plain weights of it, enough to evaluate.
        look: the number of files of it in a folder, one per process where it has such; 0 where they have no
            number, nothing where it is not there.
    """

    name: str
    cure: str
    look: Callable[[Path], Iterator[int]]

    def holds(self, folder: Path) -> frozenset[Part]:
        """All of a checkpoint, so that whatever is asked for is refused."""
        return frozenset({"weights", "optimizer", "settings"} if any(True for _ in self.look(folder)) else ())

    def contents(self, folder: Path) -> Contents:
        """Nothing that can be read.

        Raises:
            CheckpointError: always.
        """
        raise self.lacking(folder, "content")

    def lacking(self, folder: Path, what: str) -> CheckpointError:
        """What was found and what to do, in one sentence."""
        parts = next(self.look(folder))
        spread = f" of {parts} processes" if parts > 1 else ""
        return CheckpointError(
            f"{folder}: a checkpoint of {self.name}{spread}, whose optimizer state is not read yet; "
            f"{_UNSHARDED}, and to evaluate this one, {self.cure}"
        )


def _deepspeed(folder: Path) -> Iterator[int]:
    for inner in (folder, *sorted(folder.glob("global_step*"))):
        parts = len(list(inner.glob("*zero_pp_rank_*_optim_states.pt")))
        if parts or list(inner.glob("mp_rank_*_model_states.pt")):
            yield parts


def _megatron(folder: Path) -> Iterator[int]:
    for inner in (folder, folder / "dist_ckpt", folder / "model" / "dist_ckpt", *folder.glob("iter_*")):
        if (inner / "common.pt").is_file() or list(inner.glob("mp_rank_*/model_optim_rng.pt")):
            yield len(list(inner.glob("*.distcp"))) or len(list(inner.glob("mp_rank_*")))


REFUSED = (
    Refused("DeepSpeed (ZeRO)", "make weights with its zero_to_fp32.py", _deepspeed),
    Refused("Megatron", "convert it to Hugging Face's layout with Megatron's own tools", _megatron),
)
