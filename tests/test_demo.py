"""The demo end to end, with a training of seconds in place of minutes; resuming repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from stepscope.config import STAGES
from stepscope.errors import RunFolderError
from stepscope.pipeline import run_demo
from stepscope.runs import locked


@pytest.fixture(scope="module")
def overrides(small_training: Path) -> list[str]:
    training = yaml.safe_load(small_training.read_text())
    return [
        *(f"train.{key}={json.dumps(value)}" for key, value in training.items()),
        "eval.num_prompts=8",
        "measure.update.num_prompts=12",
        "measure.probe.num_prompts=16",
        "measure.second_order=false",
    ]


@pytest.fixture(scope="module")
def demo(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert run_demo(out, overrides) == out / "report.html"
    return out


def test_the_demo_leaves_what_the_design_promises(demo):
    assert [p.name for p in sorted((demo / "checkpoints").iterdir())] == ["step-0", "step-2", "step-4"]
    assert pq.read_table(demo / "eval.parquet")["step"].to_pylist() == [0, 2, 4]
    assert sorted(p.name for p in (demo / "measure").iterdir()) == ["step-2", "step-4"]
    for folder in (demo / "measure").iterdir():
        summary = json.loads((folder / "summary.json").read_text())
        assert {"change_true_per_token", "effective_rank", "noise_scale"} <= set(summary)
        assert (folder / "report.html").is_file()
    page = (demo / "report.html").read_text()
    assert "Step 2" in page
    assert "Step 4" in page


def test_calling_it_again_repeats_nothing(demo, overrides, capsys):
    files = [p for p in demo.rglob("*") if p.is_file() and p.name not in ("report.html",)]
    before = {p: p.stat().st_mtime_ns for p in files}
    run_demo(demo, overrides)
    assert {p: p.stat().st_mtime_ns for p in files} == before
    assert capsys.readouterr().err.count("done before") == 2 * len(STAGES)


def test_a_part_that_is_missing_is_made_again(demo, overrides):
    table = (demo / "eval.parquet").read_bytes()
    (demo / "eval.parquet").unlink()
    (demo / "measure" / "step-4" / "noise.json").unlink()
    weights = demo / "checkpoints" / "step-4" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run_demo(demo, overrides)
    assert (demo / "eval.parquet").read_bytes() == table
    assert (demo / "measure" / "step-4" / "noise.json").is_file()
    assert weights.stat().st_mtime_ns == before


def test_two_demos_do_not_share_a_folder(demo, overrides, monkeypatch):
    with locked(demo):
        with pytest.raises(RunFolderError, match="another process is at work in this folder"):
            run_demo(demo, overrides)
        monkeypatch.setenv("RANK", "1")
        assert run_demo(demo, overrides) == demo / "report.html"


def test_another_demo_in_the_folder_is_refused(demo, overrides):
    with pytest.raises(RunFolderError, match=r"eval\.num_prompts \(8 there, 9 here\)"):
        run_demo(demo, [*overrides, "eval.num_prompts=9"])
