"""Run folders: atomic files, refusal to overwrite, resuming, bookkeeping that survives kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stepscope import runs
from stepscope.errors import RunFolderError, mendable_line
from stepscope.results.summary import Summary
from stepscope.runs import RunFolder
from stepscope.stats import Estimate

CONFIG = {"checkpoint": "c", "probe": {"seed": 1}, "stages": ["a"]}


def open_run(path, config=CONFIG, **kwargs):
    return RunFolder.open(path, config, verb="measure", **{"ignore": ("stages",), **kwargs})


def finish(run, name, *files, **kwargs):
    with run.stage(name, files, **kwargs):
        for file in files:
            runs.write_text(run.file(file), name)


def test_new_run_records_configuration_and_provenance(tmp_path):
    run = open_run(tmp_path / "a/b", extra={"seeds": {"probe": 1}, "checkpoint_digest": "sha256:x"})
    assert run.config() == CONFIG
    provenance = run.provenance()
    assert provenance["versions"]["stepscope"]
    assert provenance["versions"]["torch"]
    assert provenance["checkpoint_digest"] == "sha256:x"
    assert provenance["seeds"] == {"probe": 1}
    assert provenance["python"].startswith("3.")
    assert provenance["started"].endswith("+00:00")
    assert provenance["command"].startswith("stepscope")
    assert provenance["stages"] == {}


def test_provenance_imports_no_torch():
    code = "import sys, stepscope.runs as r; r.environment(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_folder_with_a_run_is_refused_and_left_alone(tmp_path):
    run = open_run(tmp_path / "r")
    finish(run, "a", "a.json")
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    with pytest.raises(RunFolderError, match=r"already holds a run \(finished stages: a\).*--resume"):
        open_run(tmp_path / "r")
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before


def test_resuming_needs_the_same_configuration(tmp_path):
    run = open_run(tmp_path / "r")
    finish(run, "a", "a.json")
    assert open_run(tmp_path / "r", {**CONFIG, "stages": ["b"]}, resume=True).is_done("a")
    with pytest.raises(RunFolderError, match=r"probe\.seed \(1 there, 2 here\)"):
        open_run(tmp_path / "r", {**CONFIG, "probe": {"seed": 2}}, resume=True)
    with pytest.raises(RunFolderError, match="already holds a run of `stepscope measure`"):
        RunFolder.open(tmp_path / "r", CONFIG, verb="train", resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_folders_of_others_are_refused(tmp_path, resume):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty"):
        open_run(tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RunFolderError, match="is a file"):
        open_run(tmp_path / "notes.txt", resume=resume)


def test_a_stage_is_done_only_while_its_files_are_whole(tmp_path):
    run = open_run(tmp_path / "r")
    assert not run.is_done("a")
    finish(run, "a", "x.json", "y.json")
    assert run.is_done("a")
    run.file("y.json").write_text("cut")
    assert not run.is_done("a")
    finish(run, "a", "x.json", "y.json")
    run.file("x.json").unlink()
    assert not run.is_done("a")


def test_a_failed_stage_leaves_nothing_and_is_not_done(tmp_path):
    run = open_run(tmp_path / "r")
    finish(run, "a", "a.json")
    with pytest.raises(ZeroDivisionError):
        break_off(run, "b", "b.json", "c.json")
    assert not run.is_done("b")
    assert run.is_done("a")
    assert not run.file("b.json").exists()
    with pytest.raises(RunFolderError, match=r"left out c\.json"):
        finish_incomplete(run)


def break_off(run, name, *files):
    with run.stage(name, files):
        runs.write_text(run.file(files[0]), name)
        run.file("next.json.partial").write_text("half")
        raise ZeroDivisionError


def finish_incomplete(run):
    with run.stage("b", ["b.json", "c.json"]):
        runs.write_text(run.file("b.json"), "b")


def test_repeating_a_stage_invalidates_what_rests_on_it(tmp_path):
    run = open_run(tmp_path / "r")
    finish(run, "a", "a.json")
    finish(run, "b", "b.json")
    finish(run, "other", "o.json")
    finish(run, "a", "a.json", invalidates=["b"])
    assert run.is_done("a")
    assert not run.is_done("b")
    assert run.is_done("other")


def test_a_failure_before_anything_was_finished_leaves_no_folder(tmp_path):
    run = open_run(tmp_path / "r")
    with pytest.raises(ZeroDivisionError):
        break_off(run, "a", "a.json")
    run.clean_up()
    assert not (tmp_path / "r").exists()
    open_run(tmp_path / "r")


def test_cleaning_up_keeps_finished_work(tmp_path):
    run = open_run(tmp_path / "r")
    finish(run, "a", "a.json")
    run.file("b.json.partial").write_text("half")
    run.clean_up()
    assert sorted(p.name for p in run.path.iterdir()) == ["a.json", "config.yaml", "provenance.json"]
    assert run.is_done("a")


def test_kill_minus_nine_between_any_two_writes_loses_no_finished_stage(tmp_path):
    """A process finishes stages 0, 1, 2... and is killed at a random moment; resuming knows exactly which."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from stepscope import runs
        run = runs.RunFolder.open(Path(sys.argv[1]), {"x": 1}, verb="measure", resume=True)
        for i in range(10000):
            if run.is_done(str(i)):
                continue
            with run.stage(str(i), [f"{i}.txt"]):
                runs.write_text(run.file(f"{i}.txt"), str(i) * 1000)
            print(i, flush=True)
        """
    )
    folder = tmp_path / "r"
    generator = np.random.default_rng(0)
    done: list[int] = []
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(int(generator.integers(1, 30))):
                done.append(int(process.stdout.readline()))
            os.kill(process.pid, signal.SIGKILL)
            done += [int(line) for line in process.stdout.read().split()]
    run = RunFolder(folder)
    recorded = sorted(int(name) for name in run.provenance()["stages"])
    assert done == sorted(set(done)), "a finished stage was repeated"
    assert set(done) <= set(recorded)
    assert len(recorded) - len(done) <= 4, "at most one stage per kill is recorded but not announced"
    assert all(run.is_done(str(i)) for i in recorded)


def test_a_run_killed_before_it_left_anything_does_not_block(tmp_path):
    open_run(tmp_path / "r")
    (tmp_path / "r/update.parquet.partial").write_text("half")
    other = {**CONFIG, "checkpoint": "d"}
    assert open_run(tmp_path / "r", other).config() == other


def test_json_is_strict(tmp_path):
    path = tmp_path / "x.json"
    runs.write_json(
        path,
        {"a": float("nan"), "b": np.float64(0.1), "c": np.arange(2), "d": (np.inf, None), "e": Path("p")},
    )
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": 0.1, "c": [0, 1], "d": [None, None], "e": "p",
    }  # fmt: skip
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": object()})
    assert runs.read_json(path)["b"] == 0.1


def test_unreadable_files_say_so(tmp_path):
    with pytest.raises(RunFolderError, match="no such file"):
        runs.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read as JSON"):
        runs.read_json(tmp_path / "x.json")
    with pytest.raises(RunFolderError, match=r"is .* a run folder"):
        RunFolder(tmp_path).config()
    (tmp_path / "provenance.json").write_text("[]")
    with pytest.raises(RunFolderError, match="not the provenance"):
        RunFolder(tmp_path).provenance()


def test_tables(tmp_path):
    runs.write_table(tmp_path / "t.parquet", {"a": np.arange(3), "b": ["x", "y", None]})
    assert pq.read_table(tmp_path / "t.parquet").to_pydict() == {"a": [0, 1, 2], "b": ["x", "y", None]}
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_differing_keys_names_paths_and_both_values():
    a = {"x": 1, "s": {"y": 2, "z": 3}}
    assert runs.differing_keys(a, {"x": 1, "s": {"y": 4, "z": 3}, "w": 5}) == [
        "s.y (2 there, 4 here)",
        "w (None there, 5 here)",
    ]
    assert runs.differing_keys(a, a) == []


def test_a_file_that_changed_is_refused_by_whatever_reads_it(tmp_path):
    run = open_run(tmp_path / "run")
    with run.stage("numbers", ["n.json", "t.parquet", "own.json"]):
        runs.write_json(run.file("n.json"), {"a": {"b": 1.5}})
        runs.write_json(run.file("own.json"), {"a": 1})
        runs.write_table(run.file("t.parquet"), {"x": [1.0, 2.0]})
    assert runs.read_json(run.file("n.json")) == {"a": {"b": 1.5}}
    assert runs.read_table(run.file("t.parquet"))["x"].to_pylist() == [1.0, 2.0]
    run.file("n.json").write_text(run.file("n.json").read_text().replace("1.5", "1.6"))
    with pytest.raises(RunFolderError, match=r"n\.json: damaged \(its SHA-256.*run the stage that writes it"):
        runs.read_json(run.file("n.json"))
    runs.write_table(run.file("t.parquet"), {"x": [1.0, 2.5]})
    with pytest.raises(RunFolderError, match=r"t\.parquet: damaged"):
        runs.read_table(run.file("t.parquet"))
    with run.stage("numbers", ["n.json", "t.parquet"]):
        runs.write_json(run.file("n.json"), {"a": 2})
        runs.write_table(run.file("t.parquet"), {"x": [3.0]})
    assert runs.read_json(run.file("n.json")) == {"a": 2}


def test_files_that_others_may_write_are_not_sealed(tmp_path):
    run = open_run(tmp_path / "run")
    with run.stage("open", ["n.json"], sealed=False):
        runs.write_json(run.file("n.json"), {"a": 1})
    runs.write_json(run.file("n.json"), {"a": 2})
    assert runs.read_json(run.file("n.json")) == {"a": 2}


def summary(value: float) -> Summary:
    return Summary({"a": Estimate(value, 0.0, 2, "1", "")})


def test_a_sealed_file_is_added_to_and_survives_a_kill_between_record_and_file(tmp_path, monkeypatch):
    run = open_run(tmp_path / "run")
    for count in (1, 2):
        run.write_sealed("s.json", summary(count))
        assert runs.read_record(Summary, run.file("s.json")) == summary(count)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken_replace(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            run.write_sealed("s.json", summary(3))
    assert runs.read_record(Summary, run.file("s.json")) == summary(2)
    run.write_sealed("s.json", summary(4))
    assert runs.read_record(Summary, run.file("s.json")) == summary(4)
    run.file("s.json").write_text('{"a": 5}')
    with pytest.raises(RunFolderError, match=r"s\.json: damaged"):
        runs.read_json(run.file("s.json"))


def broken_replace(replace):
    """Path.replace that dies when it would put ``s.json`` in its place."""

    def dying(self, target):
        if Path(target).name == "s.json":
            raise KeyboardInterrupt
        return replace(self, target)

    return dying


def test_a_key_that_is_not_there_names_the_file(tmp_path):
    path = tmp_path / "n.json"
    path.write_text('{"a": [{"b": 1}]}')
    content = runs.read_json(path)
    assert content["a"][0].get("c") is None
    with pytest.raises(RunFolderError, match=r"n\.json: damaged \(no 'c' where it is expected; got b\)"):
        content["a"][0]["c"]
    path.write_text("[" * 100000)
    with pytest.raises(RunFolderError, match=r"n\.json: cannot be read as JSON"):
        runs.read_json(path)


@pytest.mark.parametrize(
    "change",
    [
        {"stages": []},
        {"stages": {"a": 1}},
        {"stages": {"a": {"files": {}}}},
        {"wall_seconds": None},
        {"stages": {"a": {"seconds": 1}}},
    ],
)
def test_provenance_of_another_shape_is_one_line(tmp_path, change):
    run = open_run(tmp_path / "run")
    runs.write_json(run.file("provenance.json"), {**run.provenance(), **change})
    with pytest.raises(RunFolderError, match="not the provenance of a run"):
        run.is_done("a")


def test_a_folder_that_goes_while_a_stage_works_is_no_bug(tmp_path):
    run = RunFolder.open(tmp_path / "run", {"a": 1}, verb="measure")
    stage = run.stage("step", ["step.json"])
    stage.__enter__()
    shutil.rmtree(run.path)
    with pytest.raises((RunFolderError, OSError)) as gone:
        stage.__exit__(None, None, None)
    assert mendable_line(gone.value)
    run.clean_up()


@pytest.mark.parametrize("text", ["a: " + "9" * 5000, "[" * 3000, "a: &x [*x]", "1: 2", "\0"])
def test_a_configuration_that_is_none_is_an_error_of_the_folder(tmp_path, text):
    run = RunFolder.open(tmp_path / "run", {"a": 1}, verb="measure")
    run.file("config.yaml").write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        run.config()
