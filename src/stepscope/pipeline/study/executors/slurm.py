"""Jobs of SLURM, as submitit submits, watches and requeues them; or submitit's processes on this machine."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from stepscope.config import SlurmConfig, StudyConfig
from stepscope.console import say
from stepscope.errors import StudyError
from stepscope.pipeline.study.executors import Job, WorkerBug, WorkerLost
from stepscope.pipeline.study.worker import Order, Outcome, carry_out_elsewhere

LARGEST_ARRAY = 1000
"""Jobs of one array; SLURM takes 1,001 unless it is told otherwise (MaxArraySize)."""


class Work:
    """What a job does; ended by its time or preempted, it is queued again and does what is missing."""

    def __call__(self, order: Order) -> list[Outcome]:
        """Carry out an order in a job."""
        return carry_out_elsewhere(order)

    def checkpoint(self, order: Order) -> DelayedSubmission:
        """What submitit queues in its place."""
        return DelayedSubmission(self, order)


class Slurm:
    """See :class:`~stepscope.pipeline.study.executors.Executor`.

    Args:
        config: what a job asks for.
        folder: for logs and what submitit passes on; each call has one of its own below it, since names of
            processes come again.
    """

    def __init__(self, config: SlurmConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._here = config.cluster == "local"
        self._pause = 0.2 if self._here else 5.0
        self._engine: submitit.AutoExecutor | None = None
        self.cells_per_job = config.cells_per_job

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        """As arrays; on this machine, where nothing queues, no more are started than may be at work.

        Raises:
            StudyError: sbatch refuses them.
        """
        jobs = [Job(order, None) for order in orders]
        if not self._here:
            for first in range(0, len(jobs), LARGEST_ARRAY):
                self._start(jobs[first : first + LARGEST_ARRAY])
        return jobs

    def _start(self, jobs: Sequence[Job]) -> None:
        if self._engine is None:
            self._engine = self._open()
        try:
            handles = self._engine.map_array(Work(), [job.order for job in jobs])
        except (FailedJobError, FailedSubmissionError) as error:
            raise StudyError(
                f"sbatch refuses the jobs of the study: {error}; see slurm in its settings"
            ) from error
        for job, handle in zip(jobs, handles, strict=True):
            job.handle = handle

    def _open(self) -> submitit.AutoExecutor:
        config = self._config
        self._folder.mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=self._folder)
        engine = submitit.AutoExecutor(folder, cluster=config.cluster)
        engine.update_parameters(
            name="stepscope",
            timeout_min=config.time,
            cpus_per_task=config.cpus,
            gpus_per_node=config.gpus or None,
            slurm_partition=config.partition,
            slurm_account=config.account,
            slurm_qos=config.qos,
            slurm_mem=config.mem,
            slurm_array_parallelism=config.parallel,
            slurm_additional_parameters=config.options or None,
            **{f"{config.cluster}_setup": config.setup or None},
        )
        return engine

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        """Those whose result is there, or of which the engine says that they have ended."""
        if self._here:
            at_work = sum(job.handle is not None and not job.handle.done() for job in jobs)
            begin = [job for job in jobs if job.handle is None][: max(0, self._config.parallel - at_work)]
            if begin:
                self._start(begin)
        ended = [job for job in jobs if job.handle is not None and job.handle.done()]
        if not ended:
            time.sleep(self._pause)
        return ended

    def outcomes(self, job: Job) -> list[Outcome]:
        """What the job has left.

        Raises:
            WorkerLost: it has left nothing.
            WorkerBug: a bug has ended it.
        """
        what = f"job {job.handle.job_id} ended without a result (log: {job.handle.paths.stderr})"
        if self._here and not job.handle.paths.result_pickle.exists():
            raise WorkerLost(what)  # no file system to wait for, as submitit does
        try:
            found: list[Outcome] = job.handle.result()
        except UncompletedJobError as error:
            raise WorkerLost(f"{what[:-1]}; state {job.handle.state})") from error
        except FailedJobError as error:
            raise WorkerBug(str(error)) from error
        return found

    def interrupt(self, jobs: Sequence[Job]) -> str:
        """Processes on this machine end with the study; jobs in a queue go on."""
        names = sorted({job.handle.job_id.partition("_")[0] for job in jobs if job.handle is not None})
        if self._here:
            for job in jobs:
                if job.handle is not None:
                    job.handle.cancel()
            return ""
        return f"jobs already in SLURM's queue go on (`scancel {' '.join(names)}` ends them)" if names else ""

    def close(self) -> None:
        """Jobs have ended, or go on by themselves."""


def start(config: StudyConfig, folder: Path) -> Slurm:
    """The engine, where there is SLURM.

    Raises:
        StudyError: its commands are not there.
    """
    missing = [name for name in ("sbatch", "srun", "sacct") if shutil.which(name) is None]
    if config.slurm.cluster == "slurm" and missing:
        raise StudyError(
            f"executor slurm needs SLURM's commands, and {', '.join(missing)} cannot be found here; start "
            "the study on a login node, or set slurm.cluster=local for processes on this machine"
        )
    if config.slurm.cluster == "slurm":
        _warn_without_accounting()
    return Slurm(config.slurm, folder)


def _warn_without_accounting() -> None:
    """Say what is not noticed where SLURM keeps no account of jobs, which submitit asks for states."""
    asked = subprocess.run(["sacct", "--noheader", "--starttime", "now"], capture_output=True, text=True)
    if asked.returncode:
        say(
            f"study: sacct fails ({' '.join(asked.stderr.split())[:200]}), so a job that is killed is not "
            "noticed: press Ctrl-C when `squeue` has none left, and give the same command again"
        )
