"""What the page says of the order of tokens before it shows one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepscope.errors import RunFolderError
from stepscope.report import write_report
from stepscope.report.criteria import basis_sentence
from stepscope.report.influence import join_tokens, top_tokens_table
from stepscope.report.load import load_measurement
from stepscope.report.reliability import certainty, reliability_figure


def edit(folder: Path, **changes: object) -> None:
    path = folder / "reliability.json"
    found = json.loads(path.read_text())
    found["rankings"][0] |= changes
    path.write_text(json.dumps(found))


def test_certainty_comes_before_the_ranking(measure_folder: Path) -> None:
    measurement = load_measurement(measure_folder)
    said = certainty(measurement, "entropy")
    assert said.startswith("The order below is roughly determined: that from another 64 probe prompts")
    assert "0.750 ± 0.040 for tokens and 0.500 ± 0.040 for sequences" in said
    assert "two halves of this probe agree on 41 % of the 1.0 %" in said
    assert "192 ± 40 probe prompts for tokens" in said
    assert "takes 2.10 ± 0.40 times fewer" in said
    page = write_report(measure_folder).read_text()
    assert page.index("The order below") < page.index("fig-m0-influence-reliability")
    assert page.index("fig-m0-influence-reliability") < page.index("fig-m0-influence-sequences")
    figure = reliability_figure(measurement, "entropy")
    assert figure is not None
    assert list(figure.spec["data"][0]["x"]) == [64, 128, 256]
    assert certainty(measurement, "reward") == ""


def test_what_is_not_known_is_said(measure_folder: Path) -> None:
    found = json.loads((measure_folder / "reliability.json").read_text())
    doubtful = {"reliable": False, "reason": "one standard error is a factor of 3"}
    edit(measure_folder, needed=found["rankings"][0]["needed"] | doubtful)
    assert "192" not in certainty(load_measurement(measure_folder), "entropy")
    doubtful["reason"] = "the halves of the probe do not agree"
    edit(measure_folder, whole=found["rankings"][0]["whole"] | doubtful)
    said = certainty(load_measurement(measure_folder), "entropy")
    assert said == "How sure the order of tokens is cannot be said: the halves of the probe do not agree."
    edit(measure_folder, whole=None)
    with pytest.raises(RunFolderError, match=r"rankings\[0\].whole: not an estimate"):
        load_measurement(measure_folder)


def test_tokens_come_with_errors_in_the_order_of_the_shrunken(measure_folder: Path) -> None:
    measurement = load_measurement(measure_folder)
    tokens = join_tokens(
        measurement.update, measurement.update_tokens, measurement.influence_tokens, "entropy"
    )
    assert tokens is not None
    table = top_tokens_table(tokens, "entropy")
    assert table is not None
    names = [column.name for column in table.columns]
    values, shrunk = (names.index(n) for n in ("Influence per unit lr", "Shrunken"))
    assert table.columns[values].with_error
    assert all(" ± " in row[values].shown and row[values].stderr > 0 for row in table.rows)
    order = [abs(row[shrunk].raw) for row in table.rows]
    assert order == sorted(order, reverse=True)


def test_a_board_on_few_prompts_says_so(measure_folder: Path) -> None:
    measurement = load_measurement(measure_folder)
    rows = measurement.criteria["rows"]
    asked = len(set(measurement.update["prompt_id"]))
    for row in rows:
        row["spearman"]["n"] = asked
    assert basis_sentence(measurement) == ""
    for row in rows:
        row["spearman"]["n"] = 3
    assert f"stands on 3 of the batch's {asked} prompts" in basis_sentence(measurement)
