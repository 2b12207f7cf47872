"""Sharded checkpoints are named, with their number of processes and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepscope.errors import CheckpointError
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.formats.plain import Plain
from stepscope.policy.checkpoint.formats.registry import FORMATS, format_of
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.checkpoint.optimizer_state import read_optimizer


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


LAYOUTS = {
    "DeepSpeed (ZeRO) of 2 processes": (
        "latest",
        "zero_to_fp32.py",
        "global_step3/mp_rank_00_model_states.pt",
        "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ),
    "Megatron of 2 processes": (
        "iter_0000010/mp_rank_00/model_optim_rng.pt",
        "iter_0000010/mp_rank_01/model_optim_rng.pt",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_named(tmp_path: Path, name: str) -> None:
    folder = touch(tmp_path, *LAYOUTS[name])
    with pytest.raises(
        CheckpointError, match="whose optimizer state is not read yet; train on one device"
    ) as caught:
        load_checkpoint(folder)
    assert f"a checkpoint of {name}, " in str(caught.value)
    (finding,) = inspect_checkpoint(folder)
    assert finding.level == "fail"
    assert finding.cure.startswith("train on one device")


def test_plain_folders_are_no_layout(tmp_path: Path) -> None:
    folder = touch(tmp_path, "config.json", "model.safetensors", "sub/optimizer.pt")
    (plain,) = [known for known in FORMATS if isinstance(known, Plain)]
    assert format_of(folder, "weights") is format_of(folder, "optimizer") is plain
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: no optimizer state"):
        read_optimizer(tmp_path / "optimizer.pt")
