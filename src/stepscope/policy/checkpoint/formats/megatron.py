"""Megatron's checkpoints, which are not read: recognised, with the converter of the library that wrote them.

Megatron fuses and permutes weights of attention and MLP and splits them over tensor, pipeline and expert
ranks; its optimizer keeps moments in flat buffers of its own buckets. Converters carry over weights alone.

    iter_0000010/{common.pt, .metadata, metadata.json, *.distcp}      Megatron-Core's torch_dist
    iter_0000010/mp_rank_00[_000]/model_optim_rng.pt                  the former layout
    {dist_ckpt, huggingface}/, {model, optimizer, extra}/dist_ckpt/   verl before 0.7, since
    weights/iter_0000000/                                             NeMo-RL
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.base import PARTS, Contents, Format, Part

_CONVERTERS = {
    "verl": "python -m verl.model_merger merge --backend megatron",
    "NeMo-RL": "its examples/converters/convert_megatron_to_hf.py",
    "Megatron-Core": (
        "Megatron-Bridge (AutoBridge.export_ckpt), or of a run of slime its tools/convert_torch_dist_to_hf.py"
    ),
}

_INSIDE = {
    "verl": ("dist_ckpt", "model/dist_ckpt", "optimizer/dist_ckpt", "actor/dist_ckpt", "actor/*/dist_ckpt"),
    "NeMo-RL": ("weights/iter_*", "policy/weights/iter_*"),
    "Megatron-Core": (".", "iter_*"),
}
"""Where each library has Megatron's folder below a checkpoint's."""


class Megatron(Format):
    """A checkpoint of Megatron-Core, by whichever library it was trained."""

    name = "Megatron"

    def holds(self, folder: Path) -> frozenset[Part]:
        """All of a checkpoint, so that whatever is asked for is refused."""
        return frozenset(PARTS if any(True for _ in _found(folder)) else ())

    def contents(self, folder: Path) -> Contents:
        """Nothing that can be read.

        Raises:
            CheckpointError: always.
        """
        raise self.lacking(folder, "content")

    def lacking(self, folder: Path, what: str) -> CheckpointError:
        """What was found and what to do, in one sentence."""
        by, inner = next(_found(folder))
        parts = len(list(inner.glob("mp_rank_*"))) or len(list(inner.glob("*.distcp")))
        spread = f", {parts} files" if parts > 1 else ""
        return CheckpointError(
            f"{folder}: a checkpoint of Megatron as {by} writes it ({inner.relative_to(folder)}{spread}), "
            "whose tensors are fused and split in ways that are not read; no converter keeps the moments, so "
            f"no step of it can be rebuilt, and to evaluate it make weights with {_CONVERTERS[by]}; to "
            "measure steps train with FSDP, ZeRO or DDP"
        )


def _found(folder: Path) -> Iterator[tuple[str, Path]]:
    for library, patterns in _INSIDE.items():
        for pattern in patterns:
            for inner in [folder] if pattern == "." else sorted(folder.glob(pattern)):
                if (inner / "common.pt").is_file() or any(inner.glob("mp_rank_*/model_optim_rng.pt")):
                    yield library, inner
