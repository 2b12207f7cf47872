from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.reading.measurement import load_measurement
from stepscope.report import write_report
from stepscope.report.load import load_run, reads_artifacts
from stepscope.runs import RunFolder


def test_measure_folder_is_recognised(measure_folder: Path) -> None:
    run = load_run(measure_folder)
    assert run.training is None
    assert len(run.measurements) == 1
    assert "entropy_per_token" in run.measurements[0].summary


def test_run_folder_is_recognised_and_ordered_by_step(run_folder: Path) -> None:
    run = load_run(run_folder)
    assert [m.checkpoint_step for m in run.measurements] == [10, 40]
    assert run.training is not None
    assert [row["step"] for row in run.training.log] == list(range(1, 41))
    assert [rows.step.tolist() for rows in run.training.evaluations.values()] == [[0, 10, 20, 30, 40]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b'{"entropy_per_token": {"value": 1.0'),
        ("summary.json", b'{"entropy_per_token": 0.5}'),
        ("change.json", b"[1, 2]"),
        ("change.json", b'{"quantity": "entropy"}'),
        ("step.json", b"\xff\xfe not json"),
        ("update.parquet", b"PAR1 cut"),
        ("influence_tokens.parquet", b""),
        ("kernel.safetensors", b"\x00\x01"),
        ("kernel.json", b"null"),
        ("noise.json", b'{"sgd": {"prompts": {"value": 1, "stderr": "many"}}}'),
        ("config.yaml", b"a: [1, 2"),
        ("provenance.json", b"{"),
    ],
)
def test_damaged_artifact_is_one_line_that_names_it(measure_folder: Path, name: str, content: bytes) -> None:
    (measure_folder / name).write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        write_report(measure_folder)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert not list(measure_folder.glob("report.html*"))


def test_missing_column_is_named(measure_folder: Path) -> None:
    (measure_folder / "update_tokens.parquet").write_bytes((measure_folder / "update.parquet").read_bytes())
    with pytest.raises(RunFolderError, match=r"update_tokens\.parquet: column.*entropy missing"):
        write_report(measure_folder)


def test_damaged_trainer_state_is_named(run_folder: Path) -> None:
    (run_folder / "checkpoints/step-10/trainer_state.json").write_text(json.dumps({"log_history": 3}))
    with pytest.raises(RunFolderError, match=r"step-10/trainer_state\.json"):
        load_run(run_folder)


def test_neither_kind_of_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nothing to report"):
        load_run(tmp_path)
    with pytest.raises(RunFolderError, match="no such folder"):
        load_run(tmp_path / "absent")
    with pytest.raises(RunFolderError, match=r"no summary\.json"):
        load_measurement(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("change.json", lambda c: c.update(points=None)),
        ("change.json", lambda c: c["points"][0].update(lr="x")),
        ("change.json", lambda c: c.update(fit=7)),
        ("criteria.json", lambda c: c["rows"][0].pop("kendall")),
        ("criteria.json", lambda c: c["rows"][0].update(captured=[1])),
        ("kernel.json", lambda c: c["structure"].update(raw=[])),
        ("pareto.json", lambda c: c.update(points=[1])),
        ("summary.json", lambda c: c["entropy_per_token"].update(reliable="false")),
        ("provenance.json", lambda c: c.update(stages=3)),
    ],
)
def test_renamed_keys_and_values_of_another_kind_are_one_line(
    measure_folder: Path, name: str, change: Callable[[Any], object]
) -> None:
    content = json.loads((measure_folder / name).read_text())
    change(content)
    (measure_folder / name).write_text(json.dumps(content))
    with pytest.raises(RunFolderError) as caught:
        write_report(measure_folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failure_on_what_the_stages_wrote_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.open(tmp_path / "run", {}, verb="measure")
    with run.stage("change", ["change.json"]):
        runs.write_json(run.file("change.json"), {})

    @reads_artifacts
    def write(folder: Path) -> Path:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write(run.path)
    runs.write_json(run.file("noise.json"), {})
    with pytest.raises(RunFolderError, match=r"holds something else.*KeyError: 'a bug'.*noise\.json"):
        write(run.path)
