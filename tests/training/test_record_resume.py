"""A recorded training that is killed, wherever it is, leaves the record of one that was not."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from killed import finish, kill, same_state, start, wait_for, write_config
from recorded_steps import contents

import cases
from stepscope.policy.recorded import RecordedTraining
from stepscope.reading.recording import recorded_steps
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
    once, often = tmp_path / "once", tmp_path / "often"
    for out in (once, often):
        cases.start_from(small_run, out)
    begin = time.perf_counter()
    finish(start(path, once))
    step = (time.perf_counter() - begin) / 40
    moments = random.Random(0)
    done = 0
    for _ in range(10):
        process = start(path, often)
        target = min(done + moments.randint(0, 3), 30)  # a slow machine has ten steps left for a kill
        if target:
            wait_for(step_folder(often / "record", target), process)
        time.sleep(moments.uniform(0.0, step))
        assert process.poll() is None, "the training was over before it could be killed"
        kill(process)
        done = max(recorded_steps(often / "record"), default=0)
    finish(start(path, often))
    assert contents(once / "record") == contents(often / "record")
    assert RecordedTraining.load(often).verify()
