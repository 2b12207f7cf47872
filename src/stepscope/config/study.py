"""Configuration of ``stepscope study``: what is measured, and on which machines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from stepscope.config.base import Section
from stepscope.config.measure import MeasureSettings, Stage


def _one_setting() -> dict[str, dict[str, Any]]:
    return {"default": {}}


def _change_only() -> list[Stage]:
    return ["rollouts", "step", "change"]


class SlurmConfig(Section):
    """What each job of a study asks of SLURM; submitit submits them as one array.

    Attributes:
        cluster: ``slurm``, or ``local`` for submitit's processes on this machine in place of jobs.
        partition: where jobs run, or null for the cluster's own choice.
        account: whom they are billed to.
        qos: quality of service.
        time: minutes after which a job is ended; its measurement is then taken again.
        cpus: cores of a job.
        gpus: of a job.
        mem: memory of a job as sbatch takes it (``16GB``), or null for the cluster's own choice.
        parallel: jobs at work at a time.
        cells_per_job: measurements that a job does one after another: starting a process takes seconds.
        setup: lines of shell before a job begins (``module load cuda``).
        options: further options of sbatch by name (``{constraint: a100}``).
    """

    cluster: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: int = Field(default=60, ge=1)
    cpus: int = Field(default=1, ge=1)
    gpus: int = Field(default=0, ge=0)
    mem: str | None = Field(default=None, pattern=r"^[1-9]\d*[KMGT]B?$")
    parallel: int = Field(default=64, ge=1)
    cells_per_job: int = Field(default=1, ge=1)
    setup: list[str] = Field(default_factory=list)
    options: dict[str, str | int] = Field(default_factory=dict)


class RayConfig(Section):
    """What each task of a study, one measurement, asks of Ray.

    Attributes:
        address: of a cluster (``auto``, ``host:6379``), or null for one of the study's own on this machine,
            which ends with it.
        cpus: cores of a task.
        gpus: of a task; a part of one lets tasks share it.
        memory: of a task in GiB, or null for no account of it.
        resources: of the cluster's own kinds, by name.
        runtime_env: environment of the workers, as Ray takes it.
    """

    address: str | None = None
    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    memory: float | None = Field(default=None, gt=0)
    resources: dict[str, float] = Field(default_factory=dict)
    runtime_env: dict[str, Any] = Field(default_factory=dict)


class StudyConfig(Section):
    """Configuration of ``stepscope study``: checkpoints x settings x repeats.

    Attributes:
        checkpoints: folders of checkpoints, or run folders, which stand for all their checkpoints.
        out: study folder.
        repeats: measurements per checkpoint and setting.
        resample: which batches get a new seed in each repeat: ``probe`` keeps the update batch, so that the
            spread is conditional on it; ``both`` draws the update batch anew too.
        measure: how each checkpoint is measured.
        settings: named changes to ``measure``, for example ``{long: {probe.num_prompts: 1024}}``.
        stages: stages of each measurement; with ``criteria`` the leaderboards of all are gathered into one.
        threads: of the processor in each measurement, on whatever machine: sums in another order differ in
            their last bits. Or null for what this machine takes (``local``), ``slurm.cpus`` or ``ray.cpus``;
            the number stays that of the study's first call.
        executor: what measures: this process (``local``), jobs of SLURM, or tasks of Ray.
        attempts: workers that may be killed over one measurement before it is given up.
        slurm: what a job asks for.
        ray: what a task asks for.
    """

    checkpoints: list[str] = Field(min_length=1)
    out: str
    repeats: int = Field(default=1, ge=1)
    resample: Literal["probe", "both"] = "probe"
    measure: MeasureSettings = MeasureSettings()
    settings: dict[str, dict[str, Any]] = Field(default_factory=_one_setting, min_length=1)
    stages: list[Stage] = Field(default_factory=_change_only, min_length=1)
    threads: int | None = Field(default=None, ge=1)
    executor: Literal["local", "slurm", "ray"] = "local"
    attempts: int = Field(default=5, ge=1)
    slurm: SlurmConfig = SlurmConfig()
    ray: RayConfig = RayConfig()

    @field_validator("stages")
    @classmethod
    def _change_is_measured(cls, value: list[Stage]) -> list[Stage]:
        if missing := [stage for stage in _change_only() if stage not in value]:
            raise ValueError(
                f"a study is a table of changes, so it needs the stages {', '.join(missing)} too"
            )
        return value

    @field_validator("settings")
    @classmethod
    def _plain_names(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        odd = [name for name in value if not name.replace("-", "").replace("_", "").isalnum()]
        if odd:
            raise ValueError(
                f"names of settings become folder names: letters, digits, - and _ only, got {odd}"
            )
        return value
