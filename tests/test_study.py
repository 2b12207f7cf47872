"""A study: every cell once, whatever kills it; the same table bit for bit; figures against brute force."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stepscope.config import StudyConfig, build_config
from stepscope.errors import ConfigError, RunFolderError
from stepscope.pipeline import run_study
from stepscope.pipeline.study import study_cells


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


def test_figures_are_those_of_the_table(study):
    table = pq.read_table(study / "study.parquet").to_pandas()
    summary = json.loads((study / "study.json").read_text())
    assert len(summary["fits"]) == 8
    for fit in summary["fits"]:
        rows = table[
            (table.checkpoint == fit["checkpoint"])
            & (table.setting == fit["setting"])
            & (table.repeat == fit["repeat"])
            & (table.normalisation == "per_token")
            & (table.version == "on_policy")
            & table.reliable
        ]
        if fit["fit"] is not None:
            slope = np.polyfit(np.log(rows.lr), np.log(rows.true.abs()), 1)[0]
            assert fit["fit"]["slope"] == pytest.approx(slope, rel=1e-6)
    entry = summary["relative_difference"][0]
    names = ["checkpoint", "setting", "quantity", "normalisation", "version", "lr"]
    rows = table[(table[names] == [entry[n] for n in names]).all(axis=1)]
    difference = (rows.linear - rows.true) / rows.true
    assert entry["repeats"] == len(rows) == 2
    assert entry["mean"] == pytest.approx(difference.mean())
    assert entry["sd"] == pytest.approx(difference.std())


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


def test_another_study_in_the_folder_is_refused(study, trained_run):
    with pytest.raises(RunFolderError, match=r"repeats \(2 there, 3 here\)"):
        run_study(study_config(trained_run, study, repeats=3))


def test_resuming_a_finished_study_repeats_no_cell(study, trained_run):
    before = {p: p.stat().st_mtime_ns for p in (study / "cells").rglob("*") if p.is_file()}
    tables = [(study / name).read_bytes() for name in ("study.parquet", "study.json")]
    run_study(study_config(trained_run, study))
    assert {p: p.stat().st_mtime_ns for p in (study / "cells").rglob("*") if p.is_file()} == before
    assert [(study / name).read_bytes() for name in ("study.parquet", "study.json")] == tables


def killed(config: StudyConfig, kills: int, seed: int) -> None:
    """Run a study in processes that are killed after random times, then once to the end."""
    generator = np.random.default_rng(seed)
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=run_study, args=(config,))
        process.start()
        time.sleep(float(generator.uniform(0, 3)))
        process.kill()
        process.join()
    run_study(config)


@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["three kills", "twenty kills"]
)
def test_killed_and_resumed_gives_the_same_table_bit_for_bit(study, trained_run, tmp_path, kills):
    out = tmp_path / "s"
    killed(study_config(trained_run, out), kills, seed=kills)
    assert (out / "study.parquet").read_bytes() == (study / "study.parquet").read_bytes()
    assert (out / "study.json").read_bytes() == (study / "study.json").read_bytes()
    assert sorted(p.name for p in (out / "cells").iterdir()) == sorted(
        p.name for p in (study / "cells").iterdir()
    )
