"""``stepscope ledger`` on a real small recorded training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import cases
import stepscope as ss
from stepscope.config import LedgerConfig, TrainConfig, build_config
from stepscope.errors import MeasurementError, RunFolderError
from stepscope.pipeline import run_ledger
from stepscope.pipeline.ledger import places
from stepscope.pipeline.ledger.run import sentences
from stepscope.policy.recorded import RecordedTraining
from stepscope.results.ledger import LEDGER, STEPS, TOKENS
from stepscope.results.recording import StepFigures
from stepscope.training import train

QUANTITIES = ["entropy", "entropy_fixed_prefix"]


@pytest.fixture(scope="module")
def recorded(small_training: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps after the warm-up of ``trained_run``, clipped, with whole states at every second."""
    out = cases.start_from(trained_run, tmp_path_factory.mktemp("recorded") / "run")
    plain = yaml.safe_load(small_training.read_text())
    optimizer = {"lr": 3e-4, "weight_decay": 0.1, "max_grad_norm": 0.02}
    plain["rl"] |= {"steps": 5, "save_every": 5, "record": {"state_every": 2}, "optimizer": optimizer}
    train(build_config(TrainConfig, plain), out, resume=True)
    return out


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
    }
    return build_config(LedgerConfig, plain | changes)


@pytest.fixture(scope="module")
def made(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ledger") / "all"
    run_ledger(settings(recorded, out))
    return out


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
    for name in (LEDGER, TOKENS, STEPS):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    assert len(list((out / "ledger_parts").glob("carry-*"))) == 1


def test_a_part_of_the_training_has_moments_before_it(recorded: Path, made: Path, tmp_path: Path) -> None:
    run_ledger(
        settings(recorded, tmp_path, start=2, stop=5, every=2, through=["fixed"], quantities=["entropy"])
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


def test_refusals(recorded: Path, trained_run: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="was not recorded"):
        run_ledger(settings(trained_run, tmp_path))
    with pytest.raises(RunFolderError, match="exists already"):
        run_ledger(settings(recorded, made))
    with pytest.raises(MeasurementError, match="recorded is from 0 to 5"):
        run_ledger(settings(recorded, tmp_path, stop=9))
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
