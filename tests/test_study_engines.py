"""A study on engines: whatever is killed, each cell once, the same table to the bit; what fails is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from threadpoolctl import threadpool_info

import stepscope as ss
from stepscope.config import SlurmConfig, StudyConfig, build_config
from stepscope.errors import RunFolderError, StudyError
from stepscope.pipeline import run_study
from stepscope.pipeline.study import executors
from stepscope.pipeline.study.cells import Cell, study_cells
from stepscope.pipeline.study.drive import Driver
from stepscope.pipeline.study.executors import Job, WorkerBug, WorkerLost
from stepscope.pipeline.study.executors.slurm import Slurm
from stepscope.pipeline.study.worker import Order, carry_out, carry_out_elsewhere, held_to
from stepscope.runs import environment, locked

TABLES = ("study.parquet", "study.json")


def twelve_cells(trained_run: Path, out: Path, **changes: Any) -> StudyConfig:
    data = {
        "checkpoints": [str(trained_run / "checkpoints" / f"step-{n}") for n in (2, 4)],
        "out": str(out),
        "repeats": 3,
        "threads": 1,
        "measure": {
            "update": {"num_prompts": 4, "group_size": 4},
            "probe": {"num_prompts": 8},
            "lrs": [1e-4],
            "second_order": False,
            "batch_size": 64,
        },
        "settings": {"default": {}, "sharp": {"baseline": "none", "probe.num_prompts": 6}},
    }
    return build_config(StudyConfig, data | changes)


@pytest.fixture(scope="module")
def undisturbed(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of twelve cells as one process makes it."""
    return run_study(twelve_cells(trained_run, tmp_path_factory.mktemp("undisturbed") / "s"))


def assert_same_study(out: Path, undisturbed: Path) -> None:
    for name in TABLES:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    names = sorted(p.name for p in (undisturbed / "cells").iterdir())
    assert len(names) == 12
    assert sorted(p.name for p in (out / "cells").iterdir()) == names, "and nothing is left of the killed"


@dataclass
class Forked:
    """An engine of forked processes, whose starts cost nothing; some are killed.

    Attributes:
        parallel: processes at a time.
        kill_after: seconds after which the next ones are killed, one each.
        poison: key of a cell that kills its process each time it is begun.
        cells_per_job: see the protocol.
    """

    parallel: int = 2
    kill_after: list[float] = field(default_factory=list)
    poison: str = ""
    cells_per_job: int = 1
    started: int = 0
    killed: int = 0

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        return [Job(order, None) for order in orders]

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        at_work = [job for job in jobs if job.handle]
        for job in jobs[: self.parallel]:
            if job.handle is None:
                job.handle = self._start(job.order)
                at_work.append(job)
        ended = [job for job in at_work if not job.handle[0].is_alive()]
        time.sleep(0 if ended else 0.01)
        return ended

    def _start(self, order: Order) -> tuple[Any, Connection]:
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=self._work, args=(order, there))
        process.start()
        there.close()
        self.started += 1
        if self.kill_after:
            threading.Timer(self.kill_after.pop(0), process.kill).start()
        return process, here

    def _work(self, order: Order, answers: Connection) -> None:
        if self.poison in [cell.key for cell in order.cells]:
            begun = order.folder / f".{self.poison}" / "config.yaml"
            threading.Thread(target=die_once, args=(begun,), daemon=True).start()
        try:
            answers.send(carry_out(order))
        except (AttributeError, TypeError):
            answers.send(traceback.format_exc())

    def outcomes(self, job: Job) -> list[Any]:
        process, answers = job.handle
        if process.exitcode < 0:
            self.killed += 1
            raise WorkerLost(f"signal {-process.exitcode}")
        found = answers.recv()
        if isinstance(found, str):
            raise WorkerBug(found)
        return found

    def interrupt(self, jobs: Sequence[Job]) -> str:
        return ""

    def close(self) -> None:
        pass


def die_once(begun: Path) -> None:
    while not begun.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def drive(config: StudyConfig, engine: Forked, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study on an engine of the tests' own."""
    monkeypatch.setattr("stepscope.pipeline.study.run.open_executor", lambda config, folder: engine)
    return run_study(config)


@pytest.mark.parametrize("kills", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_workers_change_nothing(undisturbed, trained_run, tmp_path, monkeypatch, kills):
    moments = np.random.default_rng(kills).uniform(0, 1.0, size=kills).tolist()
    engine = Forked(kill_after=moments, cells_per_job=2)
    out = drive(twelve_cells(trained_run, tmp_path / "s", attempts=kills + 1), engine, monkeypatch)
    assert engine.killed >= kills / 2, "the others had ended before"
    assert_same_study(out, undisturbed)


def test_a_cell_that_kills_its_workers_is_given_up_and_keeps_no_other(
    undisturbed, trained_run, tmp_path, monkeypatch, capfd
):
    config = twelve_cells(trained_run, tmp_path / "s", attempts=3)
    poison = study_cells(config)[1]
    engine = Forked(poison=poison.key, cells_per_job=4)
    with pytest.raises(StudyError, match=r"1 of 12 cells could not be measured.*3 workers were lost over it"):
        drive(config, engine, monkeypatch)
    assert engine.killed == 3
    report = ss.load_study(tmp_path / "s").report
    (failed,) = report.failed
    assert (failed.checkpoint, failed.setting, failed.repeat) == (
        str(poison.checkpoint),
        poison.setting,
        poison.repeat,
    )
    assert len({(fit.checkpoint, fit.setting, fit.repeat) for fit in report.fits}) == 11
    assert "1 further cell could not be measured" in (tmp_path / "s/study.html").read_text()
    assert capfd.readouterr().err.count("a worker was lost over") == 3
    engine.poison = ""
    run_study(config)
    assert_same_study(tmp_path / "s", undisturbed)


def test_a_cell_that_fails_stops_no_other(undisturbed, trained_run, tmp_path, capsys):
    settings = {"default": {}, "sharp": {"baseline": "none", "probe.num_prompts": 10**6}}
    config = twelve_cells(trained_run, tmp_path / "s", settings=settings, repeats=1)
    with pytest.raises(StudyError, match=r"2 of 4 cells could not be measured, and the table has the others"):
        run_study(config)
    said = capsys.readouterr().err
    for cell in study_cells(config):
        assert (f"study: cell {cell.key} failed: " in said) == (cell.setting == "sharp")
    found = ss.load_study(tmp_path / "s")
    assert {cell.setting for cell in found.report.failed} == {"sharp"}
    assert set(found.rows.setting) == {"default"}
    with pytest.raises(StudyError, match=r"4 of 4 cells .* there is no table"):
        run_study(twelve_cells(trained_run, tmp_path / "t", settings={"sharp": settings["sharp"]}, repeats=2))
    assert not (tmp_path / "t/study.json").exists()


def test_a_bug_in_a_worker_is_one_of_its_cell(trained_run, tmp_path):
    cells = study_cells(twelve_cells(trained_run, tmp_path / "s"))[:3]
    odd = replace(cells[1], config=cells[1].config.model_copy(update={"update": None}))
    (tmp_path / "s/cells").mkdir(parents=True)
    driver = Driver(Forked(cells_per_job=3), order_of(tmp_path / "s/cells"), attempts=2, total=3, done=0)
    driver.measure([cells[0], odd, cells[2]])
    assert list(driver.failed) == list(driver.bugs) == [odd.key]
    assert "AttributeError" in driver.bugs[odd.key]
    assert driver.done == 2


def order_of(folder: Path, *cells: Cell) -> Order:
    return Order(cells, folder, Path.cwd(), 1, environment()["versions"])


@contextmanager
def twin_at_work(cell: Cell, seconds: float) -> Iterator[None]:
    """A process of an earlier call that is at work on a cell, and then killed."""

    def hold() -> None:
        with locked(Path(cell.config.out)):
            (Path(cell.config.out) / "half.json").write_text("{")
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not (Path(cell.config.out) / "half.json").exists():
        time.sleep(0.01)
    threading.Timer(seconds, process.kill).start()
    yield
    process.join()


def test_a_cell_in_other_hands_is_waited_for(undisturbed, trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stepscope.pipeline.study.drive.LOOK_AGAIN", 0.1)
    shutil.copytree(undisturbed, tmp_path / "s")
    config = twelve_cells(trained_run, tmp_path / "s")
    first, second, *_ = study_cells(config)
    for cell in (first, second):
        shutil.rmtree(tmp_path / "s/cells" / cell.key)
    with twin_at_work(first, seconds=3):
        run_study(config)
    said = capsys.readouterr().err
    assert "11 of 12 cells are measured, 1 in the hands of other processes" in said
    assert said.index(f"cell {first.key}: ") > said.index("11 of 12"), "taken when it was free"
    assert_same_study(tmp_path / "s", undisturbed)


def test_two_workers_on_the_same_cells_do_each_once(trained_run, tmp_path):
    cells = study_cells(twelve_cells(trained_run, tmp_path / "s", repeats=1))
    folder = tmp_path / "s/cells"
    folder.mkdir(parents=True)
    engine = Forked(parallel=3)
    jobs = engine.submit([order_of(folder, *cells), order_of(folder, *cells), order_of(folder, *cells[::-1])])
    states: dict[str, list[str]] = {cell.key: [] for cell in cells}
    while jobs:
        for job in engine.wait(jobs):
            jobs.remove(job)
            for outcome in engine.outcomes(job):
                states[outcome.key].append(outcome.state)
    assert all("done" in found and "failed" not in found for found in states.values())
    assert sorted(p.name for p in folder.iterdir()) == sorted(cell.key for cell in cells)


def test_a_worker_elsewhere_refuses_what_would_not_compare(trained_run, tmp_path):
    (cell, *_) = study_cells(twelve_cells(trained_run, tmp_path / "s"))
    folder = tmp_path / "s/cells"
    (outcome,) = carry_out_elsewhere(order_of(folder, cell))
    assert outcome.state == "failed"
    assert f"sees no {folder}; a study needs a file system that all of its workers share" in outcome.reason
    folder.mkdir(parents=True)
    order = order_of(folder, cell)
    (outcome,) = carry_out_elsewhere(replace(order, versions={**order.versions, "torch": "1.0"}))
    assert f"other versions: torch {order.versions['torch']} there, 1.0 here" in outcome.reason
    assert not list(folder.iterdir())


def test_threads_are_those_that_the_study_began_with(undisturbed, trained_run, tmp_path):
    assert json.loads((undisturbed / "provenance.json").read_text())["threads"] == 1
    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    before = torch.get_num_threads()
    run_study(twelve_cells(trained_run, copy, threads=None, executor="slurm", slurm={"cpus": 7}))
    with pytest.raises(RunFolderError, match="threads is 2, and the study began with 1"):
        run_study(twelve_cells(trained_run, copy, threads=2))
    assert torch.get_num_threads() == before


def test_every_pool_of_threads_is_held():
    before = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    with held_to(2):
        inside = threadpool_info()
        assert {pool["num_threads"] for pool in inside} == {2}
        assert {"openblas", "openmp"} <= {pool["internal_api"] for pool in inside}
        assert torch.get_num_threads() == 2
    with held_to(1):
        assert {pool["num_threads"] for pool in threadpool_info()} == {1}
    assert {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()} == before


def test_an_engine_that_is_not_there_is_refused_before_anything_is_written(
    trained_run, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # this machine may have SLURM
    with pytest.raises(
        StudyError, match=r"sbatch, srun, sacct cannot be found here; start the study on a login"
    ):
        run_study(twelve_cells(trained_run, tmp_path / "s", executor="slurm"))
    with pytest.raises(StudyError, match=r"Ray cannot be reached at 127\.0\.0\.1:1 \(.*refused\)"):
        run_study(twelve_cells(trained_run, tmp_path / "s", executor="ray", ray={"address": "127.0.0.1:1"}))
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"needs the package ray, .*pip install 'stepscope\[ray\]'"):
        run_study(twelve_cells(trained_run, tmp_path / "s", executor="ray"))
    assert not (tmp_path / "s").exists()


def test_what_a_job_asks_for_reaches_sbatch(trained_run, tmp_path, monkeypatch):
    """No SLURM is here: a command in its place keeps the script that it is given."""
    commands = tmp_path / "bin"
    commands.mkdir()
    script = tmp_path / "script.sh"
    for name, does in {
        "sbatch": f'cp "$1" {script}; echo Submitted batch job 7',
        "srun": "",
        "sacct": "",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    config = SlurmConfig(
        partition="long",
        account="lab",
        time=90,
        cpus=4,
        gpus=2,
        mem="16GB",
        parallel=5,
        setup=["module load x"],
        options={"constraint": "a100"},
    )
    (cell, *_) = study_cells(twelve_cells(trained_run, tmp_path / "s"))
    engine = Slurm(config, tmp_path / "jobs")
    jobs = engine.submit([order_of(tmp_path, cell)] * 6)
    asked = script.read_text().splitlines()
    for line in (
        "--partition=long",
        "--account=lab",
        "--time=90",
        "--cpus-per-task=4",
        "--gpus-per-node=2",
        "--mem=16GB",
        "--array=0-5%5",
        "--constraint=a100",
    ):
        assert f"#SBATCH {line}" in asked
    assert "module load x" in asked
    assert [job.handle.job_id for job in jobs[:2]] == ["7_0", "7_1"]
    assert "`scancel 7` ends them" in engine.interrupt(jobs)
    (commands / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
    with pytest.raises(StudyError, match=r"sbatch refuses the jobs of the study.*invalid partition"):
        engine.submit([order_of(tmp_path, cell)])


@contextmanager
def killed_at_random(
    out: Path, is_worker: Callable[[list[str]], bool], *, kills: int, seed: int
) -> Iterator[list[int]]:
    """Kill workers of a study under way, each at a random moment after a random number of finished cells.

    Yields:
        Finished cells at each kill, as it fills.
    """
    generator = np.random.default_rng(seed)
    after = sorted(generator.integers(0, 9, size=kills).tolist())
    over, done = threading.Event(), []

    def kill() -> None:
        own = psutil.Process()
        while len(done) < kills and not over.wait(0.02):
            finished = len(list(out.glob("cells/[!.]*")))
            if finished < after[len(done)] or not list(out.glob("cells/.*")):
                continue
            time.sleep(float(generator.uniform(0, 0.4)))
            workers = [p for p in own.children(recursive=True) if is_worker(command_of(p))]
            if workers:
                victim = workers[generator.integers(len(workers))]
                victim.kill()
                done.append(finished)
                while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


ONE_AND_MANY = [1, pytest.param(5, marks=pytest.mark.slow)]
"""Kills: each costs the start of a process, with all that it imports."""


@pytest.mark.parametrize("kills", ONE_AND_MANY)
def test_on_submitit_with_killed_workers_the_table_is_the_same(
    undisturbed, trained_run, tmp_path, kills, capfd
):
    workers = 1 if kills == 1 else 2
    slurm = {"cluster": "local", "parallel": workers, "cells_per_job": 12 // workers}
    config = twelve_cells(trained_run, tmp_path / "s", executor="slurm", slurm=slurm, attempts=kills + 1)
    with killed_at_random(
        tmp_path / "s", lambda c: "submitit.core._submit" in c, kills=kills, seed=kills
    ) as done:
        run_study(config)
    assert len(done) == kills
    assert capfd.readouterr().err.count("a worker was lost over") == kills
    assert_same_study(tmp_path / "s", undisturbed)


@pytest.fixture
def ray_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster on this machine of as many workers as the test asks for."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=request.param, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("ray_cluster", "kills"), [(1, 1), pytest.param(2, 5, marks=pytest.mark.slow)], indirect=["ray_cluster"]
)
def test_on_ray_with_killed_workers_the_table_is_the_same(
    ray_cluster, undisturbed, trained_run, tmp_path, kills, capfd
):
    config = twelve_cells(trained_run, tmp_path / "s", executor="ray", attempts=kills + 1)
    at_work = lambda command: bool(command) and command[0].startswith("ray::carry_out")  # noqa: E731
    with killed_at_random(tmp_path / "s", at_work, kills=kills, seed=10 + kills) as done:
        run_study(config)
    assert len(done) == kills
    assert capfd.readouterr().err.count("a worker was lost over") == kills
    assert_same_study(tmp_path / "s", undisturbed)
    assert ray.is_initialized(), "a connection that was there before stays"
