"""A recorded training that is killed, wherever it is, leaves the record of one that was not."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from killed import kill, same_state, start, wait_for, with_ten_kills, write_config
from recorded_steps import contents

import cases
from stepscope.policy.recorded import RecordedTraining
from stepscope.results.recording import step_folder
from stepscope.training import train

STEPS = 6


def test_two_kills_leave_the_record_of_an_undisturbed_training(small_run: Path, tmp_path: Path) -> None:
    """Once before there is a checkpoint to go on from, once with a step recorded behind the last one."""
    config = cases.training(rl={"record": {"state_every": 4}, "steps": STEPS})
    path = write_config(config, tmp_path)
    for name in ("once", "often"):
        cases.start_from(small_run, tmp_path / name)
    train(config, tmp_path / "once", resume=True)
    often = tmp_path / "often"
    first = start(path, often)
    wait_for(step_folder(often / "record", 1), first)
    kill(first)
    assert not (often / "checkpoints" / "step-2").exists()
    second = start(path, often)
    wait_for(often / "checkpoints" / "step-2", second)
    wait_for(step_folder(often / "record", 3), second)
    time.sleep(random.uniform(0.0, 0.1))
    kill(second)
    train(config, often, resume=True)
    same_state(*(tmp_path / run / "checkpoints" / f"step-{STEPS}" for run in ("once", "often")))
    assert contents(tmp_path / "once" / "record") == contents(often / "record")
    training = RecordedTraining.load(often)
    assert training.steps == range(1, STEPS + 1)
    assert training.folder.record.complete
    assert training.verify()


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace_in_the_record(small_run: Path, tmp_path: Path) -> None:
    path = write_config(cases.training(rl={"record": {"state_every": 5}, "steps": 40}), tmp_path)
    for name in ("once", "often"):
        cases.start_from(small_run, tmp_path / name)
    assert with_ten_kills(path, tmp_path / "once", tmp_path / "often") == 10, "over before it could be killed"
    assert contents(tmp_path / "once" / "record") == contents(tmp_path / "often" / "record")
    assert RecordedTraining.load(tmp_path / "often").verify()
