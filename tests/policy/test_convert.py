"""Checkpoints written anew in the plain layout: the same state to the bit, which the Trainer goes on from."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

import cases
import deepspeed_layout
from stepscope import cli
from stepscope.errors import CheckpointError, RunFolderError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.conversion.convert import convert
from stepscope.policy.checkpoint.conversion.state import numbered_state
from stepscope.policy.checkpoint.load import load_checkpoint, read_settings
from stepscope.policy.checkpoint.manifest import damage
from stepscope.policy.checkpoint.models import load_model
from stepscope.policy.checkpoint.optimizer_state import match_optimizer, state_by_name
from stepscope.policy.checkpoint.parameter_order import decay_parameter_names
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.state import Policy


def assert_same(found: Policy, expected: Policy) -> None:
    """Weights, moments, settings of groups and steps, to the bit."""
    weights = dict(found.model.named_parameters())
    for name, value in expected.model.named_parameters():
        assert torch.equal(weights[name], value), name
    assert found.optimizer is not None
    assert expected.optimizer is not None
    for key, tensors in expected.optimizer.tensors().items():
        for name, value in tensors.items():
            assert torch.equal(found.optimizer.tensors()[key][name], value), (key, name)
    assert found.optimizer.steps == expected.optimizer.steps
    settings = [
        {name: {**vars(group), "names": ()} for group in policy.optimizer.groups for name in group.names}  # type: ignore[union-attr]
        for policy in (found, expected)
    ]
    assert settings[0] == settings[1]
    assert found.step == expected.step


@pytest.mark.parametrize(
    "layout",
    [
        "full-prime-rl",
        "lora-fsdp2-sharded",
        pytest.param("full-fsdp1-full", marks=pytest.mark.slow),
        pytest.param("full-flat", marks=pytest.mark.slow),
    ],
)
def test_what_is_written_is_what_was_read(written: Path, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "new" / "checkpoint-3"
    done = convert(written / layout, target)
    assert set(done.written) == {f.relative_to(target).as_posix() for f in target.rglob("*") if f.is_file()}
    assert [p.name for p in target.parent.iterdir()] == ["checkpoint-3"]
    assert not damage(target)
    plain, found = (load_checkpoint(f) for f in (written / f"plain-{layout[:4]}", target))
    assert_same(found, plain)
    update = cases.batch(plain)
    steps = [reconstruct_step(policy, update) for policy in (plain, found)]
    for name, direction in steps[0].direction.items():
        assert torch.equal(steps[1].direction[name], direction)
    assert not [f for f in inspect_checkpoint(target) if f.level == "fail"]


def test_the_trainer_goes_on_from_it(written: Path, tmp_path: Path) -> None:
    convert(written / "full-nemo-rl", tmp_path / "step")
    moved = []
    for folder in (written / "plain-full", tmp_path / "step"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
        optimizer: Any = Trainer(model=model, args=args).create_optimizer()
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 * (i + 1))
        optimizer.step()
        moved.append(dict(model.named_parameters()))
    for name, value in moved[0].items():
        assert torch.equal(moved[1][name], value)


def test_the_command_says_what_it_did(written: Path, tmp_path: Path) -> None:
    source, target = written / "full-fsdp2-full", tmp_path / "step"
    result = CliRunner().invoke(cli.app, ["convert", str(source), str(target)])
    assert result.exit_code == 0, result.output
    assert "read as FSDP (full state)" in result.output
    assert "model.safetensors" in result.output
    assert "not carried over: the state of a scheduler" in result.output
    again = CliRunner().invoke(cli.app, ["convert", str(source), str(target)])
    assert again.exit_code == 2
    assert "is there already; give a new folder" in again.stderr


def test_nothing_is_left_of_a_source_that_cannot_be_read(written: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(written / "full-fsdp2-sharded", tmp_path / "source"))
    (source / "optimizer_0" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="a file of the checkpoint is missing"):
        convert(source, tmp_path / "new" / "step")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(RunFolderError, match="is there already"):
        convert(source, source)


def test_no_target_inside_of_the_source_or_behind_a_link(written: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(written / "plain-full", tmp_path / "source"))
    before = sorted(source.rglob("*"))
    with pytest.raises(RunFolderError, match="is inside of the checkpoint"):
        convert(source, source / "inner" / "step")
    assert sorted(source.rglob("*")) == before
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="is there already"):
        convert(source, link)


def test_a_full_disk_is_no_fault_of_the_source(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch's writer raises on a full disk has no number of the system's."""

    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFolderError, match=r"cannot be written there, \d+ bytes are free.*make room"):
        convert(written / "full-fsdp2-full", tmp_path / "new" / "step")
    assert not list((tmp_path / "new").iterdir())


def test_a_plain_checkpoint_is_copied_as_it_is(written: Path, tmp_path: Path) -> None:
    source = written / "plain-full"
    done = convert(source, tmp_path / "step")
    assert not done.lost
    for file in source.iterdir():
        assert (tmp_path / "step" / file.name).read_bytes() == file.read_bytes()


def stepped(model: Any, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """State by name of AdamW after a step."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    numbered = [p for group in groups for p in group["params"]]
    named = {id(p): n for n, p in model.named_parameters()}
    names = [named[id(p)] for p in numbered]
    saved["state"] = {names[i]: entry for i, entry in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [names[i] for i in group["params"]]
    return saved


def test_groups_are_the_trainers_where_they_can_be() -> None:
    model = cases.model()
    named = dict(model.named_parameters())
    whole = stepped(model, [{"params": [*named.values()][::-1], "weight_decay": 0.1}])
    state = state_by_name(whole, model, where="here")
    assert state.source is not None
    saved, lost = numbered_state(state.source, model)
    decayed = decay_parameter_names(model)
    assert [g["param_names"] for g in saved["param_groups"]] == [
        [n for n in named if n in decayed],
        [n for n in named if n not in decayed],
    ]
    assert [g["weight_decay"] for g in saved["param_groups"]] == [0.1, 0.1]
    assert not lost
    for group in saved["param_groups"]:
        del group["param_names"]
    again = match_optimizer(saved, model, where="here")
    for key, tensors in state.tensors().items():
        for name, value in tensors.items():
            assert torch.equal(again.tensors()[key][name], value)


def test_groups_of_the_run_are_kept_where_they_are_others() -> None:
    model = cases.model()
    named = dict(model.named_parameters())
    own = [
        {"params": [p for n, p in named.items() if "mlp" in n], "lr": 0.5},
        {"params": [p for n, p in named.items() if "mlp" not in n]},
    ]
    state = state_by_name(stepped(model, own), model, where="here")
    assert state.source is not None
    saved, lost = numbered_state(state.source, model)
    assert [g["lr"] for g in saved["param_groups"]] == [0.5, 1e-3]
    assert [g["param_names"] for g in saved["param_groups"]] == [list(g.names) for g in state.groups]
    assert "the 2 of the run have settings of their own" in lost[0]


def fsdp_folder(model: Any, tokenizer: Any, folder: Path, saved: dict[str, Any]) -> Path:
    """A full state of FSDP, written by hand."""
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model_fsdp.bin")
    torch.save(saved, folder / "optimizer.bin")
    tokenizer.save_pretrained(folder)
    StepSettings(max_response_tokens=6).save(folder)
    return folder


def test_half_types_stay_what_they_are(tokenizer: Any, tmp_path: Path) -> None:
    model = cases.model("qwen2").to(torch.bfloat16)
    saved = stepped(model, [{"params": [*model.parameters()]}])
    source = fsdp_folder(model, tokenizer, tmp_path / "source", saved)
    model.config.save_pretrained(source)
    convert(source, tmp_path / "step")
    found = load_checkpoint(tmp_path / "step")
    assert found.stored_dtypes == ("bfloat16",)
    assert found.optimizer is not None
    assert found.optimizer.half_types == ("bfloat16",)
    assert_same(found, load_checkpoint(source))


def test_a_base_that_is_nowhere_else_is_written_too(tokenizer: Any, tmp_path: Path) -> None:
    base = cases.model(seed=1)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = cases.adapted(load_model(tmp_path / "base", dtype=torch.float32)[0], task_type="CAUSAL_LM")
    with torch.no_grad():
        model.get_parameter("base_model.model.model.norm.weight").fill_(3.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    source = fsdp_folder(model, tokenizer, tmp_path / "source", stepped(model, [{"params": trained}]))
    model.peft_config["default"].save_pretrained(source)
    done = convert(source, tmp_path / "step")
    assert any("stands in base/" in clause for clause in done.lost)
    shutil.rmtree(tmp_path / "base")
    found = load_checkpoint(tmp_path / "step")
    assert torch.equal(
        found.model.get_parameter("base_model.model.model.norm.weight"), torch.full((16,), 3.0)
    )


def test_what_deepspeed_alone_knows_comes_along(tmp_path: Path) -> None:
    plain, split = deepspeed_layout.folders(cases.model(), tmp_path, stage=3, world=2, clip=0.25)
    convert(split, tmp_path / "step")
    assert read_settings(tmp_path / "step").max_grad_norm == read_settings(split).max_grad_norm == 0.25
    assert read_settings(plain).max_grad_norm != 0.25
    assert_same(load_checkpoint(tmp_path / "step"), load_checkpoint(plain))
