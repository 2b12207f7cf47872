"""A checkpoint format of one's own: a class and an entry in the registry, and checkpoints of it are read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cases
from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.formats.base import Format, Matching, Part
from stepscope.policy.checkpoint.formats.registry import FORMATS, files_of
from stepscope.policy.checkpoint.load import checkpoint_digest, load_checkpoint, read_settings
from stepscope.policy.checkpoint.manifest import write_manifest
from stepscope.policy.checkpoint.models import load_model
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.registry import named_state


class Shelf(Format):
    """A model's folder beside moments under the names of their parameters."""

    name = "a shelf"
    tensors = ("model/*.safetensors", "moments.pt")
    configs = ("model/config.json",)

    def holds(self, folder: Path) -> frozenset[Part]:
        whole = (folder / "moments.pt").is_file()
        return frozenset({"weights", "optimizer", "settings"} if whole else ())

    def weights(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
        return load_model(folder / "model", dtype=dtype, device=device)

    def optimizer(self, folder: Path) -> Matching:
        saved = torch.load(folder / "moments.pt", weights_only=True)
        names = [group["params"] for group in saved["param_groups"]]

        def match(model: nn.Module, dtype: torch.dtype | None) -> OptimizerState:
            return named_state(saved, names, model, where=str(folder), dtype=dtype)

        return match

    def settings(self, folder: Path, overrides: Mapping[str, Any] | None, *, for_step: bool) -> StepSettings:
        return StepSettings.from_plain(asdict(StepSettings()) | dict(overrides or {}), where=str(folder))


@pytest.fixture
def registered() -> Iterator[None]:
    FORMATS.append(Shelf())
    yield
    FORMATS.pop()


@pytest.fixture
def folders(registered: None, tokenizer: Any, tmp_path: Path) -> tuple[Path, Path]:
    """The same policy on a shelf and as the Trainer would leave it."""
    plain, shelf = tmp_path / "plain", tmp_path / "shelf"
    model = cases.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for folder in (plain, shelf / "model"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    StepSettings().save(plain)
    saved = copy.deepcopy(optimizer.state_dict())
    torch.save(saved, plain / "optimizer.pt")
    names = [n for n, _ in model.named_parameters()]
    saved["state"] = {names[i]: entry for i, entry in saved["state"].items()}
    saved["param_groups"][0]["params"] = names
    torch.save(saved, shelf / "moments.pt")
    return plain, shelf


def test_a_checkpoint_of_ones_own_format_makes_the_same_step(folders: tuple[Path, Path]) -> None:
    plain, own = (load_checkpoint(folder, precision="float64") for folder in folders)
    update = cases.batch(plain)
    steps = [reconstruct_step(policy, update) for policy in (plain, own)]
    for name, direction in steps[0].direction.items():
        torch.testing.assert_close(direction, steps[1].direction[name], rtol=0, atol=0)
    assert own.step == 1
    assert read_settings(folders[1], overrides={"loss_type": "grpo"}).loss_type == "grpo"


def test_it_is_examined_and_has_an_identity(folders: tuple[Path, Path]) -> None:
    _, folder = folders
    assert not [f for f in inspect_checkpoint(folder) if f.level == "fail"]
    assert files_of(folder) == (*Shelf.tensors, *Shelf.configs)
    write_manifest(folder)
    before = checkpoint_digest(folder)
    saved = torch.load(folder / "moments.pt", weights_only=True)
    torch.save({**saved, "more": 1}, folder / "moments.pt")
    assert checkpoint_digest(folder) != before
    with pytest.raises(CheckpointError, match=r"moments\.pt is not what was written"):
        load_checkpoint(folder)


def test_what_a_format_does_not_have_is_said(registered: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a checkpoint of part of one has no weights that can be read"):
        type("Part", (Format,), {"name": "part of one"})().weights(
            tmp_path, dtype=torch.float32, device=torch.device("cpu")
        )
