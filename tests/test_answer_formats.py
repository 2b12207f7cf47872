"""A policy trained to box its answers: recorded with the checkpoint, read unasked, found by check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepscope import cli
from stepscope.pipeline.check.answers import _Count, verdict
from stepscope.policy.checkpoint.load import read_settings
from stepscope.tasks.formats.response import TAGS, load_answer_format

BOXED = load_answer_format("boxed")
LAST = load_answer_format("last_number")


@pytest.fixture(scope="module")
def boxed(small_training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stepscope.config import TrainConfig, load_config
    from stepscope.pipeline import run_train

    out = tmp_path_factory.mktemp("boxed") / "run"
    short = ["answer_format=boxed", "rl.steps=1", "rl.save_every=1", "sft.epochs=40"]
    run_train(load_config(TrainConfig, small_training, short, {"out": str(out)}))
    return out / "checkpoints" / "step-1"


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_checkpoint_says_where_its_answers_stand(boxed: Path, tmp_path: Path) -> None:
    assert read_settings(boxed).answer_format == "boxed"
    out = tmp_path / "eval.parquet"
    shown("eval", boxed, "--out", out, "num_prompts=8", "samples_per_prompt=2", "ks=[1]")
    import pyarrow.parquet as pq

    row = pq.read_table(out).to_pylist()[0]
    assert row["format_rate"] > 0.8
    told = tmp_path / "told.parquet"
    shown(
        "eval",
        boxed,
        "--out",
        told,
        "num_prompts=8",
        "samples_per_prompt=2",
        "ks=[1]",
        "loss.answer_format=tags",
    )
    assert pq.read_table(told).to_pylist()[0]["format_rate"] == 0


def test_check_tries_the_formats(boxed: Path, tmp_path: Path) -> None:
    text = shown("check", boxed)
    assert "tags 0 (0 right)" in text
    assert "the format is boxed" in text
    assert "loss.answer_format" not in text
    foreign = shutil.copytree(boxed, tmp_path / "foreign")
    settings = json.loads((foreign / "stepscope.json").read_text())
    (foreign / "stepscope.json").write_text(json.dumps(settings | {"answer_format": "tags", "task": ""}))
    assert "answers found" not in shown("check", foreign)
    task = "arithmetic:terms=2,digits=2,ops=+"
    text = shown("check", foreign, "--task", task)
    assert "use loss.answer_format=boxed" in text
    assert f"Next: stepscope explain {foreign} --task {task} loss.answer_format=boxed" in text
    before, _, after = shown("check", foreign, "--task", task).partition("measure would take")
    assert text.startswith(before)
    assert "a prompt, as the policy gets it" in before
    assert after.count("loss.answer_format=boxed") == 2


@pytest.mark.parametrize(
    ("counts", "level", "cure"),
    [
        ([(TAGS, 16, 3), (BOXED, 0, 0), (LAST, 16, 3)], "ok", ""),
        ([(TAGS, 0, 0), (BOXED, 15, 9), (LAST, 16, 9)], "warn", "loss.answer_format=boxed"),
        ([(TAGS, 0, 0), (BOXED, 0, 0), (LAST, 16, 9)], "warn", "loss.answer_format=last_number"),
        ([(TAGS, 0, 0), (BOXED, 0, 0), (LAST, 16, 0)], "warn", "look at the prompts"),
        ([(TAGS, 9, 5), (BOXED, 16, 2), (LAST, 16, 9)], "ok", ""),
    ],
)
def test_verdict(counts, level, cure) -> None:
    finding, other = verdict([_Count(*c) for c in counts], TAGS, 16, 2, 512)
    assert other == cure.partition("=")[2]
    assert finding.level == level
    assert cure in finding.cure
    assert "2 responses are cut at 512 tokens" in finding.what
