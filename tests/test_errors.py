"""Bad input, end to end: exit code 2, one clear line, and nothing half-written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stepscope import cli
from stepscope.results import Rollouts

SMALL = ["update.num_prompts=4", "update.group_size=4", "probe.num_prompts=8", "--stages", "rollouts"]


def refused(*args: object, out: Path | None = None) -> str:
    """The one line of a command that ends with exit code 2; ``out`` must be as it was."""
    before = _contents(out)
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert result.stderr.strip().splitlines()[-1] == lines[0]
    assert "Traceback" not in result.output
    assert _contents(out) == before
    return lines[0]


def _contents(folder: Path | None) -> dict[str, bytes] | None:
    if folder is None or not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rollouts_of(checkpoint: Path, out: Path) -> Path:
    """A run folder whose batches are sampled."""
    result = CliRunner().invoke(cli.app, ["measure", str(checkpoint), "--out", str(out), *SMALL])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "step-4"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_no_such_checkpoint(tmp_path, out):
    line = refused("measure", tmp_path / "none", "--task", "arithmetic", "--out", out, out=out)
    assert "no such checkpoint" in line
    assert str(tmp_path / "none") in line


def test_folder_that_is_no_checkpoint(tmp_path, out):
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in refused("measure", tmp_path / "empty", "--out", out, out=out)


def test_no_optimizer_state(copy, out):
    (copy / "optimizer.pt").unlink()
    assert "no optimizer state" in refused("measure", copy, "--out", out, *SMALL, out=out)


def test_optimizer_state_of_another_model(copy, out):
    state = torch.load(copy / "optimizer.pt", weights_only=True)
    for entry in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = torch.zeros(*entry[name].shape, 3)
    torch.save(state, copy / "optimizer.pt")
    line = refused("measure", copy, "--out", out, *SMALL, out=out)
    assert "optimizer.pt" in line


def test_truncated_weights(copy, out):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(copy) in refused("measure", copy, "--out", out, *SMALL, out=out)


def test_unknown_task(checkpoint, out):
    line = refused("measure", checkpoint, "--task", "aritmetic", "--out", out, *SMALL, out=out)
    assert "aritmetic" in line
    assert "arithmetic" in line


def test_misspelt_settings_are_all_named(checkpoint, out):
    line = refused("measure", checkpoint, "--out", out, "probe.num_promts=3", "presicion=float64", out=out)
    assert "probe.num_promts: unknown key (did you mean probe.num_prompts?)" in line
    assert "presicion: unknown key (did you mean precision?)" in line


def test_folder_that_holds_a_run(checkpoint, out):
    rollouts_of(checkpoint, out)
    line = refused("measure", checkpoint, "--out", out, *SMALL[:3], out=out)
    assert "already holds a run" in line
    assert "--resume" in line
    line = refused("measure", checkpoint, "--out", out, *SMALL, "probe.seed=9", out=out)
    assert "probe.seed (1 there, 9 here)" in line


def test_folder_that_holds_something_else(checkpoint, out):
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert "not empty" in refused("measure", checkpoint, "--out", out, *SMALL, out=out)


def test_zero_variance_batch(checkpoint, out):
    """Sums of four long terms: never right after this training, and no reward for the format."""
    task = "arithmetic:terms=4,digits=3,ops=+"
    reward = "loss.format_weight=0.0"
    line = refused("measure", checkpoint, "--task", task, "--out", out, reward, *SMALL)
    assert "zero variance" in line
    assert "larger groups" in line
    assert "no answer found where tags looks" in line
    assert [file.name for file in out.iterdir()] == ["example.json"], "and no run"


def test_probe_and_update_sharing_samples(checkpoint, out, tmp_path):
    given = CliRunner().invoke(
        cli.app, ["measure", str(checkpoint), "--out", str(tmp_path / "first"), *SMALL]
    )
    assert given.exit_code == 0, given.output
    update = tmp_path / "first" / "update.parquet"
    twin = tmp_path / "twin.parquet"
    shutil.copy(update, twin)
    shutil.copy(update.with_name("update_tokens.parquet"), tmp_path / "twin_tokens.parquet")
    line = refused(
        "measure",
        checkpoint,
        "--out",
        out,
        f"update.file={update}",
        f"probe.file={twin}",
        *SMALL[-2:],
        out=out,
    )
    assert "update and probe batch share prompts" in line
    same = refused(
        "measure", checkpoint, "--out", out, f"update.file={update}", f"probe.file={update}", out=out
    )
    assert "same file" in same


def test_batch_of_another_policy(checkpoint, out, tmp_path):
    given = CliRunner().invoke(
        cli.app, ["measure", str(checkpoint), "--out", str(tmp_path / "first"), *SMALL]
    )
    assert given.exit_code == 0, given.output
    first = tmp_path / "first"
    update = Rollouts.from_parquet(first / "update.parquet", first / "update_tokens.parquet")
    foreign = replace(update, logprobs=tuple(v - 0.1 for v in update.logprobs))
    names = [["t"] * n for n in update.num_tokens]
    foreign.to_parquet(tmp_path / "f.parquet", tmp_path / "f_tokens.parquet", tokens=names)
    line = refused(
        "measure", checkpoint, "--out", out, f"update.file={tmp_path / 'f.parquet'}", *SMALL, out=out
    )
    assert "another policy" in line
    hot = replace(update, temperature=0.5)
    hot.to_parquet(tmp_path / "h.parquet", tmp_path / "h_tokens.parquet", tokens=names)
    line = refused(
        "measure", checkpoint, "--out", out, f"update.file={tmp_path / 'h.parquet'}", *SMALL, out=out
    )
    assert "temperature 0.5" in line


def test_more_prompts_than_the_task_has(checkpoint, out):
    line = refused("measure", checkpoint, "--out", out, *SMALL, "probe.num_prompts=10000000", out=out)
    assert "not enough" in line


def test_stage_without_what_it_needs(checkpoint, out):
    line = refused("measure", checkpoint, "--out", out, "--stages", "change", out=out)
    assert "needs what rollouts and step leaves" in line


def test_divergence_of_a_full_model_from_nothing(checkpoint, out):
    line = refused("measure", checkpoint, "--out", out, *SMALL, "--quantity", "kl", out=out)
    assert f"reference={checkpoint.parent / 'step-0'}" in line


def test_checkpoint_that_changed_meanwhile(copy, out):
    rollouts_of(copy, out)
    state = torch.load(copy / "optimizer.pt", weights_only=True)
    state["param_groups"][0]["lr"] *= 2
    torch.save(state, copy / "optimizer.pt")
    line = refused("measure", copy, "--out", out, *SMALL[:3], "--stages", "rollouts,step", out=out)
    assert "optimizer.pt is not what was written" in line
    (copy / "manifest.json").unlink()
    line = refused("measure", copy, "--out", out, *SMALL[:3], "--stages", "rollouts,step", out=out)
    assert "has changed since" in line


def test_training_into_a_folder_that_holds_one(small_training, trained_run):
    assert "already holds a run" in refused("train", small_training, "--out", trained_run, out=trained_run)


def test_evaluating_twice_into_one_file(checkpoint, tmp_path):
    (tmp_path / "e.parquet").write_bytes(b"kept")
    line = refused("eval", checkpoint, "--out", tmp_path / "e.parquet", out=tmp_path)
    assert "exists already" in line


def test_reporting_on_nothing(tmp_path):
    assert str(tmp_path) in refused("report", tmp_path, out=tmp_path)


def test_checking_what_is_not_there(tmp_path):
    assert "no such" in refused("check", tmp_path / "none")


def test_checking_a_checkpoint_without_optimizer(copy):
    (copy / "optimizer.pt").unlink()
    assert "not fit" in refused("check", copy, out=copy)


def test_checking_a_wrong_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("rl: {stepz: 1}\nsft: {epoch: 1}\n")
    line = refused("check", tmp_path / "c.yaml", out=tmp_path)
    assert "rl.stepz" in line
    assert "sft.epoch:" in line
