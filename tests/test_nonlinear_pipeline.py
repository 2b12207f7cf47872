"""Checkpoints of Muon and Lion through the command line: what is measured, what is left out, and why."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cases
from stepscope import cli
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.checkpoint.manifest import MANIFEST
from stepscope.policy.rollouts import sample_rollouts
from stepscope.tasks import load_task

TASK = "arithmetic:terms=2,digits=2,ops=+"
SETTINGS = [
    *("update.num_prompts=4", "update.group_size=4", "probe.num_prompts=24", "probe.group_size=2"),
    *("batch_size=64", "lrs=[1e-5]", "baseline=none", "precision=float64", "validation.num_subsets=4"),
    *("validation.num_single=12", "criteria.diagonal_tokens=16"),
    "criteria.drop_shares=[0.2]",
]


def of_muon(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Over the matrices of the layers, all else frozen."""
    matrices = []
    for name, p in named:
        p.requires_grad_(p.ndim == 2 and "layers" in name)
        matrices += [p] if p.requires_grad else []
    return torch.optim.Muon(matrices, lr=1e-3)


def of_lion(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    lion_pytorch = pytest.importorskip("lion_pytorch")
    return lion_pytorch.Lion([p for _, p in named], lr=1e-4)  # type: ignore[no-any-return]


def trained_by(made: Any, checkpoint: Path, folder: Path) -> Path:
    """The checkpoint after three steps of another optimizer, as the Trainer would leave it."""
    shutil.copytree(checkpoint, folder)
    for name in (MANIFEST, "scheduler.pt"):
        (folder / name).unlink()
    policy = load_checkpoint(folder)
    optimizer = made(policy.model.named_parameters())
    task = load_task(TASK, format_weight=policy.settings.format_weight)
    for seed in range(3):
        drawn = sample_rollouts(policy, task, num_prompts=8, group_size=4, seed=seed)
        cases.take_step(policy, optimizer, drawn)
    policy.model.save_pretrained(folder)
    torch.save(copy.deepcopy(optimizer.state_dict()), folder / "optimizer.pt")
    return folder


def run(verb: str, *args: object) -> Any:
    return CliRunner().invoke(cli.app, [verb, *map(str, args)])


@pytest.fixture(scope="module")
def muon(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_by(of_muon, checkpoint, tmp_path_factory.mktemp("muon") / "checkpoint-7")


@pytest.fixture(scope="module")
def lion(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_by(of_lion, checkpoint, tmp_path_factory.mktemp("lion") / "checkpoint-7")


def measured(folder: Path, out: Path) -> tuple[dict[str, Any], str]:
    """Figures of all stages and of re-made steps, and what was said."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = run("measure", folder, "--task", TASK, "--validate", "--out", out, *SETTINGS)
    assert done.exit_code == 0, (done.output, done.exception)
    figures: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return figures, " ".join(str(w.message) for w in told)


def adds_up(figures: dict[str, Any], out: Path) -> None:
    """The parts of the step to the linear change, and the influences of tokens to their sum."""
    value = {name: figure["value"] for name, figure in figures.items()}
    parts = [value[f"influence_{part}"] for part in ("momentum", "decay", "sequences")]
    assert sum(parts) == pytest.approx(value["influence_total"], rel=1e-9)
    lr = json.loads((out / "step.json").read_text())["lr"]
    assert value["change_linear_per_token"] == pytest.approx(lr * value["influence_total"], rel=1e-9)
    tokens = pd.read_parquet(out / "influence_tokens.parquet")
    (way,) = tokens.through.unique()
    summed = value["influence_sequences" if way == "fixed" else "influence_sequences_optimizer"]
    assert tokens.influence.sum() == pytest.approx(summed, rel=1e-9)
    assert value["change_true_per_seq"] == pytest.approx(value["change_linear_per_seq"], rel=0.1)
    assert not any(name.startswith("effect_after") for name in figures)
    assert json.loads((out / "step.json").read_text())["lifetime"] is None


def test_muon(muon: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    figures, told = measured(muon, out)
    adds_up(figures, out)
    assert "the stage criteria is left out: Muon orthogonalises" in told
    assert not (out / "criteria.json").exists()
    batch = figures["influence_sequences_optimizer"]
    assert not batch["reliable"]
    assert "this is the derivative at the batch, which misses" in batch["reason"]
    assert figures["influence_nonlinear"]["value"] > 0.2
    assert figures["leave_one_out_zeroed_optimizer"]["value"] > 0.8
    assert "update_preconditioned" not in json.loads((out / "kernel.json").read_text())["matrices"]
    noise = json.loads((out / "noise.json").read_text())
    assert noise["preconditioned"] is None
    assert noise["effects"] == {}
    assert any("left out" in limit for limit in json.loads((out / "provenance.json").read_text())["limits"])
    page = (out / "report.html").read_text()
    assert "the derivative of the step at the batch" in page
    assert "preconditioner and clipping fixed" not in page
    again = run("measure", muon, "--task", TASK, "--validate", "--resume", "--out", out, *SETTINGS)
    assert again.exit_code == 0, again.output
    assert "influence: done before" in again.stderr
    alone = run("measure", muon, "--task", TASK, "--resume", "--stages", "criteria", "--out", out, *SETTINGS)
    assert alone.exit_code == 2
    assert "Muon orthogonalises each gradient matrix as a whole" in alone.stderr


def test_check_says_what_will_be_left_out(muon: Path) -> None:
    done = run("check", muon, "--task", TASK)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "Muon state of 14 tensors" in said
    assert "criteria is left out" in said


@pytest.mark.slow
def test_lion(lion: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    figures, told = measured(lion, out)
    adds_up(figures, out)
    assert "left out" not in told
    assert (out / "criteria.json").is_file()
    batch = figures["influence_sequences"]
    assert not batch["reliable"]
    assert "of the coordinates that the batch turns is shared by" in batch["reason"]
    assert "influence_sequences_optimizer" not in figures
    assert figures["leave_one_out_zeroed"]["value"] > 0.5
    assert "the whole batch, through the optimizer" not in (out / "report.html").read_text()
