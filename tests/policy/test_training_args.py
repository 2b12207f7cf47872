"""The restricted reader: it reads what TRL writes and runs nothing."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, SFTConfig

from stepscope.errors import CheckpointError
from stepscope.policy.training_args import Record, read_training_args, settings_from_training_args


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
    args = read_training_args(path)
    assert args["learning_rate"] == 3e-6
    assert args["output_dir"] == str(tmp_path)
    assert type(args["lr_scheduler_type"]).__mro__[1] is Record
    assert args["lr_scheduler_type"].arguments == ("linear",)


def test_settings_of_a_grpo_run(tmp_path: Path) -> None:
    path = save_args(
        tmp_path,
        loss_type="bnpo",
        scale_rewards="batch",
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=33,
        temperature=0.7,
        max_grad_norm=0.0,
        epsilon=0.1,
        epsilon_high=0.28,
        beta=0.04,
        use_bias_correction_kl=False,
        mask_truncated_completions=True,
        seed=7,
        top_p=0.95,
    )
    settings = settings_from_training_args(path)
    assert (settings.loss_type, settings.scale_rewards, settings.group_size) == ("bnpo", "batch", 4)
    assert (settings.prompts_per_step, settings.max_response_tokens, settings.seed) == (2, 33, 7)
    assert (settings.temperature, settings.max_grad_norm, settings.beta, settings.top_p) == (
        0.7,
        0.0,
        0.04,
        0.95,
    )
    assert (settings.epsilon_low, settings.epsilon_high) == (0.1, 0.28)
    assert settings.mask_truncated
    assert not settings.bias_correction_kl
    assert settings.objective is None


def test_trls_entropy_quantile_is_an_objective_of_its_micro_batches(tmp_path: Path) -> None:
    path = save_args(tmp_path, top_entropy_quantile=0.2, per_device_train_batch_size=8, num_generations=4)
    record = {"name": "top_entropy", "fraction": 0.2, "micro_batch_size": 8}
    assert settings_from_training_args(path).objective == record


@pytest.mark.parametrize(
    "changes",
    [
        {"num_iterations": 2},
        {"importance_sampling_level": "sequence"},
        {"delta": 2.0},
        {"entropy_coef": 0.01},
        {"top_k": 50},
        {"repetition_penalty": 1.1},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
    ],
)
def test_what_settings_cannot_say_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"the run used .*{next(iter(changes))}"):
        settings_from_training_args(save_args(tmp_path, **changes))


def test_arguments_of_another_trainer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "training_args.bin"
    torch.save(SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), path)
    with pytest.raises(CheckpointError, match="not the arguments of a TRL GRPO run"):
        settings_from_training_args(path)


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
    with pytest.raises(CheckpointError, match=r"it refers to \S+; pass the loss settings yourself") as caught:
        read_training_args(path)
    assert not witness.exists()
    assert "\n" not in str(caught.value)


def test_functions_of_the_libraries_are_recorded_not_called(tmp_path: Path) -> None:
    """A pickle may name any function of an allowed library; it becomes a record all the same."""
    data = b"\x80\x02ctransformers.utils.hub\ncached_file\nX\x04\x00\x00\x00evil\x85R."
    found = read_training_args(write_pickle(tmp_path / "training_args.bin", data))
    assert found == {}


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"\x80\x02]q\x00.", b"garbage", b"\x80\x02N."])
def test_damaged_pickles_are_one_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_training_args(write_pickle(tmp_path / "training_args.bin", data))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archive_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="pass the loss settings yourself"):
        read_training_args(tmp_path / "training_args.bin")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        read_training_args(tmp_path / "other.bin")


def test_stored_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match="it refers to"):
        read_training_args(tmp_path / "training_args.bin")
