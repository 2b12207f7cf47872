from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from folders import HOSTILE
from test_page import LARGEST_PAGE, Page

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.intervals import student
from stepscope.loglog import loglog_fit
from stepscope.pipeline.study.table import summarise
from stepscope.report import write_study_report
from stepscope.results.study import StudyFit, StudyRows

LRS = [1e-6, 1e-5, 1e-4, 1e-3]
OWN_LR = 1e-4
CHECKPOINTS = ["runs/a/checkpoints/step-10", f"runs/b/{HOSTILE.replace('/', '')}/step-10", "runs/a/step-60"]
SETTINGS = ["default", "no-baseline"]


def study_rows(repeats: int, checkpoints: list[str]) -> tuple[list[dict[str, Any]], list[StudyFit]]:
    """Rows and fits of a study whose first order is off by 100 lr, one percent at the own learning rate."""
    rng = np.random.default_rng(0)
    rows, fits = [], []
    for checkpoint in checkpoints:
        for setting in SETTINGS:
            for repeat in range(repeats):
                for version in ("on_policy", "fixed_prefix"):
                    names = {"checkpoint": checkpoint, "setting": setting, "repeat": repeat}
                    series = {"quantity": "entropy", "normalisation": "per_token", "version": version}
                    slope = -8 + rng.standard_normal()
                    points = []
                    for lr in LRS:
                        linear = slope * lr
                        true = linear / (1 + 100 * lr * (1 + 0.1 * rng.standard_normal()))
                        points.append(
                            {
                                **names,
                                "update_seed": 0,
                                "probe_seed": 1 + 1000 * repeat,
                                **series,
                                "own_lr": OWN_LR,
                                "lr": lr,
                                "unit": "nats/token",
                                "num_prompts": 64,
                                **measured("true", true),
                                **measured("linear", linear),
                                **measured("second_order", 0.0),
                                "effective_sample_size": 64.0,
                                "pareto_k": 0.1,
                                "reliable": lr < 1e-3,
                                "reason": "" if lr < 1e-3 else "effective sample size 3.2 of 64, below 32",
                                "relative_difference": (linear - true) / true,
                            }
                        )
                    fit = loglog_fit(LRS[:3], [p["true"] for p in points[:3]])
                    fits.append(StudyFit(**names, **series, fit=fit, measurable_from=1e-8, linear_up_to=1e-3))
                    rows += points
    return rows, fits


def measured(name: str, value: float) -> dict[str, float]:
    """Columns of a value with an error of a tenth and an interval of two errors to either side."""
    error = 0.1 * abs(value)
    ends = {f"{name}_low": value - 2 * error, f"{name}_high": value + 2 * error}
    return {name: value, f"{name}_stderr": error, **ends}


def write_study(
    folder: Path, *, repeats: int = 5, resample: Any = "probe", checkpoints: list[str] = CHECKPOINTS
) -> Path:
    rows, fits = study_rows(repeats, checkpoints)
    folder.mkdir(parents=True)
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    texts = {name: values.astype(object) for name, values in columns.items() if values.dtype.kind == "U"}
    runs.write_record(folder / "study.parquet", StudyRows(**{**columns, **texts}))
    runs.write_record(folder / "study.json", summarise(rows, fits, resample))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study")


def figure(page: Page, what: Callable[[dict], bool]) -> dict:
    return next(f for f in page.figures if any(what(trace) for trace in f["data"]))


def test_every_setting_has_figures_and_tables(study: Path) -> None:
    page = Page(write_study_report(study))
    assert {"m0", "m1", "m0-change", "m1-difference", "table-run-cells"} <= set(page.ids)
    assert {f"fig-m1-{kind}-{n}" for kind in ("line", "difference") for n in (0, 1)} <= set(page.ids)
    assert {"table-m0-lines", "table-m0-changes"} <= set(page.ids)
    assert "30 measurements (3 checkpoints, 2 settings, 5 repeats)" in page.source
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(page.loads) <= {"data:,"}
    assert (study / "study.html").stat().st_size < LARGEST_PAGE
    for found in page.figures:
        go.Figure(found)


def test_numbers_of_the_figures_are_those_of_the_files(study: Path) -> None:
    page = Page(write_study_report(study))
    summary = json.loads((study / "study.json").read_text())
    wanted = {"checkpoint": CHECKPOINTS[2], "setting": "default", "version": "on_policy"}
    changes = [c for c in summary["changes"] if all(c[n] == v for n, v in wanted.items())]
    marks = next(t for f in page.figures for t in f["data"] if t.get("name", "").startswith("step-60: slope"))
    assert marks["y"] == pytest.approx([abs(c["true"]["value"]) for c in changes], rel=1e-4)
    assert marks["error_y"]["array"] == pytest.approx(
        [student(5) * c["true"]["stderr"] for c in changes], rel=1e-4
    )
    names = {t["name"] for f in page.figures for t in f["data"] if t["type"] == "box"}
    assert {"a/step-10", "step-60"} < names
    assert [s.endswith("-open") for s in marks["marker"]["symbol"]] == [lr > 1e-4 for lr in LRS]
    table = pq.read_table(study / "study.parquet").to_pandas()
    rows = table[(table[list(wanted)] == list(wanted.values())).all(axis=1)]
    boxes = figure(page, lambda t: t["type"] == "box" and t.get("name") == "step-60")
    shown = [t for t in boxes["data"] if t["name"] == "step-60"]
    assert len(shown) == len(LRS)
    for trace, lr in zip(shown, LRS, strict=True):
        assert trace["y"] == pytest.approx(rows[rows.lr == lr].relative_difference.tolist(), rel=1e-4)
    titles = [a["text"] for a in boxes["layout"]["annotations"]]
    assert titles == ["lr 1e-6", "lr 1e-5", "lr 1e-4", "lr 1e-3"]


def test_every_cell_has_its_row(study: Path) -> None:
    source = write_study_report(study).read_text()
    cells = re.search(r'id="table-run-cells".*?</table>', source, re.S)
    assert cells is not None
    assert cells.group().count("<tr>") == 1 + 3 * 2 * 5


@pytest.mark.parametrize(
    ("resample", "words"), [("probe", "conditional on the update batch"), ("both", "over update batches")]
)
def test_the_page_says_what_the_spread_is_over(tmp_path: Path, resample: str, words: str) -> None:
    page = Page(write_study_report(write_study(tmp_path / "s", resample=resample)))
    assert f"The spread over repeats is {words}." in page.source
    captions = re.findall(r"<figcaption>(.*?)<span", page.source, re.S)
    assert len(captions) == 8
    assert all(words in caption for caption in captions)


def test_a_study_without_repeats_shows_the_errors_of_its_measurements(tmp_path: Path) -> None:
    page = Page(write_study_report(write_study(tmp_path / "s", repeats=1)))
    assert "The spread over repeats" not in page.source
    assert "One measurement each; error bars: 95 % interval, clustered by prompt" in page.source.replace(
        "\u00a0", " "
    )


def test_runs_that_no_line_could_be_fitted_to(study: Path) -> None:
    summary = json.loads((study / "study.json").read_text())
    for row in summary["fits"]:
        row["fit"] = None
    for row in summary["lines"]:
        row |= {"slope": None, "intercept": None, "r2": None, "lrs": [], "fits": 0}
    (study / "study.json").write_text(json.dumps(summary))
    page = Page(write_study_report(study))
    assert "no fit" in json.dumps(page.figures)


def test_names_of_a_run_cannot_become_markup(study: Path) -> None:
    page = Page(write_study_report(study))
    assert HOSTILE.split("/")[0] not in page.source.replace("\\u003c", "")
    assert len(page.scripts) == 1


def test_a_study_that_is_not_there_or_damaged_is_one_line(study: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no study\.json, so this is not a finished study"):
        write_study_report(tmp_path)
    summary = json.loads((study / "study.json").read_text())
    del summary["changes"][3]["true"]
    (study / "study.json").write_text(json.dumps(summary))
    with pytest.raises(RunFolderError, match=r"study\.json"):
        write_study_report(study)
    (study / "study.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"study\.json: cannot be read as JSON"):
        write_study_report(study)
    assert not (study / "study.html").exists()
