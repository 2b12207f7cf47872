"""A training goes on from what it left, or says that it cannot."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.checkpoint.manifest import MANIFEST, damage, sha256
from stepscope.training import train
from stepscope.training.setup.integrity import set_damaged_aside


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(small_run, out)
    return out


@pytest.fixture
def last(run: Path) -> Path:
    return run / "checkpoints" / "step-4"


def test_a_manifest_lists_every_file_of_a_checkpoint(last: Path) -> None:
    recorded = json.loads((last / MANIFEST).read_text())["sha256"]
    assert recorded == {p.name: sha256(p) for p in last.iterdir() if p.name != MANIFEST}
    assert damage(last) == ""
    (last / "notes.txt").write_text("mine")
    assert damage(last) == ""


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_damage_is_found_and_the_checkpoint_before_is_gone_on_from(
    run: Path, last: Path, name: str, harm: Callable[[Path], Any]
) -> None:
    harm(last / name)
    fault = f"{name} is {'missing' if harm is Path.unlink else 'not what was written'}"
    with pytest.warns(UserWarning, match=f"step-4: {fault}; it is kept as damaged-step-4, .* from step-2"):
        set_damaged_aside(run, processes=1)
    names = sorted(p.name for p in last.parent.iterdir())
    assert names == ["damaged-step-4", "step-0", "step-2"]


def test_from_the_checkpoint_before_the_training_ends_with_the_same_bits(
    small_run: Path, run: Path, last: Path
) -> None:
    flip(last / "optimizer.pt")
    with pytest.warns(UserWarning, match="goes on from step-2"):
        assert train(cases.training(), run, resume=True) == last
    for name in ("model.safetensors", "optimizer.pt"):
        assert sha256(last / name) == sha256(small_run / "checkpoints" / "step-4" / name)
    weights = load_file(small_run / "checkpoints/step-4/model.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in load_file(last / "model.safetensors").items())


def test_without_a_sound_checkpoint_nothing_is_trained(run: Path, last: Path) -> None:
    flip(last / "model.safetensors")
    cut(last.with_name("step-2") / MANIFEST)
    expected = (
        r"no checkpoint is sound \(step-4: model.safetensors is not .*; step-2: manifest.json cannot be read"
    )
    with pytest.raises(CheckpointError, match=expected):
        train(cases.training(), run, resume=True)
    assert last.is_dir()


def test_what_is_measured_is_what_was_trained(last: Path) -> None:
    (last / "optimizer.pt").unlink()
    (last / "config.json").write_text((last / "config.json").read_text() + "\n")
    assert load_checkpoint(last, require_optimizer=False).step == 4
    flip(last / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"step-4: model.safetensors is not what was written, says manif"
    ):
        load_checkpoint(last, require_optimizer=False)
    (last / MANIFEST).unlink()
    assert load_checkpoint(last, require_optimizer=False).step == 4


def test_a_damaged_base_is_refused(run: Path) -> None:
    flip(run / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"base: model.safetensors is not what was written"):
        train(cases.training(), run, resume=True)


@pytest.mark.parametrize(
    ("name", "harm", "fault"),
    [
        ("scheduler.pt", Path.unlink, "scheduler.pt is missing"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
        ("optimizer.pt", cut, "optimizer.pt cannot be read"),
        ("model.safetensors", cut, "model.safetensors cannot be read"),
        ("model.safetensors", Path.unlink, "model.safetensors or adapter_model.safetensors is missing"),
        ("trainer_state.json", cut, "trainer_state.json cannot be read"),
        ("rng_state.pth", lambda path: path.write_text("no"), "rng_state.pth cannot be read"),
    ],
)
def test_without_a_manifest_files_must_be_there_and_load(
    run: Path, last: Path, name: str, harm: Callable[[Path], Any], fault: str
) -> None:
    for step in ("step-2", "step-4"):
        (last.with_name(step) / MANIFEST).unlink()
    harm(last / name)
    with pytest.warns(UserWarning, match=fault) as said:
        set_damaged_aside(run, processes=1)
    texts = [str(warning.message) for warning in said]
    assert any(
        "step-2: has no manifest.json, so that its files load but cannot be verified" in t for t in texts
    )


def test_another_number_of_processes_is_said(run: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"another number of processes than 2 \(rng_state_0.pth is not there\)"
    ):
        set_damaged_aside(run, processes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_damaged_aside(run, processes=1)
