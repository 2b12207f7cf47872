"""``stepscope ledger RUN --without RULE`` on a real small recorded training, trained again without tokens."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import cases
import stepscope as ss
from pages import held
from stepscope import cli
from stepscope.config import LedgerConfig, TrainConfig, WhatIfConfig, build_config
from stepscope.errors import ConfigError, MeasurementError, RunFolderError
from stepscope.measure.ledger.without import apart
from stepscope.pipeline import run_ledger, run_train, run_what_if
from stepscope.pipeline.ledger.retrain import dose_folder, folder_of, retraining
from stepscope.policy.recorded import RecordedTraining
from stepscope.reading.recording import RecordFolder, find_record
from stepscope.reading.rollups import recorded_tokens
from stepscope.report import text
from stepscope.results.what_if import AGAIN, HELD, RECORDED, REWEIGHTED, WhatIfCurves, horizon
from stepscope.rules import TokenRule, Without

RULE = "quadrant=wrong, rare|right, rare"
STEPS = 4


@pytest.fixture(scope="module")
def run(small_training: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recorded steps after the warm-up of ``trained_run``, with their ledger."""
    out = cases.start_from(trained_run, tmp_path_factory.mktemp("what-if") / "run")
    plain = yaml.safe_load(small_training.read_text())
    plain["rl"] |= {
        "steps": STEPS,
        "save_every": STEPS,
        "record": {"state_every": 2},
        "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
    }
    config = build_config(TrainConfig, plain | {"sft": None, "out": str(out)})
    source = {"model": config.model.model_dump() | {"source": str(out / "base")}}
    shutil.move(out / "base", out.parent / "base")
    source["model"]["source"] = str(out.parent / "base")
    run_train(build_config(TrainConfig, config.model_dump() | source))
    ledger = {"run": str(out), "probe": {"num_prompts": 16}, "end_samples": 2, "num_folds": 8}
    run_ledger(
        build_config(LedgerConfig, ledger | {"precision": "float64", "through": ["fixed", "optimizer"]})
    )
    return out


@pytest.fixture(scope="module")
def made(run: Path) -> Path:
    """With the training again, at two doses."""
    settings = {"run": str(run), "rule": RULE, "doses": [0.1, 1.0], "every": 2, "samples": 2, "retrain": True}
    run_what_if(build_config(WhatIfConfig, settings))
    return run


def test_the_training_again_leaves_out_the_tokens_of_the_table(made: Path) -> None:
    """What TRL's loss was given: (1 - dose) A exactly on the tokens that the rule finds in the new record."""
    whole = find_record(made).batch(1)
    for dose in (0.1, 1.0):
        folder = made / "retrained" / folder_of(RULE) / dose_folder(dose)
        record = find_record(folder)
        rule, changed = TokenRule.parse(RULE), 0
        for step in record.steps:
            rollouts = record.batch(step).rollouts
            table = with_given(record, step)
            given = rollouts.flat(rollouts.token_advantages)
            plain = table.given.to_numpy()
            inside = rule.inside(table.assign(advantage=plain))
            sure = np.abs(table.logprob + table.entropy) > 1e-5  # round-off decides the sign of the others
            factor = np.where(inside, 1 - dose, 1.0)
            np.testing.assert_allclose(given[sure], (factor * plain)[sure], rtol=1e-5, atol=1e-7)
            changed += int((given != plain).sum())
        assert changed > 10
        first = record.batch(1)
        assert first.rollouts.response_token_ids == whole.rollouts.response_token_ids
        kept = np.concatenate(first.token_weights), np.concatenate(whole.token_weights)
        inside = rule.inside(ss.load_ledger(made).recorded.query("step == 1"))
        assert inside.any()
        np.testing.assert_allclose(kept[0], kept[1] * np.where(inside, 1 - dose, 1.0), rtol=1e-4, atol=1e-9)


def with_given(record: RecordFolder, step: int) -> pd.DataFrame:
    """The table of a step's tokens with the advantages of their sequences, before any objective."""
    rollouts = record.batch(step).rollouts
    table = recorded_tokens(record, step, step)
    return table.assign(given=rollouts.advantages[rollouts.places[0]])


def test_curves_and_outcomes_are_those_of_the_paths(made: Path) -> None:
    found = ss.load_ledger(made)
    (each,) = found.what_if.values()
    result, curves = each.result, each.curves
    assert (result.rule, result.first_step, result.last_step) == (RULE, 1, STEPS)
    inside = TokenRule.parse(RULE).inside(found.recorded)
    assert (result.tokens, result.all_tokens) == (inside.sum(), len(inside))
    weights = found.recorded.token_weight.abs()
    assert result.weight == pytest.approx(weights[inside].sum() / weights.sum())
    assert set(curves.quantity) == {"entropy", "reward"}
    recorded = curves.of("entropy", 0.0, RECORDED)
    assert recorded.step.tolist() == [0, 2, 4]
    assert (recorded.difference == 0).all()
    training = RecordedTraining.load(made)
    for outcome in result.outcomes:
        by_path = {
            path: curves.of(outcome.quantity, outcome.dose, path) for path in (HELD, REWEIGHTED, AGAIN)
        }
        again = RecordedTraining.load(made / "retrained" / folder_of(RULE) / dose_folder(outcome.dose))
        was = curves.of(outcome.quantity, 0.0, RECORDED)
        for path, curve in by_path.items():
            assert curve.step.tolist() == [0, 2, 4]
            assert curve.difference[0] == curve.distance[0] == 0
            np.testing.assert_allclose(curve.level - was.level, curve.difference, atol=1e-12)
            assert (np.diff(curve.distance) > 0).all()
            estimate = getattr(outcome, path)
            assert estimate.value == pytest.approx(curve.difference[-1])
            assert (estimate.low, estimate.high) == (curve.difference_low[-1], curve.difference_high[-1])
        real = by_path[AGAIN]
        expected = apart(again.state(STEPS).parameters, training.state(STEPS).parameters)
        assert real.distance[-1] == pytest.approx(expected)
        for path in (HELD, REWEIGHTED):
            curve = by_path[path]
            np.testing.assert_allclose(curve.gap, real.difference - curve.difference, atol=1e-12)
            assert outcome.horizons[path] in (0, 2, 4)
            assert curve.apart[1] < real.distance[1]
        speaks = by_path[REWEIGHTED].effective >= 0.5
        assert outcome.trusted == by_path[REWEIGHTED].step[speaks].max()
        assert ("speaks for the shifted policy" in outcome.reweighted.reason) == (not speaks.all())
        assert (by_path[HELD].effective == 1).all()
    small, large = (o for o in result.outcomes if o.quantity == "entropy")
    assert small.first_order.value == pytest.approx(0.1 * large.first_order.value)
    own = found.tokens.where((found.tokens.quantity == "entropy") & (found.tokens.through == "fixed"))
    assert large.first_order.value == pytest.approx(-own.influence[inside].sum())
    assert large.first_order == found.without(RULE)
    assert found.without(lambda table: TokenRule.parse(RULE).inside(table)).value == large.first_order.value
    free = found.tokens.where((found.tokens.quantity == "entropy") & (found.tokens.through == "optimizer"))
    assert small.through_optimizer == pytest.approx(-0.1 * free.influence[inside].sum())
    assert [o.first_order for o in result.outcomes if o.quantity == "reward"] == [None, None]


def test_the_page_shows_what_the_files_say(made: Path) -> None:
    page = (made / "ledger.html").read_text()
    assert "Entropy without quadrant=wrong, rare|right, rare" in page
    assert f"{text.quantity_name('reward').capitalize()} without" in page
    specs = held(page)
    names = [[trace.get("name") for trace in s["data"]] for s in specs if "data" in s]
    (lines,) = [
        s
        for s, n in zip([s for s in specs if "data" in s], names, strict=True)
        if "dose 1, trained again" in n
    ][:1]
    (each,) = ss.load_ledger(made).what_if.values()
    for trace in lines["data"][1:]:
        dose, words = re.fullmatch(r"dose ([\d.]+), (.*)", trace["name"]).groups()
        path = AGAIN if "again" in words else HELD if "held" in words else REWEIGHTED
        curve = each.curves.of("entropy", float(dose), path)
        np.testing.assert_allclose(trace["y"], curve.level, rtol=1e-4)


def test_the_command_line(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "ledger"
    shutil.copytree(made, out, ignore=shutil.ignore_patterns("what_if", "*.html", "checkpoints"))
    arguments = [
        "ledger",
        str(made),
        "--out",
        str(out),
        "--without",
        "kind=digits",
        "--dose",
        "0.5",
        "--every",
        "4",
    ]
    done = CliRunner().invoke(cli.app, [*arguments, "samples=1"])
    assert done.exit_code == 0, done.output
    (each,) = ss.load_ledger(out).what_if.values()
    assert each.result.rule == "kind=digits"
    assert {o.retrained for o in each.result.outcomes} == {None}
    assert np.isnan(each.curves.gap).all()
    assert "Entropy without kind=digits" in (out / "ledger.html").read_text()
    for wrong, message in (
        (["--without", "kind=digit"], "no class 'digit' of kind; expected one of digits"),
        (
            ["--without", "kind=digits", "--dose", "half"],
            "--dose: expected numbers such as 0.25,0.5,1, got 'half'",
        ),
        (["--without", "kind=digits", "--dose", "2"], "less than or equal to 1"),
        (["--without", "kind=digits", "--to", "3"], "--to is a setting of the ledger that is there"),
        (["--retrain"], "--dose and --retrain belong to --without RULE"),
        (["--without", "token=@@"], "no token of the training is of class '@@'"),
    ):
        failed = CliRunner().invoke(cli.app, ["ledger", str(made), *wrong])
        assert failed.exit_code == 2
        assert message in " ".join(failed.output.split())


def test_refusals(made: Path, trained_run: Path, tmp_path: Path) -> None:
    def settings(**changes: Any) -> WhatIfConfig:
        return build_config(WhatIfConfig, {"run": str(made), "rule": RULE, "doses": [1.0]} | changes)

    with pytest.raises(RunFolderError, match=r"no ledger.json, .* make it first"):
        run_what_if(settings(run=str(trained_run)))
    with pytest.raises(ConfigError, match="does not know the step of a token before the step"):
        run_what_if(settings(rule="step=1", retrain=True))
    with pytest.raises(MeasurementError, match="no token of the training is of class '99'"):
        run_what_if(settings(rule="step=99"))
    with pytest.raises(MeasurementError, match="the function gave 1 values"):
        ss.load_ledger(made).without(lambda table: [True])
    objective = Without(rule=RULE)
    bare = tmp_path / "bare"
    shutil.copytree(made / "record", bare / "record")
    with pytest.raises(RunFolderError, match="training again needs the run folder of `stepscope train`"):
        retraining(bare, tmp_path / "out", objective, stop=STEPS, state_every=2)
    again = made / "retrained" / folder_of(RULE) / dose_folder(1.0)
    with pytest.raises(ConfigError, match=r"rl.objective is there already"):
        retraining(again, tmp_path / "out", objective, stop=STEPS, state_every=2)
    other = tmp_path / "other"
    shutil.copytree(made, other)
    record = other / "retrained" / folder_of(RULE) / dose_folder(1.0) / "record"
    for name in ("sequences.parquet", "tokens.parquet"):
        shutil.copy(record / "steps" / "000002" / name, record / "steps" / "000001" / name)
    with pytest.raises(RunFolderError, match="its first batch is not the first batch of"):
        run_what_if(settings(run=str(other)))


def test_the_horizon_is_where_a_prediction_leaves_the_training() -> None:
    def curve(gap: list[float], difference: list[float]) -> WhatIfCurves:
        count = len(gap)
        numbers = {name: np.zeros(count) for name in WhatIfCurves.__dataclass_fields__}
        texts = {name: np.full(count, "", dtype=object) for name in ("quantity", "path")}
        given = {
            "step": np.arange(count) * 5,
            "gap": np.array(gap),
            "gap_low": np.array(gap) - 1,
            "gap_high": np.array(gap) + 1,
            "difference": np.array(difference),
        }
        return WhatIfCurves(**(numbers | texts | given))

    real = curve([np.nan] * 5, [0.0, 1, 10, 10, 10])
    assert horizon(curve([0.0, 0.9, 4.9, 5.1, 0], [0.0] * 5), real) == 10
    assert horizon(curve([0.0, 1.1, 0, 0, 0], [0.0] * 5), real) == 0
    assert horizon(curve([0.0, -0.9, -4, 3, 5], [0.0] * 5), real) == 20
