"""``stepscope ledger`` on a real small recorded training."""

from __future__ import annotations

import html
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import stepscope as ss
from browser import find_chromium, open_browser
from pages import held
from stepscope.config import LedgerConfig, build_config
from stepscope.errors import CheckpointError, ConfigError, MeasurementError, RunFolderError
from stepscope.measure.ledger.path import displacement_parts
from stepscope.measure.ledger.recorded import RecordedPath
from stepscope.pipeline import run_ledger
from stepscope.pipeline.ledger import places
from stepscope.pipeline.ledger.run import sentences
from stepscope.pipeline.ledger.shared import Accounting
from stepscope.pipeline.report import run_report
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import directional_derivative, response_entropy
from stepscope.policy.recorded import RecordedTraining, TrainingState
from stepscope.report import text
from stepscope.results.kinship import KIN_ROWS, KINS, KINSHIP
from stepscope.results.ledger import FOLDS, LEDGER, ROLLUPS, STEPS, TOKEN_FOLDS, TOKENS
from stepscope.results.recording import StepFigures
from stepscope.results.rollups import LedgerRollups
from stepscope.rules.token_classes import WAYS
from stepscope.trackers.texts import LOWERS, RAISES
from tracked import events_of, read, texts_of

CHROMIUM = find_chromium()
QUANTITIES = ["entropy", "entropy_fixed_prefix"]


def settings(run: Path, out: Path, **changes: Any) -> LedgerConfig:
    plain = {
        "run": str(run),
        "out": str(out),
        "quantities": QUANTITIES,
        "through": ["fixed", "optimizer"],
        "probe": {"num_prompts": 16},
        "end_samples": 2,
        "num_folds": 3,
        "precision": "float64",
        "kinship": {"every": 2, "tokens": 32},
    }
    return build_config(LedgerConfig, plain | changes)


@pytest.fixture(scope="module")
def made(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ledger") / "all"
    run_ledger(settings(recorded, out, report_to=["tensorboard"]))
    return out


def test_tensorboard_shows_what_the_files_say(made: Path) -> None:
    found, events = ss.load_ledger(made), events_of(made / "tensorboard" / "ledger")
    steps = found.steps.to_pandas()
    for quantity in QUANTITIES:
        own, table = steps[steps.quantity == quantity], found.table(quantity)
        for part in ("tokens", "decay", "level", "change"):
            shown = [(e.step, e.value) for e in events.Scalars(f"stepscope/ledger/{quantity}/{part}")]
            assert shown == [(s, pytest.approx(v)) for s, v in zip(own.step, own[part], strict=True)]
        for event in events.Histograms(f"stepscope/ledger/{quantity}/influence"):
            mine = table.influence[table.step == event.step]
            assert event.histogram_value.num == len(mine)
            assert event.histogram_value.sum == pytest.approx(mine.sum())
    (figures,) = texts_of(events, "stepscope/ledger/figures").values()
    assert f"<td>{found.account('entropy').closing_error.value:.3g}</td>" in figures
    ((last, page),) = texts_of(events, "stepscope/ledger/responses").items()
    totals = found.table().groupby(["step", "sequence_id"]).influence.sum()
    step, sequence = totals.abs().idxmax()
    assert last == found.ledger.last_step
    assert f"step {step}, influence {totals[step, sequence]:.3g}" in page
    response = found.record.batch(step).rollouts.responses[sequence]
    shown = read(page).replace(LOWERS, "").replace(RAISES, "").replace("\N{RETURN SYMBOL}", "")
    assert read(html.escape(response)) in shown


def test_a_ledger_shows_its_account_and_its_largest_tokens(made: Path) -> None:
    found = ss.load_ledger(made)
    account = found.ledger.accounts[0]
    assert text.bare(account.closing_error) in found._repr_html_().replace("\u00a0", " ")
    bars, _ = found.plot("waterfall").data
    assert sum(bars.y) == pytest.approx(account.realised.value, rel=1e-3, abs=1e-6)
    table = found.to_pandas()
    assert len(table) == len(found.recorded)
    first = table.loc[table.influence.abs().idxmax()]
    assert f"step {first.step}, " in repr(found.show(most=1))
    assert found.show(most=3).html.count("<details") == 3


def test_parts_add_up_to_the_change_along_the_displacements(made: Path, recorded: Path) -> None:
    """Every token of every batch, the decay and what was in the moments, which the training began without."""
    found = ss.load_ledger(made)
    training = RecordedTraining.load(recorded)
    assert [a.quantity for a in found.ledger.accounts] == QUANTITIES
    assert min(training.folder.figures(i).clip_coefficient for i in training.steps) < 0.9
    tokens, steps = found.tokens.to_pandas(), found.steps.to_pandas()
    for account in found.ledger.accounts:
        parts = account.tokens.value + account.decay.value + account.momentum_before.value
        assert account.predicted.value == pytest.approx(parts, rel=1e-12)
        assert (
            abs(account.rounding.value) < 1e-4 * abs(steps[steps.quantity == account.quantity].change).max()
        )
        own = tokens[(tokens.quantity == account.quantity) & (tokens.through == "fixed")]
        assert account.tokens.value == pytest.approx(own.influence.sum(), rel=1e-9)
        by_step = own.groupby("step").influence.sum()
        mine = steps[steps.quantity == account.quantity].set_index("step")
        np.testing.assert_allclose(by_step, mine.tokens, rtol=1e-9)
        assert mine.change.sum() == pytest.approx(parts + account.rounding.value, rel=1e-9)
        assert account.momentum_before.value == 0
        assert account.predicted.stderr > 0
        free = tokens[(tokens.quantity == account.quantity) & (tokens.through == "optimizer")]
        assert account.through_optimizer.value == pytest.approx(free.influence.sum(), rel=1e-9)
    batch = training.folder.batch(1).rollouts
    first = tokens[(tokens.step == 1) & (tokens.quantity == "entropy") & (tokens.through == "fixed")]
    assert len(first) == int(batch.num_policy_tokens.sum())
    np.testing.assert_allclose(first.own_step + first.later, first.influence, rtol=1e-9, atol=1e-18)
    last = tokens[tokens.step == 5]
    np.testing.assert_allclose(last.later, 0, atol=1e-15)
    assert (first.stderr > 0).any()
    assert set(steps[steps.level.notna()].step) == {1, 2, 3, 4, 5}


def test_what_is_realised_is_what_the_account_says(made: Path) -> None:
    """At fixed prefixes there is no sampling error between the two: to the order of the steps."""
    found = ss.load_ledger(made)
    fixed = found.account("entropy_fixed_prefix")
    assert fixed.predicted.value == pytest.approx(fixed.realised.value, rel=0.02, abs=2e-5)
    assert fixed.predicted.stderr == pytest.approx(fixed.realised.stderr, rel=0.05)
    assert fixed.closing_error.stderr < 0.1 * fixed.realised.stderr
    assert fixed.chained.value == pytest.approx(fixed.realised.value, rel=1e-6)
    entropy = found.account("entropy")
    assert entropy.closing_error.low < 0 < entropy.closing_error.high
    assert entropy.curvature.stderr < 0.2 * entropy.predicted.stderr
    assert found.ledger.predicted == entropy.predicted
    assert "entropy, steps 1 to 5: " in sentences(found.ledger)[0]


def test_a_killed_ledger_goes_on_to_the_same_bytes(
    made: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    calls = 0
    real = places._settle

    def dies(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 5):
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(places, "_settle", dies)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run_ledger(settings(recorded, out), resume=resume)
        assert not (out / LEDGER).exists()
    run_ledger(settings(recorded, out), resume=True)
    for name in (LEDGER, TOKENS, STEPS, FOLDS, TOKEN_FOLDS, ROLLUPS, KINSHIP, KIN_ROWS):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    assert len(list((out / "ledger_parts").glob("carry-*"))) == 1


def test_kinship_splits_what_the_tokens_did(made: Path, recorded: Path, tmp_path: Path) -> None:
    """Steps 1, 3 and 5 for all five; the first is all of its displacement but the decay."""
    found = ss.load_ledger(made)
    kinship, rows = found.kinship, found.kin_rows.to_pandas()
    assert kinship.steps.tolist() == [1, 3, 5]
    assert rows.groupby("step").stands_for.first().tolist() == [2, 2, 1]
    assert 0 < kinship.drawn < kinship.tokens
    for look in ("batch", "fresh", "held_out"):
        own = [share for share in kinship.shares if (share.look, share.steps) == (look, "all")]
        total = kinship.total(look).influence
        assert sum(share.influence.value for share in own) == pytest.approx(total.value, rel=1e-9)
        assert sum(share.share.value for share in own) == pytest.approx(1.0)
        mine = rows[rows.look == look]
        for share in own:
            kept = mine[mine.kin == share.kin]
            assert share.influence.value == pytest.approx((kept.stands_for * kept.influence).sum(), rel=1e-9)
            assert share.own_step.value == pytest.approx((kept.stands_for * kept.own_step).sum(), rel=1e-9)
            assert share.influence.stderr > 0
    assert kinship.share("batch", "same_position").draw_stderr > 0
    steps = found.steps.to_pandas().query("quantity == 'entropy'").set_index("step")
    last = rows[(rows.look == "held_out") & (rows.step == 5)]
    assert last.own_step.sum() == pytest.approx(last.influence.sum(), rel=1e-9)
    assert kinship.ledger_tokens.value == pytest.approx(float(steps.tokens[[1, 3, 5]] @ [2, 2, 1]))
    batch = RecordedTraining.load(recorded).folder.batch(1).rollouts
    first = rows[(rows.step == 1) & (rows.look == "batch") & (rows.kin == "same_position")]
    assert [batch.prompt_keys[i] for i in first.sequence_id] == first.prompt.tolist()
    work = Accounting(settings(recorded, tmp_path))
    parts = displacement_parts(work.path, 0, work.path.first_moment())
    pushed = vectors.add(parts["whole"], vectors.scale(parts["decay"], -1.0))
    with vectors.placed(work.policy.parameters, work.path.parameters(0)):
        moved = directional_derivative(work.policy, batch, response_entropy, pushed)
    mine = rows[(rows.step == 1) & (rows.look == "batch")].own_step.sum()
    assert mine == pytest.approx(float(torch.cat(moved).mean()), rel=1e-3)
    page = (made / "ledger.html").read_text()
    assert "What the tokens acted on" in page
    assert page.count(KINS["same_position"]) > 2


def test_kinship_needs_the_entropy(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kinship is of the entropy, which is not among the quantities"):
        settings(recorded, tmp_path, quantities=["reward"])


def test_a_part_of_the_training_has_moments_before_it(recorded: Path, made: Path, tmp_path: Path) -> None:
    run_ledger(
        settings(
            recorded,
            tmp_path,
            start=2,
            stop=5,
            every=2,
            through=["fixed"],
            quantities=["entropy"],
            kinship=None,
        )
    )
    account = ss.load_ledger(tmp_path).account("entropy")
    assert (ss.load_ledger(tmp_path).ledger.first_step, ss.load_ledger(tmp_path).ledger.last_step) == (3, 5)
    assert account.momentum_before.value != 0
    parts = account.tokens.value + account.decay.value + account.momentum_before.value
    assert account.predicted.value == pytest.approx(parts, rel=1e-12)
    assert abs(account.rounding.value) < 1e-4 * abs(account.predicted.value) + 1e-9
    assert not account.interpolation.reliable
    assert "too few to halve" in account.interpolation.reason
    steps = ss.load_ledger(tmp_path).steps
    assert steps.step[np.isfinite(steps.level)].tolist() == [3, 5]


def test_roll_ups_are_the_sums_of_the_files(made: Path, recorded: Path) -> None:
    """Of the parquet files and the record, joined anew; at every way what the account says of all tokens."""
    found = ss.load_ledger(made)
    tokens, folds = found.tokens.to_pandas(), found.token_folds.to_pandas()
    kept = tokens[tokens.through == "fixed"].reset_index(drop=True)
    place = ["step", "sequence_id", "position", "quantity"]
    assert (kept[place] == folds[place]).all(axis=None)
    shares = found.folds.share[:3]
    by_fold = folds[[f"fold_{k}" for k in range(3)]].to_numpy()
    np.testing.assert_allclose(by_fold @ shares, kept.influence, rtol=1e-9, atol=1e-18)
    training = RecordedTraining.load(recorded).folder
    texts, advantages = {}, {}
    for step in training.steps:
        batch = training.batch(step)
        for i, row in enumerate(batch.texts):
            advantages[step, i] = float(batch.rollouts.advantages[i])
            texts |= {(step, i, k): text for k, text in enumerate(row)}
    kept["text"] = [texts[key] for key in zip(kept.step, kept.sequence_id, kept.position, strict=True)]
    for account in found.ledger.accounts:
        own = kept.quantity == account.quantity
        for way in WAYS:
            rolled = found.rollups.of(account.quantity, way)
            assert rolled.influence.sum() == pytest.approx(account.tokens.value, rel=1e-9), way
            assert rolled.tokens.sum() == own.sum()
        rolled = found.rollups.of(account.quantity, "token")
        plain = kept[own].groupby("text").influence.sum()
        for k, label in enumerate(rolled.label):
            if label in plain:
                assert rolled.influence[k] == pytest.approx(plain[label], rel=1e-9, abs=1e-15)
        sign = [advantages[key] for key in zip(kept.step[own], kept.sequence_id[own], strict=True)]
        rolled = found.rollups.of(account.quantity, "quadrant")
        right = np.array([label.startswith("right") for label in rolled.label])
        assert rolled.influence[right].sum() == pytest.approx(
            kept.influence[own][np.array(sign) > 0].sum(), rel=1e-9, abs=1e-15
        )
        again = found.by("quadrant", account.quantity)
        assert again.to_arrow().equals(rolled.to_arrow())
    last = found.by(lambda table: table.position == table.num_tokens - 1)
    assert list(last.label) == ["False", "True"]
    assert last.influence.sum() == pytest.approx(found.account("entropy").tokens.value, rel=1e-9)
    assert not last.reliable.any()
    assert "3 folds" in last.reason[0]
    with pytest.raises(RunFolderError, match="no account of 'length'"):
        found.by("kind", "length")


def test_the_page_says_what_the_files_say(made: Path, recorded: Path) -> None:
    page = (made / "ledger.html").read_text()
    found = ss.load_ledger(made)
    account = found.account("entropy")
    assert f"closing error {text.bare(account.closing_error)} (95" in page.replace("\u00a0", " ")
    figures = held(page)
    falls = [f for f in figures if "data" in f and any("base" in trace for trace in f["data"])]
    assert len(falls) == 2
    bars = {
        name[1]: value
        for name, value in zip(falls[0]["data"][0]["customdata"], falls[0]["data"][0]["y"], strict=True)
    }
    rolled = found.rollups.of("entropy", "quadrant")
    for label, influence in zip(rolled.label, rolled.influence, strict=True):
        assert bars.pop(label, 0.0) == pytest.approx(influence, rel=1e-4, abs=1e-15)
    assert bars.pop("closing error") == pytest.approx(account.closing_error.value, rel=1e-4)
    assert bars == {"decay": pytest.approx(account.decay.value, rel=1e-4)}
    curves = next(f for f in figures if "data" in f and any(t.get("yaxis") == "y2" for t in f["data"]))
    stacked = sum(np.sum(t["y"]) for t in curves["data"] if t.get("yaxis") == "y2")
    assert stacked == pytest.approx(account.predicted.value, rel=1e-3)
    excerpts = [f for f in figures if "rows" in f and "most" in f]
    assert len(excerpts) == 2
    table = found.table("entropy").set_index(["step", "position"]).sort_index()
    for step, _, influence, *_, at, tokens in excerpts[0]["rows"][:20]:
        own = table.loc[step]
        assert (own.influence - influence).abs().min() <= 6e-3 * abs(influence)
        assert tokens[at][0] in set(own.token)
    assert len(page) < 2_000_000


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="NO BROWSER: clicks on ledger.html are not tested; run `make browser` as root",
)
def test_a_click_in_a_figure_shows_its_tokens(made: Path) -> None:
    assert CHROMIUM is not None, "CI has no browser: `make browser` did not install one"
    with open_browser(CHROMIUM) as browser:
        browser.open(made / "ledger.html", width=1280, height=800)
        browser.evaluate("document.querySelector('#fig-m0-curve').scrollIntoView()")
        browser.wait_for("!!document.querySelector('#fig-m0-curve .canvas').choosing")
        facts = "[...document.querySelectorAll('#m0 .excerpt .facts-line')].map(e => e.textContent)"
        before = browser.evaluate(facts)
        bars = "document.querySelectorAll('#fig-m0-curve .barlayer .point:nth-child(n+2) path')"
        browser.evaluate("document.querySelector('#fig-m0-curve').scrollIntoView({behavior: 'instant'})")
        place = browser.evaluate(
            f"(() => {{ const r = [...{bars}].map(b => b.getBoundingClientRect())"
            ".sort((a, b) => b.height * b.width - a.height * a.width)[0];"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            browser.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )
        browser.wait_for("document.querySelector('#m0 .excerpts select').value !== ''")
        chosen = browser.evaluate("[...document.querySelectorAll('#m0 .excerpts select')].map(s => s.value)")
        shown = browser.evaluate(facts)
        assert shown not in ([], before)
        assert all(line.startswith(f"step {chosen[0]}, {chosen[1]}, ") for line in shown)
        assert browser.evaluate("document.querySelectorAll('#m0 .t.mark').length") == len(shown)
        assert browser.errors == []


def test_texts_of_a_run_stay_texts(made: Path, recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "hostile"
    shutil.copytree(made, out, ignore=shutil.ignore_patterns("ledger_parts", "*.html"))
    shutil.copytree(recorded / "record", out / "record")
    evil = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    for folder in sorted((out / "record/steps").iterdir()):
        for name, column in (("tokens.parquet", "token"), ("sequences.parquet", "question")):
            rows = pq.read_table(folder / name)
            place = rows.column_names.index(column)
            pq.write_table(rows.set_column(place, column, pa.array([evil] * len(rows))), folder / name)
    found = ss.load_ledger(out)
    LedgerRollups.joined([found.by(way, q) for q in QUANTITIES for way in WAYS]).write(out / ROLLUPS)
    run_report(out)
    page = (out / "ledger.html").read_text()
    assert evil not in page
    assert "<img src=x" not in page
    assert page.count("onerror=alert(1)&gt;") + page.count("onerror=alert(1)\\u003e") > 10


def test_another_model_under_the_recorded_parameters_is_refused(recorded: Path, tmp_path: Path) -> None:
    """Names and shapes are the same; what the model makes of them is not."""
    other = tmp_path / "other"
    shutil.copytree(recorded / "checkpoints" / "step-5", other)
    plain = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(plain | {"rms_norm_eps": 100.0}))
    with pytest.raises(CheckpointError, match=r"log-probs of the batch of step 5 are .* another model"):
        run_ledger(settings(recorded, tmp_path / "out", checkpoint=str(other)))
    assert not (tmp_path / "out" / LEDGER).exists()


class Peak(dict[int, TrainingState]):
    """Counts the most that it held."""

    most = 0

    def __setitem__(self, key: int, value: TrainingState) -> None:
        super().__setitem__(key, value)
        self.most = max(self.most, len(self))


def test_states_on_the_way_back_keep_to_their_room(recorded: Path, tmp_path: Path) -> None:
    """A record with whole states at its ends alone."""
    copy = tmp_path / "thin"
    shutil.copytree(recorded / "record", copy)
    for number in (2, 4):
        (copy / "steps" / f"{number:06d}" / "state.safetensors").unlink()
    held = Peak()
    path = RecordedPath(RecordedTraining.load(copy), 0, 5, memory_bytes=1, _states=held)
    path.room = 2
    whole = RecordedTraining.load(recorded)
    for place in reversed(range(6)):
        theta = path.parameters(place)
        assert all(torch.equal(theta[n], p) for n, p in whole.state(place).parameters.items())
    assert 2 <= held.most <= 2 * path.room


def test_refusals(recorded: Path, trained_run: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="was not recorded"):
        run_ledger(settings(trained_run, tmp_path))
    with pytest.raises(RunFolderError, match="exists already"):
        run_ledger(settings(recorded, made))
    with pytest.raises(MeasurementError, match="recorded is from 0 to 5"):
        run_ledger(settings(recorded, tmp_path, stop=9))
    bare = tmp_path / "bare"
    shutil.copytree(recorded / "record", bare / "record")
    with pytest.raises(CheckpointError, match="has a record, and no checkpoint beside it"):
        run_ledger(settings(bare, tmp_path))
    third = bare / "record" / "steps" / "000003" / "gradient.safetensors"
    vectors.save(vectors.scale(vectors.load(third), -1.0), third)
    checkpoint = str(recorded / "checkpoints" / "step-5")
    with pytest.raises(RunFolderError, match=r"the replay of step 4 is .* away from the state that is kept"):
        run_ledger(settings(bare, tmp_path, checkpoint=checkpoint))
    record = bare / "record" / "record.json"
    record.write_text(record.read_text().replace("model.norm.weight", "other.weight"))
    with pytest.raises(RunFolderError, match=r"one of the two is of another record"):
        run_ledger(settings(bare, tmp_path, checkpoint=checkpoint))
    with pytest.raises(RunFolderError, match="no account of 'kl'"):
        ss.load_ledger(made).account("kl")
    copy = tmp_path / "changed"
    shutil.copytree(recorded, copy)
    figures = copy / "record" / "steps" / "000002" / "step.json"
    out = tmp_path / "out"
    shutil.copytree(made, out)
    run_ledger(settings(copy, out), resume=True)
    assert (out / TOKENS).read_bytes() == (made / TOKENS).read_bytes()
    altered = StepFigures.read(figures)
    replace(altered, grad_norm=2 * altered.grad_norm).write(figures)
    with pytest.raises(RunFolderError, match="the record has changed"):
        run_ledger(settings(copy, out), resume=True)
