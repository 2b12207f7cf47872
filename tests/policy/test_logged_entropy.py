"""The entropy of a checkpoint's responses against what its trainer logged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stepscope.policy.check.health.entropy import NEAR, logged_entropy
from stepscope.stats import Estimate


def entropy(value: float, stderr: float) -> Estimate:
    return Estimate(value, stderr, 64, "nats/token", "test")


def log(folder: Path, values: dict[int, float]) -> Path:
    entries = [{"step": step, "reward": 0.1, "entropy": value} for step, value in values.items()]
    supervised = {"step": 8, "loss": 0.1, "entropy": 9.0}
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*entries, supervised]}))
    return folder


def test_the_last_values_up_to_the_step_count(tmp_path: Path) -> None:
    log(tmp_path, {10 * k: float(k) for k in range(1, 11)})
    found = logged_entropy(tmp_path, 80)
    assert found is not None
    assert (found.count, found.first_step, found.last_step) == (NEAR, 40, 80)
    assert found.value == 6.0
    assert found.scatter == pytest.approx(math.sqrt(2.5))
    assert logged_entropy(tmp_path, 9) is None
    (tmp_path / "trainer_state.json").unlink()
    assert logged_entropy(tmp_path, 80) is None


@pytest.mark.parametrize(
    ("value", "stderr", "far"),
    [
        (0.52, 0.001, False),  # within the log's own scatter
        (0.7, 0.001, False),  # beyond all errors, and yet as other prompts may be
        (1.6, 0.05, True),
        (0.15, 0.02, True),
        (1.6, 0.4, False),  # three of its own errors
    ],
)
def test_far_is_beyond_error_scatter_and_ratio(
    tmp_path: Path, value: float, stderr: float, far: bool
) -> None:
    logged = logged_entropy(log(tmp_path, {1: 0.48, 2: 0.5, 3: 0.52}), 3)
    assert logged is not None
    said = logged.doubt(entropy(value, stderr))
    assert bool(said) is far
    if far:
        assert f"{value:.3g} +- {stderr:.2g} nats per token, and the trainer logged 0.5 +- 0.02" in said
        assert "3 values of steps 1 to 3" in said


def test_one_value_has_no_scatter(tmp_path: Path) -> None:
    logged = logged_entropy(log(tmp_path, {5: 0.5}), 7)
    assert logged is not None
    assert math.isnan(logged.scatter)
    assert "the trainer logged 0.5 (step 5)" in logged.doubt(entropy(1.5, 0.05))
