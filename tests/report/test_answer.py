"""The first screen says what the artifacts say: sentence, parts of the change, tokens."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from folders import changed, estimate, hostile

from pages import held
from stepscope import runs
from stepscope.reading.answer import token_classes, top_tokens, waterfall
from stepscope.reading.measurement import load_measurement
from stepscope.report import write_report
from stepscope.report.units import unit_of
from stepscope.results.change import Changes
from stepscope.results.summary import Summary


@pytest.fixture
def folder(tiny_measurement: Path, tmp_path: Path) -> Path:
    """A real measurement as it was written, sealed."""
    return Path(shutil.copytree(tiny_measurement, tmp_path / "step-4"))


def tokens_of(folder: Path) -> list[dict]:
    """The tokens with an influence through the optimizer, put together with nothing of the package."""
    update = {r["sequence_id"]: r for r in pq.read_table(folder / "update.parquet").to_pylist()}
    rows = pq.read_table(folder / "update_tokens.parquet").to_pylist()
    tokens = {(r["sequence_id"], r["position"]): r for r in rows}
    found = []
    table = pq.read_table(folder / "influence_tokens.parquet").to_pylist()
    path = folder / "influence_token_folds.parquet"
    beside = pq.read_table(path).to_pylist() if path.exists() else [{}] * len(table)
    for row in (one | two for one, two in zip(table, beside, strict=True)):
        if (row["quantity"], row["through"]) != ("entropy", "optimizer"):
            continue
        own, batch = tokens[row["sequence_id"], row["position"]], update[row["sequence_id"]]
        ids = batch["response_token_ids"][: row["position"] + 1]
        found.append({**own, **row, "advantage": batch["advantage"], "context": (batch["question"], *ids)})
    return found


def quadrant(token: dict) -> str:
    if token["advantage"] == 0:
        return "no advantage"
    rarity = "likely" if token["logprob"] + token["entropy"] >= 0 else "rare"
    return f"{'right' if token['advantage'] > 0 else 'wrong'}, {rarity}"


def test_the_parts_are_those_of_the_artifacts_and_add_up(folder: Path) -> None:
    found = waterfall(load_measurement(folder))
    assert found is not None
    change = runs.read_record(Changes, folder / "change.json")
    figures = runs.read_record(Summary, folder / "summary.json").figures
    own = change.at(change.lr)
    sums: dict[str, float] = {}
    for token in tokens_of(folder):
        sums[quadrant(token)] = sums.get(quadrant(token), 0.0) + token["influence"] * change.lr
    parts = {part.name: part.value.value for part in found.parts}
    assert sum(parts.values()) == pytest.approx(own.true.value, rel=1e-9)
    assert found.change == own.true
    assert parts.pop("momentum") == pytest.approx(figures["influence_momentum"].value * change.lr)
    assert parts.pop("weight decay") == pytest.approx(figures["influence_decay"].value * change.lr)
    parts.pop("rest")
    assert parts == {name: pytest.approx(value) for name, value in sums.items() if value}


def fold_error(tokens: list[dict]) -> float:
    """Standard error of a sum over tokens, from the sums of the eight folds."""
    away = [sum(token[str(fold)] for token in tokens) for fold in range(8)]
    assert sum(away) == pytest.approx(0.0, abs=1e-9 * sum(map(abs, away)))
    return (8 / 7 * sum(x * x for x in away)) ** 0.5


def test_errors_of_classes_are_those_of_the_folds_sums(folder: Path) -> None:
    change = runs.read_record(Changes, folder / "change.json")
    tokens = tokens_of(folder)
    closer = 0
    for part in token_classes(load_measurement(folder), "quadrant"):
        own = [t for t in tokens if quadrant(t) == part.name]
        assert part.tokens == len(own)
        assert part.value.stderr == pytest.approx(fold_error(own) * change.lr)
        closer += part.value.stderr < 0.9 * sum(t["stderr"] for t in own) * change.lr
        assert part.value.low < part.value.value < part.value.high
        assert part.size == pytest.approx(sum(abs(t["influence"]) for t in own) * change.lr)
    assert closer


def test_without_folds_errors_of_classes_are_a_bound(folder: Path) -> None:
    (folder / "influence_token_folds.parquet").unlink()
    change = runs.read_record(Changes, folder / "change.json")
    tokens = tokens_of(folder)
    for part in token_classes(load_measurement(folder), "quadrant"):
        own = [t for t in tokens if quadrant(t) == part.name]
        assert part.value.stderr == pytest.approx(sum(t["stderr"] for t in own) * change.lr)
        assert "at most" in part.value.method


def test_equal_tokens_after_the_same_prefix_are_one(folder: Path) -> None:
    change = runs.read_record(Changes, folder / "change.json")
    merged: dict[tuple, list[dict]] = {}
    for token in tokens_of(folder):
        merged.setdefault(token["context"], []).append(token)
    sums = {key: sum(t["influence"] for t in own) * change.lr for key, own in merged.items()}
    total = sum(abs(t["influence"]) for t in tokens_of(folder)) * change.lr
    for sign in (-1, 1):
        found = top_tokens(load_measurement(folder), 5, sign)
        largest = sorted((v for v in sums.values() if v * sign > 0), key=lambda v: -abs(v))[:5]
        assert [t.value.value for t in found] == pytest.approx(largest)
        for token in found:
            key = next(k for k, own in merged.items() if _places(own) == sorted(token.places))
            assert token.value.value == pytest.approx(sums[key])
            assert token.value.stderr == pytest.approx(fold_error(merged[key]) * change.lr)
            assert token.share == pytest.approx(abs(sums[key]) / total)
    assert any(len(own) > 1 for own in merged.values())


def _places(tokens: list[dict]) -> list[tuple[int, int]]:
    return sorted((t["sequence_id"], t["position"]) for t in tokens)


def test_the_page_shows_them(folder: Path) -> None:
    page = write_report(folder).read_text().replace("\u00a0", " ")
    found = load_measurement(folder)
    unit = unit_of(found.change)
    parts = waterfall(found)
    assert parts is not None
    bars = next(f for f in held(page) if f.get("data") and f["data"][0].get("base") is not None)["data"][0]
    names = [name for name, _ in bars["customdata"]]
    assert names == [*(part.name for part in parts.parts), "the whole change"]
    values = [*(part.value for part in parts.parts), parts.change]
    assert bars["x"] == pytest.approx([unit.change(v).value for v in values], rel=1e-4)
    starts = np.cumsum([0.0, *(unit.change(part.value).value for part in parts.parts)])
    assert bars["base"] == pytest.approx([*starts[:-1], 0.0], rel=1e-3, abs=1e-3)
    above = [unit.change(value).high - unit.change(value).value for value in values]
    assert bars["error_x"]["array"] == pytest.approx(above, rel=1e-3)
    lists = re.findall(r'<ol class="culprits">(.*?)</ol>', page, re.S)
    assert len(lists) == 2
    for shown, sign in zip(lists, (-1, 1), strict=True):
        rows = re.findall(
            r'token=([\d.]+)">.*?</mark>.*?<span class="worth">(.*?)(?: <span|</span>)', shown, re.S
        )
        tops = top_tokens(found, 4, sign)
        assert [place for place, _ in rows] == [".".join(map(str, t.places[0])) for t in tops]
        for (_, value), token in zip(rows, tops, strict=True):
            first = float(value.split(" ± ")[0].strip("(").replace("\u2212", "-"))
            assert first == pytest.approx(unit.change(token.value).value, rel=0.2, abs=1e-9)


def test_soundness_and_size_are_two_marks(folder: Path) -> None:
    path = folder / "change.json"
    change = runs.read_record(Changes, path)
    hostile(folder)
    marks = r'<span class="verdict-mark( good)?"[^>]*>(.*?)</span>'
    passed, failed = (" good", "✓ diagnostics passed"), ("", "○ diagnostics failed")
    resolved, unresolved = (" good", "✓ resolved from zero"), ("", "○ not resolved from zero")
    for true, said in (
        (estimate(-0.01, 0.001), [passed, resolved]),
        (estimate(-0.01, 0.1), [passed, unresolved]),
        (estimate(-0.01, 0.001).doubted("x"), [failed, resolved]),
    ):
        points = tuple(p if p.lr != change.lr else replace(p, true=true) for p in change.points)
        changed(path, Changes, points=points, taken=None)
        assert re.findall(marks, write_report(folder).read_text()) == said


def test_the_unit_leaves_room_before_the_point(folder: Path) -> None:
    change = runs.read_record(Changes, folder / "change.json")
    unit = unit_of(change)
    own = change.at(change.lr)
    largest = max(abs(own.true.value), own.true.stderr, abs(own.linear.value), own.linear.stderr)
    assert 100 <= largest / 10.0**unit.exponent < 1e5
    assert unit.exponent % 3 == 0
    assert unit.factor == pytest.approx(change.lr / 10.0**unit.exponent)
