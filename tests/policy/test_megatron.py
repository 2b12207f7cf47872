"""Megatron's checkpoints are refused with the converter of whoever wrote them; plain ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepscope.errors import CheckpointError
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.formats.plain import Plain
from stepscope.policy.checkpoint.formats.registry import format_of
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.checkpoint.optimizer_state import read_optimizer


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def core(folder: str) -> tuple[str, ...]:
    """What Megatron-Core's torch_dist puts into a folder."""
    return tuple(f"{folder}/{name}" for name in ("common.pt", ".metadata", "metadata.json", "__0_0.distcp"))


MERGER = "python -m verl.model_merger merge --backend megatron"
LAYOUTS = {
    "Megatron-Core, a run": (("latest_checkpointed_iteration.txt", *core("iter_0000010")), "Megatron-Bridge"),
    "Megatron-Core, a step": (core("."), "tools/convert_torch_dist_to_hf.py"),
    "Megatron, formerly": (
        ("iter_0000010/mp_rank_00/model_optim_rng.pt", "iter_0000010/mp_rank_01/model_optim_rng.pt"),
        r"\(iter_0000010, 2 files\).*Megatron-Bridge",
    ),
    "verl, formerly": (("huggingface/config.json", *core("dist_ckpt")), MERGER),
    "verl": (
        ("ckpt_contents.json", *core("model/dist_ckpt"), *core("optimizer/dist_ckpt")),
        MERGER,
    ),
    "verl, weights of Hugging Face": (
        ("model/huggingface/config.json", *core("optimizer/dist_ckpt"), *core("extra/dist_ckpt")),
        MERGER,
    ),
    "verl, a step": (core("actor/model/dist_ckpt"), MERGER),
    "NeMo-RL": (
        ("training_info.json", *core("policy/weights/iter_0000000")),
        "examples/converters/convert_megatron_to_hf.py",
    ),
    "NeMo-RL, the policy": (core("weights/iter_0000000"), "examples/converters/convert_megatron_to_hf.py"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_converter_is_named(tmp_path: Path, name: str) -> None:
    files, converter = LAYOUTS[name]
    folder = touch(tmp_path, *files)
    with pytest.raises(CheckpointError, match=converter):
        load_checkpoint(folder)
    findings = inspect_checkpoint(folder)
    assert [f.level for f in findings] == ["fail"]
    assert "no converter keeps the moments" in findings[0].what
    assert findings[0].cure == "to measure steps train with FSDP, ZeRO or DDP"


def test_plain_folders_are_none_of_it(tmp_path: Path) -> None:
    folder = touch(tmp_path, "config.json", "model.safetensors", "sub/optimizer.pt")
    assert isinstance(format_of(folder, "weights"), Plain)
    assert isinstance(format_of(folder, "optimizer"), Plain)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: no optimizer state"):
        read_optimizer(tmp_path / "optimizer.pt")
