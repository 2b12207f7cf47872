"""A study: every cell once, whatever kills it; the same table bit for bit; figures against brute force."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import stepscope as ss
from stepscope.config import StudyConfig, build_config, load_config
from stepscope.errors import ConfigError, RunFolderError
from stepscope.pipeline import run_report, run_study
from stepscope.pipeline.study.run import study_cells
from stepscope.runs import locked


def study_config(trained_run: Path, out: Path, **changes) -> StudyConfig:
    data = {
        "checkpoints": [str(trained_run / "checkpoints" / f"step-{n}") for n in (2, 4)],
        "out": str(out),
        "repeats": 2,
        "measure": {
            "update": {"num_prompts": 4, "group_size": 4},
            "probe": {"num_prompts": 8},
            "lrs": [1e-5, 1e-4],
            "second_order": False,
            "batch_size": 64,
        },
        "settings": {"default": {}, "sharp": {"baseline": "none", "probe.num_prompts": 6}},
    }
    return build_config(StudyConfig, data | changes)


@pytest.fixture(scope="module")
def study(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    return run_study(study_config(trained_run, tmp_path_factory.mktemp("study") / "s"))


def test_a_study_is_read_back_by_the_classes_that_wrote_it(study, tmp_path):
    found = ss.load_study(study)
    assert found.report.to_json() == (study / "study.json").read_text()
    assert found.to_pandas().equals(pq.read_table(study / "study.parquet").to_pandas())
    assert found.to_pandas().shape[0] == len(found.rows) > len(found.report.changes)
    assert len(found.cells) == 8
    assert "<table" in found._repr_html_()
    assert found.plot().data
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    (copy / "study.json").write_text(
        (copy / "study.json").read_text().replace('"repeats": 2', '"repeats": 3')
    )
    with pytest.raises(RunFolderError, match=r"study\.json: damaged"):
        ss.load_study(copy)


def test_a_row_per_cell_series_and_learning_rate(study):
    table = pq.read_table(study / "study.parquet").to_pandas()
    # 2 checkpoints x 2 settings x 2 repeats; per token or sequence, on policy or fixed prefix; 3 rates
    assert len(table) == 8 * 4 * 3
    keys = ["checkpoint", "setting", "repeat", "quantity", "normalisation", "version", "lr"]
    assert not table.duplicated(keys).any()
    assert table.groupby("repeat")["probe_seed"].unique().explode().tolist() == [1, 1001]
    assert set(table["update_seed"]) == {0}


def test_settings_reach_their_cells(study, trained_run):
    cells = study_cells(study_config(trained_run, study))
    assert {c.config.probe.num_prompts for c in cells if c.setting == "sharp"} == {6}
    assert {c.config.baseline for c in cells if c.setting == "default"} == {"best"}
    for cell in cells:
        assert (
            pq.read_table(study / "cells" / cell.key / "probe.parquet").num_rows
            == cell.config.probe.num_prompts
        )


SERIES = ["quantity", "normalisation", "version"]


def rows_of(table, names: list[str], entry: dict):
    return table[(table[names] == [entry[n] for n in names]).all(axis=1)]


def test_figures_are_those_of_the_table(study):
    table = pq.read_table(study / "study.parquet").to_pandas()
    summary = json.loads((study / "study.json").read_text())
    assert summary["spread"] == "conditional on the update batch"
    assert len(summary["fits"]) == 8 * 4
    fitted = 0
    for entry in summary["fits"]:
        rows = rows_of(table, ["checkpoint", "setting", "repeat", *SERIES], entry)
        if entry["fit"] is not None:
            rows = rows[rows.lr.isin(entry["fit"]["lrs"])]
            assert rows.reliable.all()
            slope = np.polyfit(np.log(rows.lr), np.log(rows.true.abs()), 1)[0]
            assert entry["fit"]["slope"] == pytest.approx(slope, rel=1e-6)
            fitted += 1
    assert fitted > 8
    line = summary["lines"][0]
    own = [e["fit"]["slope"] for e in summary["fits"] if all(e[n] == line[n] for n in [*SERIES, "setting"])]
    assert line["slope"]["value"] == pytest.approx(np.mean(own[:2]))
    assert line["slope"]["stderr"] == pytest.approx(np.std(own[:2], ddof=1) / 2**0.5)
    assert len(summary["changes"]) == 2 * 2 * 4 * 3
    for entry in summary["changes"]:
        rows = rows_of(table, ["checkpoint", "setting", *SERIES, "lr"], entry)
        assert entry["repeats"] == len(rows) == 2
        for name in ("true", "linear"):
            assert entry[name]["value"] == pytest.approx(rows[name].mean())
            assert entry[name]["stderr"] == pytest.approx(rows[name].std() / 2**0.5)
            assert entry[name]["method"] == "mean over 2 repeats, conditional on the update batch"
        difference = (rows.linear - rows.true) / rows.true
        spread = entry["relative_difference"]
        assert (spread["n"], spread["mean"]) == (2, pytest.approx(difference.mean()))
        assert spread["sd"] == pytest.approx(difference.std())
        assert spread["q25"] == pytest.approx(difference.quantile(0.25))


ERRORS = {"delta": "delta-method error", "jackknife": "jackknife error", "bootstrap": "bootstrap error"}


@pytest.fixture(scope="module")
def kinds_of_error(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study of one checkpoint, measured once with each kind of standard error."""
    config = study_config(
        trained_run,
        tmp_path_factory.mktemp("kinds") / "s",
        checkpoints=[str(trained_run / "checkpoints/step-4")],
        settings={kind: {"errors": kind, "lrs": [1e-3]} for kind in ERRORS},
        repeats=1,
        resample="both",
    )
    run_study(config)
    return config


def test_a_lone_measurement_keeps_its_own_error(kinds_of_error):
    folder = Path(kinds_of_error.out)
    table = pq.read_table(folder / "study.parquet").to_pandas()
    summary = json.loads((folder / "study.json").read_text())
    assert summary["spread"] == "over update batches"
    for entry in summary["changes"]:
        (row,) = rows_of(table, ["setting", *SERIES, "lr"], entry).to_dict("records")
        assert (entry["true"]["value"], entry["true"]["stderr"]) == (row["true"], row["true_stderr"])
        assert entry["true"]["n"] == row["num_prompts"] == 8
        assert entry["true"]["method"] == "one measurement, conditional on the update batch"
        assert entry["relative_difference"]["sd"] is None


def test_errors_are_of_the_kind_asked_for(kinds_of_error):
    folder = Path(kinds_of_error.out)
    for cell in study_cells(kinds_of_error):
        change = json.loads((folder / "cells" / cell.key / "change.json").read_text())
        figures = json.loads((folder / "cells" / cell.key / "summary.json").read_text())
        method = f"; {ERRORS[cell.config.errors]} by prompt, given the update batch"
        for series in (change, *change["others"]):
            assert series["slope"]["method"].endswith(method)
            assert all(p["true"]["method"].endswith(method) for p in series["points"])
        assert ERRORS[cell.config.errors] in figures["entropy_per_token"]["method"]
    table = pq.read_table(folder / "study.parquet").to_pandas()
    assert set(table.lr) == {1e-3}
    errors = table.pivot_table("linear_stderr", ["normalisation", "version"], "setting")
    for kind in ("jackknife", "bootstrap"):
        assert np.allclose(errors[kind], errors["delta"], rtol=0.5), "eight prompts only"
        ratio = errors.loc["per_token", "on_policy"]
        assert ratio[kind] != pytest.approx(ratio["delta"], rel=1e-6)


def test_both_batches_are_drawn_anew_when_asked(trained_run, tmp_path):
    cells = study_cells(study_config(trained_run, tmp_path, resample="both"))
    assert sorted({(c.config.update.seed, c.config.probe.seed) for c in cells}) == [(0, 1), (1000, 1001)]


def test_run_folders_stand_for_all_their_checkpoints(trained_run, tmp_path):
    cells = study_cells(study_config(trained_run, tmp_path, checkpoints=[str(trained_run)]))
    assert [c.checkpoint.name for c in cells[::4]] == ["step-2", "step-4"], "step-0 has no optimizer state"


def test_wrong_settings_are_refused_before_anything_is_written(trained_run, tmp_path):
    config = study_config(trained_run, tmp_path / "s", settings={"x": {"probe.num_promts": 3}})
    with pytest.raises(ConfigError, match=r"probe\.num_promts: unknown key"):
        run_study(config)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("key", ["out", "checkpoint", "stages"])
def test_a_setting_gives_nothing_that_the_study_gives(trained_run, tmp_path, key):
    config = study_config(trained_run, tmp_path / "s", settings={"a": {key: "x"}})
    with pytest.raises(ConfigError, match=f"{key} cannot differ between settings"):
        run_study(config)
    assert not (tmp_path / "s").exists()


def test_another_study_in_the_folder_is_refused(study, trained_run):
    with pytest.raises(RunFolderError, match=r"repeats \(2 there, 3 here\)"):
        run_study(study_config(trained_run, study, repeats=3))


def test_two_studies_do_not_share_a_folder(trained_run, tmp_path, monkeypatch):
    out = tmp_path / "s"
    with locked(out):
        with pytest.raises(RunFolderError, match="another process is at work in this folder"):
            run_study(study_config(trained_run, out))
        monkeypatch.setenv("RANK", "1")
        assert run_study(study_config(trained_run, out)) == out
    assert not out.exists()


def test_resuming_a_finished_study_repeats_no_cell(study, trained_run):
    before = {p: p.stat().st_mtime_ns for p in (study / "cells").rglob("*") if p.is_file()}
    tables = [(study / name).read_bytes() for name in ("study.parquet", "study.json")]
    run_study(study_config(trained_run, study))
    assert {p: p.stat().st_mtime_ns for p in (study / "cells").rglob("*") if p.is_file()} == before
    assert [(study / name).read_bytes() for name in ("study.parquet", "study.json")] == tables


def test_the_page_is_made_from_the_two_files_alone(study, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("study.parquet", "study.json"):
        shutil.copy(study / name, copy / name)
    assert run_report(copy) == copy / "study.html"
    page = (copy / "study.html").read_text()
    assert (
        page.replace(str(copy), str(study)).replace("Study copy", "Study s")
        == (study / "study.html").read_text()
    )


def test_the_configuration_in_the_tree_is_about_the_demo(trained_run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(trained_run)
    monkeypatch.chdir(tmp_path)
    config = load_config(StudyConfig, Path(__file__).parent.parent / "configs/study.yaml")
    cells = study_cells(config)
    assert len(cells) == 2 * 3 * config.repeats
    assert {(c.setting, c.config.baseline, c.config.estimator) for c in cells} == {
        ("default", "best", "per_decision"),
        ("no-baseline", "none", "per_decision"),
        ("whole-sequence", "best", "whole_sequence"),
    }


@dataclass(frozen=True)
class Kills:
    """Studies that were killed and resumed to their end; finished cells at each kill."""

    studies: list[Path]
    finished_cells: list[int]


def killed_and_resumed(
    config_of: Callable[[Path], StudyConfig], root: Path, *, kills: int, pace: float, seed: int
) -> Kills:
    """Kill a study at random moments, ``kills`` times while it was at work, and go on each time.

    Attempts live up to three times the ``pace`` of a cell, so that the kills spread over the study. A study
    that ends by itself before all kills are spent is followed by another.
    """
    generator = np.random.default_rng(seed)
    done = Kills([root / "0"], [])
    while len(done.finished_cells) < kills:
        out = done.studies[-1]
        process = multiprocessing.get_context("fork").Process(target=run_study, args=(config_of(out),))
        process.start()
        process.join(float(generator.uniform(0, 3 * pace)))
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            done.finished_cells.append(len(list(out.glob("cells/[!.]*"))))
        else:
            assert process.exitcode == 0
            done.studies.append(root / str(len(done.studies)))
    run_study(config_of(done.studies[-1]))
    return done


@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["three kills", "twenty kills"]
)
def test_killed_and_resumed_gives_the_same_table_bit_for_bit(study, trained_run, tmp_path, kills):
    cells = sorted(p.name for p in (study / "cells").iterdir())
    seconds = [json.loads((study / f"cells/{c}/provenance.json").read_text())["wall_seconds"] for c in cells]
    done = killed_and_resumed(
        partial(study_config, trained_run), tmp_path, kills=kills, pace=float(np.mean(seconds)), seed=kills
    )
    for out in done.studies:
        for name in ("study.parquet", "study.json"):
            assert (out / name).read_bytes() == (study / name).read_bytes(), f"{name}, seed {kills}"
        assert sorted(p.name for p in (out / "cells").iterdir()) == cells
    assert kills < 20 or len(set(done.finished_cells)) > 4, f"not spread: {done.finished_cells}"
