"""The data of a run's tasks: a run goes on with those it began with, and says what their splits share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stepscope.pipeline.console import say
from stepscope.runs import PROVENANCE, RunFolder, write_json
from stepscope.tasks import TemplatedTask, load_task
from stepscope.tasks.load import changed_data

KEY = "task_data"
"""Key of the provenance: specification of a task to the digest of its data."""


def hold_data(run: RunFolder, tasks: Iterable[TemplatedTask]) -> None:
    """Record the state of the tasks' data, or compare it with what is recorded.

    Tasks whose specification says all about them (``arithmetic``) have no data. A run folder without a record
    gets one.

    Raises:
        TaskError: the data are not those that the run began with.
    """
    now = {task.spec: task.digest for task in tasks if task.digest}
    provenance = run.provenance()
    before = provenance.get(KEY, {})
    for spec, digest in now.items():
        if before.get(spec, digest) != digest:
            raise changed_data(str(run.path), spec, before[spec], digest)
    if not now.keys() <= before.keys():
        write_json(run.path / PROVENANCE, provenance | {KEY: before | now})


def say_what_is_shared(task: TemplatedTask, trained: Mapping[str, str]) -> None:
    """Warn of test questions that are training questions, and of data that are not those of the training.

    Args:
        task: to be asked.
        trained: tasks of trainings to the digests of their data then.
    """
    if task.overlap:
        say(f"warning: {task.overlap}")
    then = trained.get(task.spec, "")
    if then not in ("", task.digest):
        say(
            f"warning: the data of task {task.spec} have changed since the training (digest "
            f"{then[:40]} then, {task.digest[:40]} now)"
        )


def tasks_of(specs: Iterable[str]) -> list[TemplatedTask]:
    """The tasks of some specifications, each once; empty ones are passed over."""
    return [load_task(spec) for spec in dict.fromkeys(specs) if spec]
