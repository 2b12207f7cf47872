"""``stepscope measure``: the stages in their order, each at most once, in a run folder."""

from __future__ import annotations

from pathlib import Path

from stepscope.config import MeasureConfig, Stage
from stepscope.errors import RunFolderError
from stepscope.pipeline.console import say, say_result
from stepscope.pipeline.data import hold_data
from stepscope.pipeline.processes import is_main_process
from stepscope.pipeline.session import Session
from stepscope.pipeline.stages.plans import PAGE, PLANS, write_summary
from stepscope.policy.checkpoint.load import checkpoint_digest
from stepscope.policy.state import Policy
from stepscope.report import measured
from stepscope.runs import RunFolder, locked

MAY_DIFFER = ("stages", "out", "validation", "memory", "scratch")
"""Keys of the configuration that may change between two calls on one run folder."""


def run_measure(
    config: MeasureConfig, *, resume: bool = False, policy: Policy | None = None, show_page: bool = True
) -> Path:
    """Measure what a checkpoint's next step does; leaves the files of DESIGN 5.3.

    A finished stage is not repeated; a stage that is repeated (because its files were removed) invalidates
    those that rest on it. If nothing could be finished, nothing is left behind. Of several processes the
    first one measures, and the others return at once.

    Args:
        config: what to measure, how, and where to.
        resume: allow a folder that already holds a run of the same configuration; ``stages`` may differ.
        policy: the checkpoint, where it is loaded already.
        show_page: say at the end where the page is.

    Returns:
        The run folder.

    Raises:
        RunFolderError: the folder holds another run, another process is at work in it, or a stage lacks what
            an earlier one leaves.
        CheckpointError: the checkpoint cannot be loaded or has no optimizer state.
        BatchError: the update batch makes no step, or the batches share prompts.
        TaskError: the task's data are not those the run began with.
    """
    run = RunFolder(Path(config.out))
    if not is_main_process():
        return run.path
    with locked(run.path):
        _measure(config, run, resume, policy)
    page = run.file(PAGE)
    say_result("measure", measured(run.path), *([page if page.is_file() else run.path] if show_page else []))
    return run.path


def _measure(config: MeasureConfig, run: RunFolder, resume: bool, policy: Policy | None) -> None:
    plain = config.model_dump(mode="json")
    held = run.holds_this_run(plain, verb="measure", resume=resume, ignore=MAY_DIFFER)
    wanted = [stage for stage in PLANS if stage in config.stages]
    _refuse_missing(run, wanted, held)
    session = Session(config, run, policy)
    limits: list[str] = []
    if any(PLANS[stage].needs_policy for stage in wanted if not (held and run.is_done(stage))):
        limits = session.refuse_impossible()
    digest = checkpoint_digest(Path(config.checkpoint)) if session.has_policy else None
    RunFolder.open(
        run.path,
        plain,
        verb="measure",
        resume=resume,
        ignore=MAY_DIFFER,
        extra={
            "checkpoint": str(Path(config.checkpoint).resolve()),
            "checkpoint_digest": digest,
            "limits": limits,
            "seeds": {"update": config.update.seed, "probe": config.probe.seed},
        },
    )
    if digest not in (None, before := run.provenance()["checkpoint_digest"]):
        raise RunFolderError(
            f"{run.path}: the checkpoint has changed since this run was started (digest {before} then, "
            f"{digest} now); choose another folder with --out"
        )
    if session.has_policy:
        hold_data(run, [session.task])
    try:
        for stage in wanted:
            _run_stage(session, stage)
    finally:
        run.clean_up()


def _run_stage(session: Session, stage: Stage) -> None:
    run, plan = session.run, PLANS[stage]
    if run.is_done(stage):
        say(f"{stage}: done before (remove {plan.files[0]} to repeat it)")
        return
    with run.stage(stage, plan.files, invalidates=_resting_on(stage)):
        figures = plan.work(session)
        write_summary(run, figures)
    if stage != "report":  # the page shows the time of the stages before it, and shall stay true
        write_summary(run, {})
    say(f"{stage}: {run.seconds(stage):.1f} s")


def _refuse_missing(run: RunFolder, wanted: list[Stage], held: bool) -> None:
    for stage in wanted:
        missing = [
            need for need in PLANS[stage].needs if need not in wanted and not (held and run.is_done(need))
        ]
        if missing:
            raise RunFolderError(
                f"{run.path}: stage {stage} needs what {' and '.join(missing)} leaves, which is not there; "
                f"run --stages {','.join([*missing, stage])}"
            )


def _resting_on(stage: Stage) -> list[Stage]:
    """Stages that read what ``stage`` writes, directly or through others; the page shows all of them."""
    found: list[Stage] = []
    for later, plan in PLANS.items():
        shows_it = later == "report" and stage != "report"
        if shows_it or any(need == stage or need in found for need in plan.needs):
            found.append(later)
    return found
