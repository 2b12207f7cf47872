"""``stepscope train``: a training in its run folder."""

from __future__ import annotations

from pathlib import Path

from stepscope.config import TrainConfig
from stepscope.console import say
from stepscope.pipeline.inputs.tasks import hold_data, say_what_is_shared
from stepscope.processes import is_main_process
from stepscope.runs import RunFolder, locked
from stepscope.tasks import load_task


def run_train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train, and leave checkpoints under ``OUT/checkpoints/step-N``.

    Under torchrun or accelerate every process trains, and the first one keeps the folder.

    Args:
        config: what to train and how.
        resume: go on with an interrupted training of the same configuration.

    Returns:
        The last checkpoint.

    Raises:
        RunFolderError: the folder already holds a run and ``resume`` is off, or one of another configuration,
            or another process trains in it.
        TaskError: the task's data cannot be read, or are not those the run began with.
    """
    if not is_main_process():
        from stepscope.training import train

        return train(config, Path(config.out), resume=resume)
    run = RunFolder(Path(config.out))
    plain = config.model_dump(mode="json")
    with locked(run.path):
        run.holds_this_run(plain, verb="train", resume=resume, ignore=("out",))
        from stepscope.training import (
            train,
        )  # TRL takes seconds to import: not before the settings are checked

        task = load_task(config.task, template=config.template)
        seeds = {"training": config.seed}
        RunFolder.open(run.path, plain, verb="train", resume=resume, ignore=("out",), extra={"seeds": seeds})
        hold_data(run, [task])
        say_what_is_shared(task, {})
        try:
            with run.stage("train", []):
                last = train(config, run.path, resume=resume)
        finally:
            run.clean_up()
    say(f"train: {last}")
    return last
