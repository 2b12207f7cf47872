"""The leaderboards of a study's cells as one: hand-worked on made-up boards, and from a real study."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stepscope.config import MeasureConfig, StudyConfig, build_config, load_config
from stepscope.pipeline import run_report, run_study
from stepscope.pipeline.study.leaderboard import RANKED, STATISTICS, standing_rows, summarise_standings
from stepscope.results.criteria import Criteria, CriterionDefinition, LeaderboardRow
from stepscope.stats import Estimate

SHARES = ("0.01", "0.1")


ABOUT = CriterionDefinition("f", "", "", "+", True, "token", "literature", "signed")


def figure(value: float | None, stderr: float | None = 0.05, reason: str = "") -> Estimate:
    value, stderr = (math.nan if x is None else x for x in (value, stderr))
    method = "bootstrap over 11 update prompts"
    return Estimate(value, stderr, 11, "correlation", method, not reason, reason)


def standing(criterion: str, spearman: Estimate, gain: float | None = None, **changes) -> LeaderboardRow:
    control = gain is None
    fields = {
        "quantity": "entropy",
        "criterion": criterion,
        "level": "token",
        "kind": "control" if control else "literature",
        "target": "signed",
        "truth": "column",
        "preconditioner": "adamw",
        "version": "on_policy",
        **dict.fromkeys(STATISTICS, spearman),
        "captured": {share: figure(float(share)) for share in SHARES},
        "gain_over_control": None if control else figure(gain),
        "best_control": "logp",
    }
    return LeaderboardRow(**fields | changes)


def rows_of(*boards: list[LeaderboardRow], checkpoint: str = "step-10") -> list[dict[str, Any]]:
    """Rows of a study of one checkpoint whose repeats have these standings."""
    rows = []
    for repeat, board in enumerate(boards):
        config = build_config(
            MeasureConfig, {"checkpoint": "c", "out": "o", "update": {"seed": 1000 * repeat}}
        )
        names = {"checkpoint": checkpoint, "setting": "default", "repeat": repeat}
        criteria = Criteria((), (), SHARES, tuple(board), (), {}, ())
        rows += [{**names, **row} for row in standing_rows(criteria, config)]
    return rows


def summary_of(rows: list[dict[str, Any]], resample: Any = "both") -> dict[str, dict[str, Any]]:
    found = summarise_standings(rows, {"disc_v": ABOUT}, resample).to_plain()
    assert found["shares"] == list(SHARES)
    assert found["definitions"] == {"disc_v": ABOUT.to_plain()}
    return {row["criterion"]: row for row in found["rows"]}


def test_a_row_per_standing_and_statistic():
    rows = rows_of(
        [standing("disc_v", figure(0.5), 0.2), standing("logp", figure(None, None), sign_agreement=None)]
    )
    disc, logp = ([r for r in rows if r["criterion"] == name] for name in ("disc_v", "logp"))
    captured = [f"captured_{share}" for share in SHARES]
    assert [r["statistic"] for r in disc] == [*STATISTICS, *captured]
    assert [r["statistic"] for r in logp] == ["spearman", "kendall", "pearson", "auc", *captured]
    assert [r["value"] for r in disc] == [0.5] * 5 + [0.2, 0.01, 0.1]
    assert math.isnan(logp[0]["value"])
    assert math.isnan(logp[0]["stderr"])
    assert {(r["update_seed"], r["probe_seed"], r["best_control"]) for r in rows} == {(0, 1, "logp")}


def test_repeats_are_averaged_and_their_spread_is_the_error():
    boards = [
        [standing("disc_v", figure(0.5), 0.2), standing("logp", figure(0.3))],
        [standing("disc_v", figure(0.7), -0.1, best_control="A"), standing("logp", figure(-0.1))],
        [standing("disc_v", figure(0.9), 0.2), standing("logp", figure(0.1))],
    ]
    found = summary_of(rows_of(*boards))
    disc, logp = found["disc_v"], found["logp"]
    assert (disc["checkpoint"], disc["setting"], disc["repeats"]) == ("step-10", "default", 3)
    # 0.5, 0.7, 0.9: mean 0.7, sd 0.2; 0.2, -0.1, 0.2: mean 0.1, sd sqrt(0.03); 0.3, -0.1, 0.1: sd 0.2
    assert disc["spearman"]["value"] == pytest.approx(0.7)
    assert disc["spearman"]["stderr"] == pytest.approx(0.2 / math.sqrt(3))
    assert disc["gain_over_control"]["value"] == pytest.approx(0.1)
    assert disc["gain_over_control"]["stderr"] == pytest.approx(0.1)
    assert disc["captured"]["0.1"]["value"] == pytest.approx(0.1)
    assert disc["captured"]["0.1"]["stderr"] == pytest.approx(0.0, abs=1e-12)
    assert disc["best_controls"] == {"logp": 2, "A": 1}
    assert disc["spearman"]["n"] == 3
    assert disc["spearman"]["method"] == "mean over 3 repeats, over update batches"
    assert disc["spearman"]["reliable"]
    assert logp["spearman"]["value"] == pytest.approx(0.1)
    assert logp["gain_over_control"] is None


def test_the_spread_is_named_by_what_is_drawn_anew():
    rows = rows_of(*([standing("disc_v", figure(x), 0.0)] for x in (0.1, 0.2)))
    method = summary_of(rows, "probe")["disc_v"]["spearman"]["method"]
    assert method == "mean over 2 repeats, conditional on the update batch"


def test_a_lone_repeat_keeps_its_own_error():
    row = summary_of(rows_of([standing("disc_v", figure(0.5, 0.07, "one prompt"), 0.2)]))["disc_v"]
    assert row["repeats"] == 1
    assert row["spearman"] == {
        **asdict(figure(0.5, 0.07, "one prompt")),
        "method": "one measurement, bootstrap over 11 update prompts",
    }


@pytest.mark.parametrize(
    ("values", "mean", "reason"),
    [
        ((0.5, None, 0.7), 0.6, "undefined in 1 of 3 repeats"),
        ((0.5, None, None), 0.5, "undefined in 2 of 3 repeats"),
        ((None, None, None), None, "undefined in 3 of 3 repeats"),
    ],
)
def test_what_some_repeats_lack_is_averaged_over_the_others_and_flagged(values, mean, reason):
    rows = rows_of(*([standing("disc_v", figure(v, v and 0.05), 0.0)] for v in values))
    found = summary_of(rows)["disc_v"]["spearman"]
    assert found["value"] == pytest.approx(mean)
    assert (found["reliable"], found["reason"]) == (False, reason)


def test_flagged_repeats_flag_the_mean():
    rows = rows_of([standing("disc_v", figure(0.5), 0.0)], [standing("disc_v", figure(0.7, 0.1, "odd"), 0.0)])
    assert summary_of(rows)["disc_v"]["spearman"]["reason"] == "flagged in 1 of 2 measurements"


def test_checkpoints_and_truths_are_not_mixed():
    board = [standing("disc_v", figure(0.5), 0.0), standing("disc_v", figure(0.1), 0.0, truth="row")]
    rows = [*rows_of(board, board), *rows_of(board, checkpoint="step-60")]
    found = summarise_standings(rows, {}, "both").to_plain()["rows"]
    assert [(r["checkpoint"], r["truth"], r["repeats"], r["spearman"]["value"]) for r in found] == [
        ("step-10", "column", 2, 0.5),
        ("step-10", "row", 2, 0.1),
        ("step-60", "column", 1, 0.5),
        ("step-60", "row", 1, 0.1),
    ]


def small_study(trained_run: Path, out: Path) -> StudyConfig:
    return build_config(
        StudyConfig,
        {
            "checkpoints": [str(trained_run / "checkpoints/step-4")],
            "out": str(out),
            "repeats": 2,
            "resample": "both",
            "stages": ["rollouts", "step", "change", "criteria"],
            "measure": {
                "update": {"num_prompts": 4, "group_size": 4},
                "probe": {"num_prompts": 6},
                "lrs": [1e-4],
                "second_order": False,
                "batch_size": 64,
                "criteria": {"diagonal_tokens": 4, "drop_shares": []},
            },
        },
    )


@pytest.fixture(scope="module")
def study(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_study(small_study(trained_run, tmp_path_factory.mktemp("boards") / "s"))


def test_a_real_study_gathers_the_boards_of_its_cells(study):
    table = pq.read_table(study / "leaderboard.parquet").to_pandas()
    keys = ["checkpoint", "setting", "repeat", *RANKED, "statistic"]
    assert not table.duplicated(keys).any()
    assert sorted({(r.repeat, r.update_seed) for r in table.itertuples()}) == [(0, 0), (1, 1000)]
    cells = {}
    for cell in sorted((study / "cells").iterdir()):
        config = json.loads((cell / "provenance.json").read_text())
        board = json.loads((cell / "criteria.json").read_text())
        for row in board["rows"]:
            cells.setdefault((config["checkpoint"], *(row[k] for k in RANKED)), []).append(row)
    summary = json.loads((study / "study.json").read_text())["leaderboard"]
    assert len(cells) == len(summary["rows"]) > 200
    assert set(summary["definitions"]) == {row["criterion"] for row in summary["rows"]}
    several = 0
    for row in summary["rows"]:
        own = cells[(row["checkpoint"], *(row[k] for k in RANKED))]
        assert row["repeats"] == len(own) == 2
        for name in ("spearman", "gain_over_control"):
            values = [r[name]["value"] for r in own if r[name] is not None and r[name]["value"] is not None]
            if len(values) == 2:
                assert row[name]["value"] == pytest.approx(np.mean(values))
                assert row[name]["stderr"] == pytest.approx(np.std(values, ddof=1) / 2**0.5)
                several += 1
    assert several > 200
    page = (study / "study.html").read_text()
    assert 'id="table-m0-leaderboard"' in page
    assert "ranks the tokens' measured influence" in page.replace("&#39;", "'")


@pytest.mark.slow
def test_going_on_measures_only_what_is_missing_and_gives_the_same_leaderboard(study, trained_run):
    names = ("leaderboard.parquet", "study.json")
    tables = [(study / name).read_bytes() for name in names]
    lost, *kept = sorted((study / "cells").iterdir())
    before = {p: p.stat().st_mtime_ns for cell in kept for p in cell.iterdir()}
    shutil.rmtree(lost)
    (study / "leaderboard.parquet").unlink()
    run_study(small_study(trained_run, study))
    assert (lost / "criteria.json").is_file()
    assert {p: p.stat().st_mtime_ns for cell in kept for p in cell.iterdir()} == before
    assert [(study / name).read_bytes() for name in names] == tables


def test_the_page_of_a_leaderboard_needs_no_cells(study, tmp_path):
    for name in ("study.parquet", "study.json"):
        shutil.copy(study / name, tmp_path / name)
    assert 'id="table-m0-leaderboard"' in run_report(tmp_path).read_text()


def test_the_configuration_in_the_tree_ranks_criteria_on_the_demo():
    config = load_config(StudyConfig, Path(__file__).parent.parent / "configs/criteria_study.yaml")
    assert "criteria" in config.stages
    assert config.measure.criteria.drop_shares == []
    assert [Path(path).name for path in config.checkpoints] == ["step-10", "step-30", "step-60"]
