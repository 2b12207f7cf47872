"""What goes to trackers, read back from their files."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from stepscope.errors import ConfigError
from stepscope.stats import Estimate
from stepscope.trackers import (
    Entry,
    Responses,
    Sent,
    ShownResponse,
    Trackers,
    open_trackers,
    require_installed,
)
from stepscope.trackers.tensorboard import TensorBoardTracker
from stepscope.trackers.texts import BLUE, LOWERS, ORANGE, RAISES, coloured_html, marked_html
from tracked import events_of, read, texts_of, wandb_history, wandb_offline

TOKENS = ["<script>alert(1)</script>", " **bold**", "\n\n", "|a|b|", "`", "&amp;", "\0", "_x_", ""]
VALUES = np.array([0.5, -1.0, 0.0, np.nan, 0.01, -0.02, 0.001, 0.9, np.nan])
RESPONSE = ShownResponse("1 < 2 & *3*?\n# no title", TOKENS, VALUES, {"reward": 1.0, "note": "<b>"})
FIGURE = Estimate(0.25, 0.1, 8, "nats/token", "made up", low=0.05, high=float("inf"))


def entry(step: int, source: str = "eval") -> Entry:
    return Entry(
        source,
        step,
        {"level": 0.1 * step, "nothing": float("nan")},
        {"level": FIGURE},
        {"spread": np.array([1.0, 2.0, np.nan, 4.0 * step]), "empty": np.array([np.nan])},
        Responses("change, nats", True, [RESPONSE]),
    )


def test_tensorboard_has_every_point_once(tmp_path: Path) -> None:
    """Written, and written again as a resumed evaluation does."""
    for steps in ([1], [1, 2]):
        tracker = TensorBoardTracker.anew(tmp_path / "tensorboard" / "eval")
        for step in steps:
            tracker.log(entry(step))
        tracker.close()
    events = events_of(tmp_path / "tensorboard" / "eval")
    assert events.Tags()["scalars"] == ["stepscope/eval/level"]
    shown = [(e.step, e.value) for e in events.Scalars("stepscope/eval/level")]
    assert shown == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))]
    assert events.Tags()["histograms"] == ["stepscope/eval/spread"]
    for event in events.Histograms("stepscope/eval/spread"):
        values = event.histogram_value
        assert (values.num, values.min, values.max) == (3, 1.0, max(2.0, 4.0 * event.step))
        assert sum(values.bucket) == 3
    assert [e.step for e in events.Histograms("stepscope/eval/spread")] == [1, 2]
    assert list(texts_of(events, "stepscope/eval/responses")) == [1, 2]
    table = texts_of(events, "stepscope/eval/figures")[2]
    assert "<td>0.25</td><td>0.1</td><td>0.05</td><td>inf</td><td>nats/token</td>" in table


def test_a_training_that_goes_on_has_every_point_once(tmp_path: Path) -> None:
    """As ``stepscope train --resume`` opens its curves: points behind the checkpoint are taken out."""
    for steps, purge in (([1, 2, 3, 4], 0), ([3, 4, 5], 3)):
        writer = SummaryWriter(str(tmp_path), purge_step=purge)
        tracker = TensorBoardTracker(writer)
        for step in steps:
            tracker.log(entry(step, "probe"))
        tracker.close()
        writer.close()
    events = events_of(tmp_path)
    assert [e.step for e in events.Scalars("stepscope/probe/level")] == [1, 2, 3, 4, 5]
    assert [e.step for e in events.Histograms("stepscope/probe/spread")] == [1, 2, 3, 4, 5]
    assert list(texts_of(events, "stepscope/probe/responses")) == [1, 2, 3, 4, 5]


def test_the_text_plugin_shows_a_response_as_it_is(tmp_path: Path) -> None:
    """Nothing in it is taken for markup, and the strongest tokens are marked with what they do."""
    tracker = TensorBoardTracker.anew(tmp_path)
    tracker.log(entry(3))
    tracker.close()
    page = texts_of(events_of(tmp_path), "stepscope/eval/responses")[3]
    assert "<script" not in page
    assert "&lt;b&gt;" in page
    assert "1 < 2 & *3*?\N{RETURN SYMBOL} # no title" in read(page)
    plain = read(page).replace(LOWERS, "").replace(RAISES, "")
    assert "<script>alert(1)</script> **bold**" in plain
    assert "|a|b|`&amp;\N{REPLACEMENT CHARACTER}_x_" in plain
    assert f"{RAISES}<strong>&lt;script&gt;" in page
    assert f"{LOWERS}<em> **bold**</em>" in page
    assert f"{RAISES}<strong>_x_</strong>" in page
    assert (page.count(RAISES), page.count(LOWERS)) == (2, 1)
    assert "<td>-1</td>" in page
    assert marked_html(Responses("entropy", False, [RESPONSE])).count(RAISES) == 0


class Spans(HTMLParser):
    """Tokens with their colours, as a browser sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "span":
            self.found.append([dict(attrs).get("style") or "", ""])

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][1] += data


def test_html_has_a_colour_for_every_token() -> None:
    spans = Spans()
    spans.feed(coloured_html(Responses("change, nats", True, [RESPONSE])))
    assert [text for _, text in spans.found] == [t.replace("\0", "\N{REPLACEMENT CHARACTER}") for t in TOKENS]
    styles = [style for style, _ in spans.found]
    assert styles[0] == f"background:rgba({ORANGE},0.49)"  # 0.7 sqrt(0.5 / 1)
    assert styles[1] == f"background:rgba({BLUE},0.70)"
    assert styles[3] == styles[8] == ""
    assert [BLUE in style for style in styles] == list(VALUES < 0)


def test_a_tracker_that_fails_is_warned_of_once_and_left_alone(tmp_path: Path) -> None:
    class Broken:
        name = "wandb"
        asked = 0

        def log(self, entry: Entry) -> None:
            self.asked += 1
            raise ConnectionError("no route\nto host")

        def close(self) -> None:
            raise AssertionError("it is not asked again")

    def never() -> Broken:
        raise RuntimeError("api key")

    broken = Broken()
    with pytest.warns(UserWarning, match="eval: nothing more goes to trackio, .* RuntimeError: api key"):
        trackers = Trackers(
            "eval",
            [
                ("wandb", lambda: broken),
                ("trackio", never),
                ("tensorboard", lambda: TensorBoardTracker.anew(tmp_path)),
            ],
        )
    with pytest.warns(UserWarning, match="goes to wandb, .* ConnectionError: no route to host"):
        trackers.log(entry(1))
    trackers.log(entry(2))
    trackers.close()
    assert broken.asked == 1
    assert len(events_of(tmp_path).Scalars("stepscope/eval/level")) == 2


def test_tensorboard_is_the_default_where_the_run_has_it(tmp_path: Path) -> None:
    where = {"what": "eval", "beside": tmp_path, "sent": tmp_path / "sent.yaml"}
    assert not open_trackers(None, **where).active
    (tmp_path / "tensorboard").mkdir()
    trackers = open_trackers(None, **where)
    assert [tracker.name for tracker in trackers.active] == ["tensorboard"]
    trackers.close()
    assert not open_trackers([], **where).active


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else object())
    require_installed(["wandb"])
    with pytest.raises(ConfigError, match=r"report_to: trackio is not installed; install it \(pip install"):
        require_installed(["wandb", "trackio"])


def test_a_step_is_sent_to_a_run_once(tmp_path: Path) -> None:
    sent = Sent(tmp_path / "a" / "sent.yaml")
    assert sent.last_run("wandb") is None
    assert sent.claim("wandb", "one", "eval", 3)
    assert not sent.claim("wandb", "one", "eval", 3)
    again = Sent(tmp_path / "a" / "sent.yaml")
    assert not again.claim("wandb", "one", "eval", 3)
    assert again.claim("wandb", "one", "eval", 4)
    assert again.claim("trackio", "one", "eval", 3)
    assert again.claim("wandb", "two", "eval", 3)
    assert again.last_run("wandb") == "two"
    assert (again.count("wandb", "one"), again.count("wandb", "three")) == (2, 0)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls, the second with a step more: one run, every step once."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    wandb_offline(tmp_path, monkeypatch)
    for steps in ([1], [1, 2]):
        trackers = open_trackers(["wandb"], what="eval", beside=tmp_path, sent=tmp_path / "sent.yaml")
        for step in steps:
            trackers.log(entry(step))
        trackers.close()
    rows = [row for row in wandb_history(tmp_path) if "stepscope/eval/step" in row]
    assert [(row["_step"], row["stepscope/eval/step"]) for row in rows] == [(0, 1), (1, 2)]
    assert [row["stepscope/eval/level"] for row in rows] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert "stepscope/eval/nothing" not in rows[0]
    spread = rows[1]["stepscope/eval/spread"]
    assert (spread["_type"], sum(spread["values"])) == ("histogram", 3)
    assert (spread["bins"][0], spread["bins"][-1]) == (1.0, 8.0)
    files = sorted(tmp_path.glob("wandb/offline-run-*/files"))
    assert len({folder.parent.name.split("-")[-1] for folder in files}) == 1

    def content(row: dict, name: str) -> str:
        path, *_ = [f for folder in files if (f := folder / row[name]["path"]).is_file()]
        return path.read_text(encoding="utf-8")

    assert content(rows[0], "stepscope/eval/responses") == coloured_html(entry(1).responses)
    table = json.loads(content(rows[0], "stepscope/eval/responses_table"))
    assert table["columns"] == ["prompt", "response", "tokens", "sum of change, nats", "reward", "note"]
    ((prompt, response, count, total, reward, note),) = table["data"]
    assert (prompt, count, reward, note) == (RESPONSE.prompt, len(TOKENS), 1.0, "<b>")
    assert response == RESPONSE.text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    assert total == pytest.approx(np.nansum(VALUES))
    figures = json.loads(content(rows[0], "stepscope/eval/figures"))
    assert figures["data"] == [["level", 0.25, 0.1, 0.05, None, "nats/token", True, ""]]


TRACKIO = """
from pathlib import Path
from stepscope.trackers import open_trackers
from test_trackers import entry
for steps in ([1], [1, 2]):
    trackers = open_trackers(["trackio"], what="eval", beside=Path("run"), sent=Path("sent.yaml"))
    for step in steps:
        trackers.log(entry(step))
    trackers.close()
"""


def test_trackio_offline(tmp_path: Path) -> None:
    """The same, out of Trackio's own database; it takes its folder from the environment when it is loaded."""
    pytest.importorskip("trackio", reason="trackio is not installed: make test-beside installs and tests it")
    environment = os.environ | {
        "TRACKIO_DIR": str(tmp_path / "kept"),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    subprocess.run([sys.executable, "-c", TRACKIO], cwd=tmp_path, env=environment, check=True, timeout=120)
    (database,) = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step) for name, step, _ in found] == [("run-eval", 1), ("run-eval", 2)]
    rows = [json.loads(metrics) for _, _, metrics in found]
    assert [row["stepscope/eval/level"] for row in rows] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert sum(rows[1]["stepscope/eval/spread"]["values"]) == 3
    (page,) = (tmp_path / "kept").glob("media/*/*/1/*.html")
    assert coloured_html(entry(1).responses) in page.read_text(encoding="utf-8")
    (row,) = rows[0]["stepscope/eval/responses_table"]["_value"]
    assert row["prompt"] == RESPONSE.prompt
    assert row["sum of change, nats"] == pytest.approx(np.nansum(VALUES))
