"""A user's own loss: imported when they name it, checked, recorded; never because a file names it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cases
from stepscope.config import MeasureConfig, build_config
from stepscope.errors import ConfigError, MeasurementError, RunFolderError
from stepscope.pipeline import run_measure
from stepscope.policy import vectors
from stepscope.policy.checkpoint.load import read_settings
from stepscope.policy.loss.own import use_own_loss
from stepscope.policy.loss.registry import LOSSES
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import token_weights

SOURCE = """
import pathlib

import torch

pathlib.Path({mark!r}).write_text("imported")


def grpo(logprobs, old_logprobs, advantages, mask, settings, ref_logprobs):
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    loss = -torch.min(ratio * advantages, clipped * advantages) * settings.loss_parameters.get("scale", 1.0)
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


def per_token(logprobs, *rest):
    return logprobs


def detached(logprobs, *rest):
    return logprobs.detach().sum()


def infinite(logprobs, *rest):
    return (logprobs / 0.0).sum()


def flat(logprobs, *rest):
    return (0.0 * logprobs).sum()


def everywhere(logprobs, *rest):
    return -logprobs.sum()


constant = 3
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module ``mine`` in the working directory, which leaves this file when it is imported."""
    file = tmp_path / "mark"
    (tmp_path / "mine.py").write_text(SOURCE.format(mark=str(file)))
    monkeypatch.chdir(tmp_path)
    known = dict(LOSSES)
    path = list(sys.path)
    yield file
    LOSSES.clear()
    LOSSES.update(known)
    sys.modules.pop("mine", None)
    assert sys.path == path


def test_a_function_gives_the_token_weights_of_the_same_loss_built_in(mark: Path) -> None:
    use_own_loss("mine:grpo")
    assert mark.read_text() == "imported"
    policy = cases.policy()
    update = cases.batch(policy)
    rng = np.random.default_rng(0)
    now = [row + 0.3 * rng.standard_normal(len(row)) for row in update.logprobs]
    ours = token_weights(
        update, StepSettings(loss_type="mine:grpo", loss_parameters={"scale": 2.0}), logprobs=now
    )
    theirs = token_weights(update, StepSettings(loss_type="grpo"), logprobs=now)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, 2 * b, rtol=1e-12)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("per_token", r"it returned a tensor of shape \(9, \d\), expected a scalar"),
        ("detached", "does not depend on the log-probs in a way that can be differentiated"),
        ("infinite", "its value is (-inf|nan)"),
        ("flat", "its derivative by every log-prob is 0"),
        ("everywhere", r"not 0 outside the mask; use torch\.where"),
    ],
)
def test_what_is_no_loss_is_refused(mark: Path, function: str, message: str) -> None:
    use_own_loss(f"mine:{function}")
    policy = cases.policy()
    with pytest.raises(MeasurementError, match=f"loss mine:{function}: .*{message}"):
        token_weights(cases.batch(policy), StepSettings(loss_type=f"mine:{function}"))


def test_names_without_a_function_are_refused(mark: Path) -> None:
    for name, message in (
        ("not_there:grpo", "no module 'not_there'"),
        ("mine:gspo", "mine has no function 'gspo'"),
        ("mine:constant", "mine has no function 'constant'"),
        (":grpo", "no module ''"),
    ):
        with pytest.raises(ConfigError, match=message):
            use_own_loss(name)


def test_a_file_that_names_a_function_imports_nothing(mark: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    StepSettings(loss_type="mine:grpo").save(folder)
    (folder / "config.json").write_text("{}")
    settings = read_settings(folder)
    with pytest.raises(ConfigError, match=r"somebody's own.*give loss\.loss_type=mine:grpo yourself"):
        token_weights(cases.batch(cases.policy()), settings)
    assert not mark.exists()
    assert "mine" not in sys.modules
    assert read_settings(folder, overrides={"loss_type": "mine:grpo"}) == settings
    assert mark.exists()


def test_a_measurement_records_where_its_loss_came_from(mark: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The same step as with the loss built in; a changed file is not gone on with."""
    asked = {**cases.MEASUREMENT, "checkpoint": str(checkpoint), "stages": ["rollouts", "step"]}
    for name, loss in (("own", "mine:grpo"), ("known", "grpo")):
        run_measure(
            build_config(MeasureConfig, asked | {"out": str(tmp_path / name), "loss": {"loss_type": loss}})
        )
    own, known = (vectors.load(tmp_path / name / "direction.safetensors") for name in ("own", "known"))
    assert vectors.cosine(own, known) == pytest.approx(1.0, abs=1e-12)
    file = tmp_path / "mine.py"
    record = json.loads((tmp_path / "own" / "provenance.json").read_text())["own_loss"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record == {"name": "mine:grpo", "file": str(file), "sha256": digest}
    assert "own_loss" not in json.loads((tmp_path / "known" / "provenance.json").read_text())
    file.write_text(file.read_text() + "\n# changed\n")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    again = build_config(
        MeasureConfig,
        asked | {"out": str(tmp_path / "own"), "loss": {"loss_type": "mine:grpo"}, "stages": ["change"]},
    )
    with pytest.raises(RunFolderError, match="the file of the loss mine:grpo has changed"):
        run_measure(again, resume=True)
