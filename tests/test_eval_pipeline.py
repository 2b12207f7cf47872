"""``stepscope eval`` end to end on a real small training: files, page, resuming, profiles."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import stepscope as ss
from stepscope import cli
from stepscope.errors import RunFolderError
from stepscope.evaluation import fit_entropy_law, read_eval
from stepscope.pipeline.export import exported
from stepscope.policy.loss.settings import SETTINGS_FILE
from stepscope.results.entropy_law import EntropyLaw
from stepscope.results.evaluation import EvaluationChanges
from stepscope.runs import locked, read_json
from tracked import events_of, read, texts_of

SETTINGS = ["num_prompts=6", "samples_per_prompt=4", "ks=[1,4]"]


def run_eval(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["eval", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr


def tables(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".parquet", ".json", ".html")}


@pytest.fixture(scope="module")
def evaluated(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole evaluation, never changed by a test."""
    folder = tmp_path_factory.mktemp("evaluated")
    tracked = "report_to=[tensorboard]"
    run_eval(trained_run, "--out", folder / "eval.parquet", *SETTINGS, "temperatures=[0.5,1.0]", tracked)
    return folder


def test_files(evaluated: Path) -> None:
    assert set(tables(evaluated)) == {
        "eval.parquet", "eval_prompts.parquet", "eval_profiles.parquet", "eval_profiles_prompts.parquet",
        "eval_changes.json", "eval.html",
    }  # fmt: skip
    rows = read_eval(evaluated / "eval.parquet")
    assert [row.step for row in rows] == [0, 2, 4]
    assert {row.temperature for row in rows} == {1.0}
    assert all(len(row.checkpoint_digest) == 64 for row in rows)
    profiles = pq.read_table(evaluated / "eval_profiles.parquet")
    assert profiles["temperature"].to_pylist() == [0.5, 1.0] * 3
    changes = read_json(evaluated / "eval_changes.json")["changes"]
    assert [(c["before"]["step"], c["after"]["step"]) for c in changes] == [(0, 2), (2, 4), (0, 4)]
    gain = rows[-1].pass_at_1 - rows[0].pass_at_1
    assert changes[-1]["differences"]["pass_at_1"]["value"] == pytest.approx(gain, abs=1e-12)
    assert np.sum(changes[0]["transitions"]["counts"]) == 6
    page = (evaluated / "eval.html").read_text()
    for figure in (
        "eval-pass-0",
        "eval-length",
        "eval-surprisal",
        "eval-transitions",
        "eval-profile-temperature",
    ):
        assert f"fig-evaluation-{figure}" in page


def test_figures_agree_with_the_stored_responses(evaluated: Path) -> None:
    for row in read_eval(evaluated / "eval.parquet"):
        part = pq.read_table(evaluated / "eval_parts" / f"{row.checkpoint}_responses.parquet").to_pylist()
        assert len(part) == 24
        assert row.pass_at_1 == pytest.approx(np.mean([r["correct"] for r in part]), abs=1e-12)
        assert row.mean_length == pytest.approx(np.mean([r["num_tokens"] for r in part]))
        assert row.truncated_rate == pytest.approx(np.mean([r["truncated"] for r in part]))


def test_tensorboard_shows_what_the_table_says(evaluated: Path, trained_run: Path) -> None:
    """And the same after a call that finds nothing to do, by default where the folder is there."""
    rows = read_eval(evaluated / "eval.parquet")
    for _ in range(2):
        events = events_of(evaluated / "tensorboard" / "eval")
        for name in ("pass_at_1", "pass_at_4", "mean_length", "entropy_per_token", "surprisal_q90"):
            shown = [(e.step, e.value) for e in events.Scalars(f"stepscope/eval/{name}")]
            value = [row.estimates[name].value for row in rows]
            assert shown == [(row.step, pytest.approx(v)) for row, v in zip(rows, value, strict=True)]
        pages = texts_of(events, "stepscope/eval/responses")
        for event, row in zip(events.Histograms("stepscope/eval/token_entropy"), rows, strict=True):
            found = event.histogram_value
            assert (event.step, found.num) == (row.step, row.num_tokens)
            assert found.sum == pytest.approx(row.entropy_per_token * row.num_tokens, rel=1e-5)
            part = pq.read_table(evaluated / f"eval_parts/{row.checkpoint}_responses.parquet").to_pylist()
            assert all("".join(r["token"]) == r["response"] for r in part)
            assert read(html.escape(part[0]["prompt"])) in read(pages[row.step]).replace(
                "\N{RETURN SYMBOL}", ""
            )
        run_eval(
            trained_run, "--out", evaluated / "eval.parquet", *SETTINGS, "temperatures=[0.5,1.0]", "--resume"
        )


def test_an_evaluation_is_exported_with_its_tokens(evaluated: Path, tmp_path: Path) -> None:
    rows = read_eval(evaluated / "eval.parquet")
    for found, row in zip(exported(evaluated), rows, strict=True):
        assert (found.name, len(found.samples)) == (row.checkpoint, 24)
        assert found.figures["correct"]["accuracy"].value == row.pass_at_1
        entropy = sum(s.per_token["entropy"].sum() for s in found.samples)
        assert entropy == pytest.approx(row.entropy_per_token * row.num_tokens, rel=1e-5)
        assert -sum(s.logprobs.sum() for s in found.samples) == pytest.approx(
            row.surprisal * row.num_tokens, rel=1e-5
        )
    shutil.copytree(evaluated, tmp_path / "copy")
    file = tmp_path / "copy/eval_parts/step-0_responses.parquet"
    pq.write_table(pq.read_table(file).drop_columns("token"), file)
    with pytest.raises(RunFolderError, match="damaged"):
        next(exported(tmp_path / "copy"))


def test_an_evaluation_is_read_back_by_the_classes_that_wrote_it(evaluated: Path, tmp_path: Path) -> None:
    found = ss.load_evaluation(evaluated)
    assert [row.step for row in found.rows] == found.to_pandas()["step"].tolist() == [0, 2, 4]
    assert {row.temperature for row in found.profiles} == {0.5, 1.0}
    assert [(c.before.step, c.after.step) for c in found.changes] == [(0, 2), (2, 4), (0, 4)]
    assert found.law is None
    assert "<table" in found._repr_html_()
    assert found.plot().data
    record = EvaluationChanges(found.changes)
    assert record.to_json() == (evaluated / "eval_changes.json").read_text()
    law = fit_entropy_law([0.9, 0.6, 0.4, 0.2], [0.1, 0.3, 0.5, 0.6], 1e-4 * np.eye(8))
    law.write(tmp_path / "law.json")
    assert EntropyLaw.read(tmp_path / "law.json").to_json() == law.to_json()
    shutil.copytree(evaluated, tmp_path / "copy")
    pq.write_table(pq.read_table(tmp_path / "copy/eval.parquet"), tmp_path / "copy/eval.parquet")
    with pytest.raises(RunFolderError, match=r"eval\.parquet: damaged"):
        ss.load_evaluation(tmp_path / "copy/eval.parquet")


def test_a_killed_evaluation_goes_on(
    evaluated: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it samples: what is finished is not sampled again, and all files are the same."""
    from stepscope.pipeline import evaluate as verb

    sample, calls = verb.evaluate, []

    def stopped(policy, *args, **kwargs):
        calls.append((policy.step, kwargs["temperature"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(policy, *args, **kwargs)

    monkeypatch.setattr(verb, "evaluate", stopped)
    out = tmp_path / "eval.parquet"
    arguments = [trained_run, "--out", out, *SETTINGS, "temperatures=[0.5,1.0]"]
    run_eval(*arguments, code=130)
    assert not out.exists()
    assert "add --resume" in run_eval(*arguments, code=2)
    said = run_eval(*arguments, "--resume")
    assert calls == [(0, None), (0, 0.5), (2, None), (2, 0.5), (2, 0.5), (4, None), (4, 0.5)]
    assert said.count(" s\n") == 3
    ours, theirs = tables(tmp_path), tables(evaluated)
    assert set(ours) == set(theirs)
    for name in set(theirs) - {"eval.html"}:  # the page says where the table is
        assert ours[name] == theirs[name], name


def test_finished_evaluation_gives_the_same_bits_and_samples_nothing(
    evaluated: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(evaluated, tmp_path / "copy")
    out = tmp_path / "copy" / "eval.parquet"
    before = tables(out.parent)
    out.unlink()
    monkeypatch.setattr("stepscope.pipeline.evaluate.evaluate", lambda *a, **k: 1 / 0)
    arguments = [trained_run, "--out", out, *SETTINGS, "temperatures=[0.5,1.0]", "--resume"]
    run_eval(*arguments)
    after = tables(out.parent)
    assert {n: b for n, b in after.items() if n != "eval.html"} == {
        n: b for n, b in before.items() if n != "eval.html"
    }
    run_eval(trained_run, "--out", out, *SETTINGS, "--resume")
    assert "another configuration: num_prompts" in run_eval(*arguments, "num_prompts=7", code=2)


def test_two_evaluations_do_not_share_a_table(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [trained_run, "--out", tmp_path / "eval.parquet", *SETTINGS]
    with locked(tmp_path / "eval_parts"):
        assert "another process is at work" in run_eval(*arguments, code=2)
    assert not list(tmp_path.iterdir())


def test_a_changed_checkpoint_is_not_taken_for_the_old_one(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run / "checkpoints" / "step-2", run / "checkpoints" / "step-2")
    run_eval(run, *SETTINGS, "ks=[1]")
    weights = run / "checkpoints" / "step-2" / "model.safetensors"
    shutil.copy(trained_run / "checkpoints" / "step-4" / "model.safetensors", weights)
    assert "has changed since it was evaluated" in run_eval(run, *SETTINGS, "ks=[1]", "--resume", code=2)
    assert "exists already" in run_eval(run, *SETTINGS, "ks=[1]", code=2)
    shutil.rmtree(run / "eval_parts")
    assert "to go on from" in run_eval(run, *SETTINGS, "ks=[1]", "--resume", code=2)


def test_entropy_law_of_a_run_and_of_several(trained_run: Path, tmp_path: Path) -> None:
    """Four checkpoints make a law; two runs are compared in one figure."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(trained_run / "checkpoints", folder)
    shutil.copytree(folder / "step-2", folder / "step-6")
    run_eval(tmp_path / "run", *SETTINGS, "bootstrap=20")
    law = read_json(tmp_path / "run" / "entropy_law.json")
    rows = read_eval(tmp_path / "run" / "eval.parquet")
    assert law["entropy"] == pytest.approx([row.entropy_per_token for row in rows])
    assert law["entropy_stderr"] == pytest.approx([row.entropy_per_token_stderr for row in rows])
    assert law["performance"] == pytest.approx([row.pass_at_1 for row in rows])
    assert set(law["intervals"]) == {"a", "b", "ceiling"}
    assert "fig-evaluation-entropy-law" in (tmp_path / "run" / "eval.html").read_text()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    page = tmp_path / "laws.html"
    arguments = ["report", str(tmp_path / "run"), str(tmp_path / "other"), "--out", str(page)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "fig-comparison-entropy-law" in page.read_text()
    (tmp_path / "other" / "entropy_law.json").unlink()
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert "no entropy_law.json" in refused.output + refused.stderr


def test_a_task_that_evaluates_answers_is_run_only_for_who_names_it(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-4"
    shutil.copytree(checkpoint, folder)
    settings = read_json(folder / SETTINGS_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps({**settings, "task": "rg:polynomial_multiplication"}))
    few = ["--out", tmp_path / "eval.parquet", "num_prompts=2", "samples_per_prompt=2", "ks=[1]"]
    refused = run_eval(folder, *few, code=2)
    assert "name the task yourself: --task rg:polynomial_multiplication" in refused
    run_eval(folder, *few, "--task", "rg:polynomial_multiplication")
    assert read_eval(tmp_path / "eval.parquet")[0].task == "rg:polynomial_multiplication"
