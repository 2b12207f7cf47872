"""A training that is killed, wherever it is, ends as if it had not been."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from digits import DigitTask, digit_config, reinforced
from killed import kill, same_state, start, wait_for, with_ten_kills, write_config

import cases
from stepscope.config import TrainConfig, load_config
from stepscope.errors import RunFolderError
from stepscope.pipeline import run_train
from stepscope.results import read_table
from stepscope.runs import LOCK, RunFolder, locked
from stepscope.training import train


def probes_of(run: Path) -> str:
    """The rows of the probes and their tokens without times; text, so that nan equals nan."""
    tables = [read_table(run / name) for name in ("probes.parquet", "probes_tokens.parquet")]
    return str([row | {"seconds": None} for table in tables for row in table.to_pylist()])


def test_a_training_killed_between_two_checkpoints_ends_as_if_it_had_not_been(
    every_step: TrainConfig,
    small_run: Path,
    probed_run: Path,
    tmp_path: Path,
) -> None:
    out = cases.start_from(small_run, tmp_path / "run")
    process = start(write_config(every_step, tmp_path), out)
    wait_for(out / "checkpoints" / "step-2", process)
    time.sleep(random.uniform(0.0, 0.5))
    kill(process)
    train(every_step, out, resume=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-0", "step-2", "step-4"]
    for name in ("step-2", "step-4"):
        same_state(*(run / "checkpoints" / name for run in (out, probed_run)))
    assert probes_of(out) == probes_of(probed_run)


def test_a_training_goes_on_in_its_second_epoch_with_the_order_of_that_epoch(tmp_path: Path) -> None:
    """Eight prompts, four a step: step 4 is the last of the second epoch."""
    config = digit_config(steps=5, save_every=1, max_resample=0)
    reinforced(config, tmp_path / "once", DigitTask(num_dead=0, size=8))
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step}")
    resume = tmp_path / "again" / "checkpoints" / "step-3"
    reinforced(config, tmp_path / "again", DigitTask(num_dead=0, size=8), resume=resume)
    for step in (4, 5):
        same_state(*(tmp_path / run / "checkpoints" / f"step-{step}" for run in ("once", "again")))


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(
    small_run: Path,
    tmp_path: Path,
) -> None:
    probe = {"every": 3, "num_prompts": 4, "window": 8, "top_tokens": 2}
    path = write_config(cases.training(rl={"probe": probe, "steps": 24}), tmp_path)
    for name in ("once", "often"):
        cases.start_from(small_run, tmp_path / name)
    assert with_ten_kills(path, tmp_path / "once", tmp_path / "often") >= 5, "over before it could be killed"
    for step in range(2, 25, 2):
        same_state(*(tmp_path / run / "checkpoints" / f"step-{step}" for run in ("once", "often")))
    assert probes_of(tmp_path / "once") == probes_of(tmp_path / "often")


def test_two_trainings_do_not_share_a_folder(small_training: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = load_config(TrainConfig, small_training, [], {"out": str(out)})
    with locked(out), pytest.raises(RunFolderError, match="another process is at work in this folder"):
        run_train(config, resume=True)
    assert not out.exists()


def test_the_lock_of_a_killed_process_is_void(tmp_path: Path) -> None:
    out = tmp_path / "run"
    hold = f"from pathlib import Path\nfrom stepscope.runs import locked\nwith locked(Path({str(out)!r})):\n"
    process = subprocess.Popen([sys.executable, "-c", f"{hold}    print('held', flush=True)\n    input()"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match="another process is at work"), locked(out):
        raise AssertionError("two processes hold the folder")
    kill(process)
    assert (out / LOCK).exists()
    with locked(out):
        assert not RunFolder(out).holds_this_run({}, verb="train", resume=False)
    assert not out.exists()


def test_what_a_killed_process_was_writing_is_removed(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(small_run, out)
    unfinished = out / "checkpoints" / "checkpoint-6"
    unfinished.mkdir()
    train(cases.training(), out, resume=True)
    assert not unfinished.exists()
