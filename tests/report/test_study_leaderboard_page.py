"""The leaderboard of a study on its page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from folders import HOSTILE
from test_page import Page
from test_study_page import CHECKPOINTS, SETTINGS, write_study

from stepscope.errors import RunFolderError
from stepscope.intervals import student
from stepscope.pipeline.study.leaderboard import STATISTICS, summarise_standings
from stepscope.report import write_study_report
from stepscope.results.criteria import CriterionDefinition
from stepscope.stats import Estimate

STEPS = ["runs/a/checkpoints/step-60", "runs/a/checkpoints/step-10", "runs/a/checkpoints/step-30"]
TRUTHS = [("row", "adamw", "fixed_prefix"), ("column", "adamw", "on_policy"), ("column", "sgd", "on_policy")]
NAMES = {f"c{i}": "literature" for i in range(7)} | {f"k{i}": "control" for i in range(3)}


def size_of(criterion: str) -> float:
    """How well a criterion does, sign included: c6 and k2 do best."""
    return (0.1 + 0.1 * int(criterion[1])) * (-1 if criterion == "k2" else 1)


def standings(checkpoints: list[str], repeats: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for checkpoint in checkpoints:
        for setting in SETTINGS:
            for repeat in range(repeats):
                for truth, preconditioner, version in TRUTHS:
                    for name, kind in NAMES.items():
                        value = size_of(name) + 0.01 * rng.standard_normal()
                        for statistic in (*STATISTICS, "captured_0.01"):
                            if (statistic, kind) == ("gain_over_control", "control"):
                                continue
                            rows.append(
                                {
                                    **{"checkpoint": checkpoint, "setting": setting, "repeat": repeat},
                                    **{"quantity": "entropy", "level": "token", "target": "signed"},
                                    **{"truth": truth, "preconditioner": preconditioner, "version": version},
                                    **{"criterion": name, "kind": kind, "statistic": statistic},
                                    "best_control": "k2" if repeat else "k1",
                                    **asdict(Estimate(value, 0.05, 11, "correlation", "bootstrap")),
                                }
                            )
    return rows


def with_leaderboard(
    folder: Path, checkpoints: list[str] = CHECKPOINTS, *, repeats: int = 3, resample: Any = "both"
) -> Path:
    """A study whose leaderboard is of these checkpoints; those of its changes take their names."""
    write_study(folder, repeats=repeats, resample=resample, checkpoints=checkpoints)
    summary = json.loads((folder / "study.json").read_text())
    about = CriterionDefinition("A p (l + H)", HOSTILE, "(1)", "+", False, "token", "literature", "signed")
    summary["leaderboard"] = summarise_standings(
        standings(checkpoints, repeats), dict.fromkeys(NAMES, about), resample
    ).to_plain()
    (folder / "study.json").write_text(json.dumps(summary))
    return folder


def figures_of(page: Page) -> list[dict]:
    """Figures of the first setting's leaderboard."""
    found = [f for f in page.figures if any(t.get("name") in NAMES for t in f["data"])]
    return found[: len(TRUTHS)]


def test_a_study_without_criteria_has_no_leaderboard(tmp_path: Path) -> None:
    page = Page(write_study_report(write_study(tmp_path / "s")))
    assert page.boards == []
    assert "m0-criteria" not in page.ids


def test_the_table_has_every_standing_of_its_setting(tmp_path: Path) -> None:
    folder = with_leaderboard(tmp_path / "s")
    page = Page(write_study_report(folder))
    assert len(page.boards) == len(SETTINGS)
    board = page.boards[0]
    assert len(board["rows"]) == len(CHECKPOINTS) * len(TRUTHS) * len(NAMES)
    filters = {f["key"]: f for f in board["filters"]}
    assert filters["checkpoint"]["first"] == ""
    assert [label for _, label in filters["checkpoint"]["options"][1:]][::2] == ["a/step-10", "step-60"]
    assert filters["truth"]["first"] == "column on_policy"
    names = [column["name"] for column in board["columns"]]
    assert names[board["sort"]] == "Spearman"
    values, cells = board["rows"][0]
    row = json.loads((folder / "study.json").read_text())["leaderboard"]["rows"][0]
    assert values[0] == CHECKPOINTS[0]
    shown = dict(zip(names, cells, strict=True))
    assert (shown["Criterion"], shown["Checkpoint"], shown["Repeats"]) == ("c0", "a/step-10", 3)
    assert shown["Spearman"] == pytest.approx([row["spearman"][k] for k in ("value", "stderr")], rel=1e-2)
    assert shown["Gain over best control"] is not None
    assert shown["Best control"] == "k2 (2), k1 (1)"


def test_the_figure_shows_the_leaders_at_their_steps(tmp_path: Path) -> None:
    folder = with_leaderboard(tmp_path / "s", STEPS)
    page = Page(write_study_report(folder))
    primary, *others = figures_of(page)
    assert len(others) == len(TRUTHS) - 1
    go.Figure(primary)
    assert [t["name"] for t in primary["data"]] == ["c6", "c5", "c4", "c3", "c2", "k2", "k1"]
    assert len({t["marker"]["symbol"] for t in primary["data"]}) == 7, "told apart without colour"
    assert primary["layout"]["xaxis"]["tickvals"] == [10.0, 30.0, 60.0]
    assert {t["mode"] for t in primary["data"]} == {"lines+markers"}
    rows = json.loads((folder / "study.json").read_text())["leaderboard"]["rows"]
    for trace in primary["data"]:
        own = {
            r["checkpoint"]: r["spearman"]
            for r in rows
            if (r["setting"], r["criterion"], r["truth"], r["preconditioner"])
            == ("default", trace["name"], "column", "adamw")
        }
        ordered = [own[STEPS[1]], own[STEPS[2]], own[STEPS[0]]]
        assert trace["x"] == pytest.approx([10, 30, 60], abs=2)
        assert trace["y"] == pytest.approx([e["value"] for e in ordered], rel=1e-4)
        assert trace["error_y"]["array"] == pytest.approx(
            [student(3) * e["stderr"] for e in ordered], rel=1e-4
        )
    text = page.source.replace("\u00a0", " ")
    assert "c6 ranks the tokens&#39; measured influence on the entropy best on average" in text
    assert "The best trivial control, k2, reaches \u22120." in text
    assert "Mean over 3 repeats; error bars: 95 % interval of the mean, over update batches" in text


def test_checkpoints_of_several_runs_stand_side_by_side_and_are_not_joined(tmp_path: Path) -> None:
    page = Page(write_study_report(with_leaderboard(tmp_path / "s")))
    figure = figures_of(page)[0]
    assert {t["mode"] for t in figure["data"]} == {"markers"}
    axis = figure["layout"]["xaxis"]
    assert axis["tickvals"] == [0.0, 1.0, 2.0]
    assert axis["ticktext"][::2] == ["a/step-10", "step-60"]


def test_one_update_batch_and_lone_repeats_are_said_to_be_so(tmp_path: Path) -> None:
    still = "Rows and diagonals do not depend on the probe batch"
    held = Page(write_study_report(with_leaderboard(tmp_path / "held", resample="probe")))
    drawn = Page(write_study_report(with_leaderboard(tmp_path / "drawn")))
    lone = Page(write_study_report(with_leaderboard(tmp_path / "lone", repeats=1)))
    assert still in held.source
    assert still not in drawn.source
    assert still not in lone.source
    assert "One measurement each; error bars: 95 %, over update prompts" in lone.source.replace("\u00a0", " ")
    assert "standard errors of the mean" not in lone.source


def test_names_of_a_study_cannot_become_markup(tmp_path: Path) -> None:
    page = Page(write_study_report(with_leaderboard(tmp_path / "s")))
    assert HOSTILE.split("/")[0] not in page.source.replace("\\u003c", "")
    assert len(page.scripts) == 1


@pytest.mark.parametrize("key", ["spearman", "best_controls", "repeats"])
def test_a_damaged_leaderboard_is_one_line(tmp_path: Path, key: str) -> None:
    folder = with_leaderboard(tmp_path / "s")
    summary = json.loads((folder / "study.json").read_text())
    del summary["leaderboard"]["rows"][3][key]
    (folder / "study.json").write_text(json.dumps(summary))
    with pytest.raises(RunFolderError, match=r"study\.json"):
        write_study_report(folder)
