"""The next step's learning rate: what the real Trainer uses next, and a scheduler that is ahead."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from stepscope.errors import CheckpointError
from stepscope.policy.check.examination import _optimizer
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.checkpoint.manifest import MANIFEST
from stepscope.policy.checkpoint.optimizer_state import OPTIMIZER_FILE, read_optimizer
from stepscope.policy.checkpoint.schedule import SCHEDULER_FILE, scheduled_rates


class Line(nn.Module):
    """A model of two parameters, of which one has weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(x) - labels).square().mean()}


class Used(TrainerCallback):
    """Learning rates of every optimizer step, as the optimizer takes it."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_saved_rates_are_those_that_the_trainer_uses_next(tmp_path: Path, accumulation: int) -> None:
    data = Dataset.from_dict({"x": [[1.0]] * 16, "labels": [[2.0]] * 16})
    used = Used()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        warmup_steps=2,
        lr_scheduler_type="linear",
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(Line(), arguments, train_dataset=data, callbacks=[used]).train()
    assert [rates[0] for rates in used.rates] == pytest.approx([0.0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    for step in range(1, 6):
        folder = tmp_path / f"checkpoint-{step}"
        groups = read_optimizer(folder / OPTIMIZER_FILE)["param_groups"]
        assert scheduled_rates(folder) == tuple(used.rates[step]) == tuple(g["lr"] for g in groups)
        assert len(used.rates[step]) == 2


@pytest.fixture
def late(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose optimizer was saved before its scheduler's step."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-4"))
    (folder / MANIFEST).unlink()
    state = torch.load(folder / SCHEDULER_FILE, weights_only=True)
    torch.save({**state, "_last_lr": [0.25 * rate for rate in state["_last_lr"]]}, folder / SCHEDULER_FILE)
    return folder


def test_where_the_scheduler_is_ahead_the_step_follows_it_and_check_says_so(checkpoint, late) -> None:
    before, after = (load_checkpoint(folder).optimizer.groups for folder in (checkpoint, late))
    assert all(group.saved_lr is None for group in before)
    assert [g.lr for g in after] == pytest.approx([0.25 * g.lr for g in before])
    assert [g.saved_lr for g in after] == [g.lr for g in before]
    assert [f for f in _optimizer(load_checkpoint(checkpoint)) if "scheduler" in f.what] == []
    (said,) = [f for f in _optimizer(load_checkpoint(late)) if "scheduler" in f.what]
    assert said.level == "warn"
    lr = before[0].lr
    assert f"{0.25 * lr:g} instead of {lr:g}" in said.what


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_last_lr": [1e-3]}, "learning rates of 1 parameter groups"),
        ({"_last_lr": [-1.0, 1.0]}, "expected 0 or more"),
        ({"_last_lr": ["fast", 1.0]}, "_last_lr"),
        ({"_last_lr": [float("nan"), 1.0]}, "learning rate nan"),
    ],
)
def test_rates_that_are_none_are_refused(late: Path, state: dict, message: str) -> None:
    torch.save(state, late / SCHEDULER_FILE)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(late)


def test_a_scheduler_that_keeps_no_rates_changes_nothing(late: Path) -> None:
    torch.save({"best": 1.0}, late / SCHEDULER_FILE)
    assert all(group.saved_lr is None for group in load_checkpoint(late).optimizer.groups)
