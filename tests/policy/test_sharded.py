"""Checkpoints that torch and accelerate wrote with 2 and 3 processes: the step is that of plain files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import cases
from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.formats.distributed.metadata import Span
from stepscope.policy.checkpoint.formats.registry import format_of
from stepscope.policy.checkpoint.load import checkpoint_digest, load_checkpoint
from stepscope.policy.state import Policy

READ = (
    "full-fsdp1-full",
    "full-fsdp1-sharded",
    "full-fsdp2-full",
    "full-fsdp2-sharded",
    "full-prime-rl",
    "full-nemo-rl",
    "full-flat",
    "lora-fsdp1-full",
    "lora-fsdp2-full",
    "lora-fsdp2-sharded",
)


@pytest.fixture(scope="module")
def plain_steps(written: Path) -> dict[str, tuple[Policy, Step]]:
    """What the plain layout of each kind of model gives, on a batch of its own."""
    policies = {
        kind: load_checkpoint(written / f"plain-{kind}", precision="float64") for kind in ("full", "lora")
    }
    return {kind: (policy, cases.step(policy)) for kind, policy in policies.items()}


@pytest.mark.parametrize("layout", READ)
def test_the_step_is_that_of_the_plain_layout(
    written: Path, plain_steps: dict[str, tuple[Policy, Step]], layout: str
) -> None:
    plain, expected = plain_steps[layout.partition("-")[0]]
    found = load_checkpoint(written / layout, precision="float64")
    assert plain.optimizer is not None
    assert found.optimizer is not None
    assert found.step == plain.step == 3
    assert found.stored_dtypes == ("float32",)
    parameters = dict(found.model.named_parameters())
    for name, value in plain.model.named_parameters():
        assert torch.equal(parameters[name], value), name
    assert set(found.parameters) == set(plain.parameters)
    for key, tensors in plain.optimizer.tensors().items():
        assert set(found.optimizer.tensors()[key]) == set(tensors)
        for name, value in tensors.items():
            assert torch.equal(found.optimizer.tensors()[key][name], value), (key, name)
    assert found.optimizer.steps == plain.optimizer.steps
    groups = [
        {(frozenset(g.names), g.lr, g.weight_decay, g.betas, g.eps) for g in policy.optimizer.groups}  # type: ignore[union-attr,attr-defined]
        for policy in (plain, found)
    ]
    assert groups[0] == groups[1]
    step = reconstruct_step(found, expected.update)
    for name, direction in expected.direction.items():
        torch.testing.assert_close(step.direction[name], direction, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("full-fsdp2-full", ["FSDP (full state)", "pytorch_model_fsdp.bin (float32)", "optimizer.bin"]),
        ("full-prime-rl", ["written by N processes", "app.optimizers in trainer", "tensors in trainer"]),
        ("lora-fsdp2-sharded", ["written by N processes", "optimizer in optimizer_0", "adapter_config.json"]),
    ],
)
def test_check_names_format_and_processes(written: Path, layout: str, said: list[str]) -> None:
    found = [f for f in inspect_checkpoint(written / layout) if f.what.startswith("layout of ")]
    assert len(found) == 1
    assert found[0].level == "ok"
    for words in said:
        assert words.replace("N", written.name) in found[0].what


def test_what_cannot_be_read_says_what_to_do(written: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"of {written.name} processes, which is not read; resume it with accelerate"
    ):
        load_checkpoint(written / "full-fsdp2-ranks")
    with pytest.raises(CheckpointError, match=r"none of its folders with \.metadata has the weights"):
        load_checkpoint(written / "lora-fsdp1-sharded")  # PEFT 0.21 hands no weights over under FSDP 1


def test_a_part_that_is_missing_is_named(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "full-nemo-rl", tmp_path / "step"))
    before = checkpoint_digest(folder)
    (folder / "optimizer" / "__1_0.distcp").unlink()
    assert checkpoint_digest(folder) != before
    findings = inspect_checkpoint(folder)
    (layout,) = [f for f in findings if f.what.startswith("layout of ")]
    assert layout.level == "warn"
    assert "not there: optimizer/__1_0.distcp (a process's part)" in layout.what
    assert any(
        f.level == "fail" and "__1_0.distcp: a file of the checkpoint is missing" in f.what for f in findings
    )
    load_checkpoint(folder, require_optimizer=False)


def test_config_and_settings_may_be_those_of_the_run(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "full-fsdp2-sharded", tmp_path / "run" / "checkpoint-3"))
    for file in {*folder.glob("*.json"), *folder.glob("token*")}:
        if file.name != "trainer_state.json":
            file.rename(folder.parent / file.name)
    policy = load_checkpoint(folder)
    assert policy.settings.max_response_tokens == 6
    assert policy.step == 3
    (folder.parent / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"neither config\.json nor adapter_config\.json to say of which"
    ):
        load_checkpoint(folder)


def test_only_what_is_asked_for_is_read(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Span] = []
    original = Span.read
    monkeypatch.setattr(Span, "read", lambda span: read.append(span) or original(span))
    format_of(written / "full-prime-rl", "optimizer").optimizer(written / "full-prime-rl")
    assert not read
    load_checkpoint(written / "full-prime-rl", require_optimizer=False)
    sizes = sum(f.stat().st_size for f in (written / "full-prime-rl").rglob("*.distcp"))
    assert len(set(read)) == len(read)
    assert sum(span.length for span in read) < 0.6 * sizes


def test_weights_that_somebody_put_beside_are_not_taken_for_those_of_the_run(
    written: Path, tmp_path: Path
) -> None:
    for layout in ("full-fsdp2-sharded", "full-fsdp2-full"):
        folder = Path(shutil.copytree(written / layout, tmp_path / layout))
        cases.model("qwen2", seed=7).save_pretrained(folder)
        expected, found = load_checkpoint(written / "plain-full"), load_checkpoint(folder)
        for name, value in expected.model.named_parameters():
            assert torch.equal(found.model.get_parameter(name), value)


def test_a_run_is_not_its_checkpoint(written: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(written / "plain-full", run)
    (run / "optimizer.pt").unlink()
    shutil.copytree(written / "full-fsdp2-sharded", run / "checkpoint-3")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: no optimizer state"):
        load_checkpoint(run)
    (run / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a run with 1 checkpoints, .* such as .*checkpoint-3"):
        load_checkpoint(run)
