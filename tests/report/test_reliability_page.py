"""What the page says of the order of tokens before it shows one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import changed, estimate

from stepscope import runs
from stepscope.reading.measurement import load_measurement
from stepscope.report import write_report
from stepscope.report.parts import Room, Section
from stepscope.report.sections import criteria, influence
from stepscope.results.criteria import Criteria
from stepscope.results.influence import CurvePoint, Reliabilities, Shrinkage


@pytest.fixture
def known(measure_folder: Path) -> Reliabilities:
    """The rankings of a real measurement, with given numbers."""
    found = runs.read_record(Reliabilities, measure_folder / "reliability.json")
    given = {
        "token": (estimate(0.75, 0.04, "correlation", 8), estimate(192.0, 40.0, "probe prompts", 8)),
        "sequence": (estimate(0.5, 0.04, "correlation", 8), estimate(576.0, 40.0, "probe prompts", 8)),
    }
    curve = tuple(CurvePoint(prompts, 0.8, 0.04) for prompts in (64, 128, 256))
    rankings = tuple(
        replace(
            own,
            num_prompts=64,
            whole=given[own.level][0],
            needed=given[own.level][1],
            curve=curve,
            top={"0.01": estimate(0.41, 0.1, "share of the set", 8)},
        )
        for own in found.rankings
    )
    gain = estimate(2.1, 0.4, "times fewer probe prompts", 8)
    return Reliabilities(rankings, (Shrinkage("entropy", "optimizer", 0.2, gain),))


def section(folder: Path, **changes: Any) -> Section:
    """The section of influence, after changes to the record."""
    changed(folder / "reliability.json", Reliabilities, **changes)
    found = influence.section(load_measurement(folder), Room(1))
    assert found is not None
    return found


def test_certainty_comes_before_the_ranking(measure_folder: Path, known: Reliabilities) -> None:
    found = section(measure_folder, **vars(known))
    assert found.intro.startswith("The order below is roughly determined: that from another 64 probe prompts")
    assert "0.750 ± 0.040 for tokens and 0.500 ± 0.040 for sequences" in found.intro
    assert "two halves of this probe agree on 41 % of the 1.0 %" in found.intro
    assert "192 ± 40 probe prompts for tokens" in found.intro
    assert "takes 2.10 ± 0.40 times fewer" in found.intro
    assert list(found.figures[0].spec["data"][0]["x"]) == [64, 128, 256]
    page = write_report(measure_folder).read_text()
    assert page.index("The order below") < page.index("fig-m0-influence-reliability")
    assert page.index("fig-m0-influence-reliability") < page.index("fig-m0-influence-sequences")
    assert section(measure_folder, rankings=()).intro == ""


def test_what_is_not_known_is_said(measure_folder: Path, known: Reliabilities) -> None:
    doubted = known.rankings[0].needed.doubted("one standard error is a factor of 3")
    rankings = tuple(replace(own, needed=doubted) for own in known.rankings)
    assert "192" not in section(measure_folder, rankings=rankings).intro
    doubted = known.rankings[0].whole.doubted("the halves of the probe do not agree")
    rankings = tuple(replace(own, whole=doubted) for own in known.rankings)
    assert section(measure_folder, rankings=rankings).intro == (
        "How sure the order of tokens is cannot be said: the halves of the probe do not agree."
    )


def test_tokens_come_with_errors_in_the_order_of_the_shrunken(measure_folder: Path) -> None:
    found = influence.section(load_measurement(measure_folder), Room(1))
    assert found is not None
    (table,) = found.tables
    names = [column.name for column in table.columns]
    values = next(at for at, name in enumerate(names) if name.startswith("Influence, "))
    shrunk = names.index("Shrunken")
    assert table.columns[values].with_error
    assert all(" ± " in row[values].shown and row[values].stderr > 0 for row in table.rows)
    order = [abs(row[shrunk].raw) for row in table.rows]
    assert order == sorted(order, reverse=True)


def test_a_board_on_few_prompts_says_so(measure_folder: Path) -> None:
    path = measure_folder / "criteria.json"
    rows = runs.read_record(Criteria, path).rows
    asked = len(set(load_measurement(measure_folder).update.prompt_ids))
    for behind, said in ((asked, False), (3, True)):
        counted = tuple(replace(row, spearman=replace(row.spearman, n=behind)) for row in rows)
        changed(path, Criteria, rows=counted)
        found = criteria.section(load_measurement(measure_folder), Room(1))
        assert found is not None
        assert (f"stands on {behind} of the batch's {asked} prompts" in found.intro) is said
