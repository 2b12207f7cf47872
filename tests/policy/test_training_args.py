"""The restricted reader: it reads what TRL writes and runs nothing."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.settings.training_args import MOST_OPERATIONS, Record, read_training_args


def save_args(folder: Path, **changes: Any) -> Path:
    path = folder / "training_args.bin"
    torch.save(GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **changes), path)
    return path


def write_pickle(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", data)
    return path


def test_everything_trl_stores_is_read_without_its_classes(tmp_path: Path) -> None:
    path = save_args(tmp_path, learning_rate=3e-6, report_to=["none"])
    found = read_training_args(path)
    assert found.origin == "trl.trainer.grpo_config.GRPOConfig"
    args = found.values
    assert args["learning_rate"] == 3e-6
    assert args["output_dir"] == str(tmp_path)
    assert type(args["lr_scheduler_type"]).__mro__[1] is Record
    assert args["lr_scheduler_type"].arguments == ("linear",)


class Hostile:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, open, __import__])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, function: Any) -> None:
    witness = tmp_path / "witness"
    payload = {
        os.system: f"touch {witness}",
        eval: f"open({str(witness)!r}, 'w')",
        exec: f"open({str(witness)!r}, 'w')",
    }.get(function, str(witness))
    path = write_pickle(tmp_path / "training_args.bin", pickle.dumps(Hostile(function, payload), protocol=2))
    with pytest.raises(CheckpointError, match=r"it refers to \S+\); copy the file again") as caught:
        read_training_args(path)
    assert not witness.exists()
    assert "\n" not in str(caught.value)


def test_functions_of_the_libraries_are_recorded_not_called(tmp_path: Path) -> None:
    """A pickle may name any function of an allowed library; it becomes a record all the same."""
    data = b"\x80\x02ctransformers.utils.hub\ncached_file\nX\x04\x00\x00\x00evil\x85R."
    found = read_training_args(write_pickle(tmp_path / "training_args.bin", data))
    assert (found.origin, found.values) == ("transformers.utils.hub.cached_file", {})


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"\x80\x02]q\x00.", b"garbage", b"\x80\x02N."])
def test_damaged_pickles_are_one_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_training_args(write_pickle(tmp_path / "training_args.bin", data))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archive_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="or pass the loss settings yourself"):
        read_training_args(tmp_path / "training_args.bin")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        read_training_args(tmp_path / "other.bin")


def test_stored_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match="it refers to"):
        read_training_args(tmp_path / "training_args.bin")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + b"]" * (MOST_OPERATIONS + 2) + b".",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff.",
        pickle.dumps(b"0" * 2**21),
    ],
)
def test_a_file_out_of_proportion_is_refused_before_it_is_read(tmp_path: Path, data: bytes) -> None:
    """Deep nesting, a memo of 2^31 entries, a string longer than the file, two megabytes."""
    with pytest.raises(CheckpointError, match="copy the file again"):
        read_training_args(write_pickle(tmp_path / "training_args.bin", data))


def test_classes_of_the_runs_own_are_recorded_too(tmp_path: Path) -> None:
    data = b"\x80\x02cmine.configs\nMyConfig\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    found = read_training_args(write_pickle(tmp_path / "training_args.bin", data))
    assert (found.origin, found.values) == ("mine.configs.MyConfig", {"a": 1})
