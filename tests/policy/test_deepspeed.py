"""Checkpoints of DeepSpeed are the policy of the same state in the plain layout, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
from deepspeed_layout import SETTINGS, folders
from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.formats.registry import checkpoint_folder
from stepscope.policy.checkpoint.load import load_checkpoint, load_model, read_settings
from stepscope.policy.state import Policy


def lora(folder: Path) -> Any:
    """An adapter whose base, kept in bfloat16, has a folder."""
    base = cases.model().bfloat16().float()
    base.save_pretrained(folder / "base")
    cases.tokenizer().save_pretrained(folder / "base")
    loaded, _ = load_model(folder / "base", dtype=torch.float32)
    return cases.adapted(loaded, task_type="CAUSAL_LM")


def same(expected: Policy, found: Policy) -> None:
    """Bitwise: weights, moments, steps, groups and the direction on one batch."""
    assert expected.optimizer is not None
    assert found.optimizer is not None
    assert expected.parameters.keys() == found.parameters.keys()
    for name, p in expected.model.named_parameters():
        assert torch.equal(p, found.model.get_parameter(name)), name
    assert found.optimizer.steps == expected.optimizer.steps
    groups = {name: group for group in found.optimizer.groups for name in group.names}
    for group in expected.optimizer.groups:
        for name in group.names:
            assert {**vars(groups[name]), "names": ()} == {**vars(group), "names": ()}
    for key, tensors in expected.optimizer.tensors().items():
        assert all(torch.equal(t, found.optimizer.tensors()[key][name]) for name, t in tensors.items())
    batch = cases.batch(expected)
    first, second = (reconstruct_step(policy, batch).direction for policy in (expected, found))
    assert all(torch.equal(first[name], second[name]) for name in first)


WAYS: dict[str, dict[str, Any]] = {
    f"stage {stage}, {world} processes": {"stage": stage, "world": world}
    for stage in (1, 2, 3)
    for world in (1, 2, 3)
} | {
    "sub-groups": {"stage": 3, "world": 2, "sub_groups": 4},
    "round robin": {"stage": 2, "world": 3, "backwards": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_split_state_is_the_plain_one(way: str, tmp_path: Path) -> None:
    plain, split = folders(cases.model(), tmp_path, **WAYS[way])
    found = load_checkpoint(split)
    same(load_checkpoint(plain), found)
    assert (found.step, found.stored_dtypes) == (3, ("float32",))


def test_untied_weights_are_their_own(tmp_path: Path) -> None:
    plain, split = folders(cases.model("llama"), tmp_path, stage=3, world=3)
    same(load_checkpoint(plain), load_checkpoint(split))


@pytest.mark.parametrize("frozen", [True, False], ids=["whole", "without the base"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_adapter_is_read_with_and_without_its_base(stage: int, frozen: bool, tmp_path: Path) -> None:
    plain, split = folders(lora(tmp_path), tmp_path, stage=stage, world=3, frozen=frozen)
    same(load_checkpoint(plain), load_checkpoint(split))


def test_the_masters_are_the_weights(tmp_path: Path) -> None:
    _, split = folders(cases.model(), tmp_path, stage=2, world=2)
    rounded, _ = load_model(split, dtype=torch.float32)
    found = load_checkpoint(split)
    moved = [n for n, p in found.parameters.items() if not torch.equal(p, rounded.get_parameter(n))]
    assert moved
    assert all(
        torch.equal(p.bfloat16().float(), rounded.get_parameter(n)) for n, p in found.parameters.items()
    )


def test_the_clipping_is_deepspeeds(tmp_path: Path) -> None:
    _, split = folders(cases.model(), tmp_path, stage=3, world=1, clip=0.25)
    assert read_settings(split).max_grad_norm == 0.25
    assert read_settings(split, overrides={"max_grad_norm": 2.0}).max_grad_norm == 2.0


def test_openrlhfs_folder_needs_config_and_tokenizer(tmp_path: Path) -> None:
    plain, split = folders(cases.model(), tmp_path, stage=2, world=2)
    actor = tmp_path / "checkpoints_ppo" / "_actor"
    actor.mkdir(parents=True)
    for name in ("latest", "global_step3"):
        (split / name).rename(actor / name)
    with pytest.raises(CheckpointError, match="copy the run's"):
        load_checkpoint(actor, settings=SETTINGS)
    for file in plain.glob("*.json"):
        shutil.copy(file, actor)
    same(load_checkpoint(plain), load_checkpoint(actor, settings=SETTINGS))


def test_check_says_stage_processes_and_masters(tmp_path: Path) -> None:
    _, split = folders(cases.model(), tmp_path, stage=3, world=2)
    found = inspect_checkpoint(split)
    first = next(f for f in found if "layout of DeepSpeed" in f.what)
    assert first.level == "ok"
    assert "written by 2 processes" in first.what
    assert "weights: masters in global_step3 (float32)" in first.what
    assert "ZeRO stage 3" in first.what
    assert not [f for f in found if f.level == "fail"]


def test_a_run_with_such_checkpoints_is_no_checkpoint(tmp_path: Path) -> None:
    _, split = folders(cases.model(), tmp_path, stage=2, world=1)
    run = tmp_path / "run"
    run.mkdir()
    split.rename(run / "checkpoint-3")
    with pytest.raises(CheckpointError, match="a run with 1 checkpoints"):
        checkpoint_folder(run)
