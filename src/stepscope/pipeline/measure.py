"""``stepscope measure``: the stages in their order, each at most once, in a run folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stepscope.config import MeasureConfig, Stage
from stepscope.console import say, say_result
from stepscope.errors import ConfigError, MeasurementError, RewardError, RunFolderError
from stepscope.pipeline.inputs.examples import shown_and_kept
from stepscope.pipeline.inputs.fitness import findings, left_out
from stepscope.pipeline.inputs.logged_prompts import prompt_conflict
from stepscope.pipeline.inputs.tasks import hold_data
from stepscope.pipeline.sizing import Pace, forecast
from stepscope.pipeline.stages import PLANS
from stepscope.pipeline.stages.report import PAGE
from stepscope.pipeline.stages.session import Session
from stepscope.pipeline.stages.staleness import inputs, needs, reason_to_do
from stepscope.pipeline.stages.summary import write_summary
from stepscope.pipeline.together import main_only, together
from stepscope.policy.checkpoint.load import checkpoint_digest
from stepscope.policy.checkpoint.models import usable_device
from stepscope.policy.group import current, launched
from stepscope.policy.loss.own import own_loss_source
from stepscope.policy.profiler import Profiler, profiled_stage, profiling
from stepscope.policy.state import Policy
from stepscope.report import measured
from stepscope.results.files import whole
from stepscope.runs import EXAMPLE, PROFILE, PROVENANCE, TRACE, RunFolder, locked, write_record

Forecast = Callable[[Session, list[Stage]], Pace | None]
"""Says what the stages to come will take, the policy being loaded; collective."""

HERE_ONLY = ("stages", "out", "memory", "max_tokens", "scratch", "profile", "shard")
"""Keys of the configuration that say how a call measures, and not what."""


def run_measure(
    config: MeasureConfig, *, resume: bool = False, policy: Policy | None = None, show_result: bool = True
) -> Path:
    """Measure what a checkpoint's next step does; leaves the files of DESIGN 5.3.

    A finished stage is repeated only where it is stale: what it has read (artifacts of other stages, keys of
    the configuration) is no longer what it was. If nothing could be finished, nothing is left behind, but for
    ``example.json`` where rewards are at fault: a response with its prompt and grade. Several processes that
    were started together (torchrun) measure together, and the first one keeps the folder.

    Args:
        config: what to measure, how, and where to.
        resume: allow a folder that already holds a run ; settings may differ that only stages asked for
            depend on, and these are done again.
        policy: the checkpoint, where it is loaded already.
        show_result: say at the end what was found, and where the page is.

    Returns:
        The run folder.

    Raises:
        RunFolderError: the folder holds another run, another process is at work in it, or a stage lacks what
            an earlier one leaves.
        CheckpointError: the checkpoint cannot be loaded or has no optimizer state.
        BatchError: the update batch makes no step, or the batches share prompts.
        TaskError: the task's data are not those the run began with.
    """
    refuse_lone_shard(config)
    with together(config.device, Path(config.out), lockstep=config.shard):
        return measure(config, resume=resume, policy=policy, show_result=show_result, forecast=forecast)


def refuse_lone_shard(config: MeasureConfig) -> None:
    """Refuse to cut a policy for a single process."""
    if config.shard and launched() == 1:
        raise ConfigError(
            "--shard cuts a policy into parts for several processes, and this is one; start them with "
            "torchrun --nproc-per-node=N --no-python stepscope measure ..., or measure without --shard"
        )


def measure(
    config: MeasureConfig,
    *,
    resume: bool = False,
    policy: Policy | None = None,
    show_result: bool = True,
    forecast: Forecast | None = None,
) -> Path:
    """:func:`run_measure` in the group that was entered; in none, this process measures alone.

    ``forecast`` says before the first stage what those to come will take.
    """
    run = RunFolder(Path(config.out))
    profiler = Profiler(usable_device(config.device)) if config.profile else None
    with main_only(lambda: locked(run.path)), profiling(profiler):
        measure_into(run, config, resume=resume, policy=policy, forecast=forecast)
        if profiler is not None and current().is_main:
            _write_profile(run, profiler)
    if show_result and current().is_main:
        page = run.file(PAGE)
        say_result("measure", measured(run.path), page if page.is_file() else run.path)
    return run.path


def measure_into(
    run: RunFolder,
    config: MeasureConfig,
    *,
    resume: bool = False,
    policy: Policy | None = None,
    forecast: Forecast | None = None,
) -> None:
    """Measure into a run folder whose lock is held already; see :func:`run_measure`."""
    plain = config.model_dump(mode="json")
    wanted, due = stages_of(config)
    session = Session(config, run, policy)
    limits: list[str] = []
    pace = None
    look = current().from_main(lambda: first_look(run, plain, resume, wanted, due))
    if look.to_load:
        with profiled_stage("check"):
            limits = _refuse_impossible(session)
        gone = left_out(session.policy, due)
        wanted, due = ([s for s in stages if s not in gone] for stages in (wanted, due))
    if current().is_main:
        _begin(session, plain, resume, look.may_differ, limits)
    try:
        if look.to_load and forecast is not None:
            pace = forecast(session, [stage for stage in due if stage in look.reasons])
        for stage in due:
            _run_stage(session, stage, plain, wanted=stage in wanted, pace=pace)
    except RewardError as error:
        raise shown_and_kept(error, run.file(EXAMPLE)) from error
    finally:
        if current().is_main:
            run.clean_up()
    if current().is_main:
        stale = [s for s in PLANS if s not in due and run.is_done(s) and reason_to_do(run, s, plain)]
        if stale:
            say(f"stale now: {', '.join(stale)}; --stages {','.join(stale)} brings them up to date")


def stages_of(config: MeasureConfig) -> tuple[list[Stage], list[Stage]]:
    """The stages that are asked for, and those with what they need, in their order."""
    wanted = [stage for stage in PLANS if stage in config.stages]
    return wanted, [s for s in PLANS if s in wanted or any(s in needs(w) for w in wanted)]


@dataclass(frozen=True)
class Look:
    """What a run folder says of a run that is to begin in it.

    Attributes:
        to_load: whether the checkpoint has to be loaded.
        may_differ: keys of the configuration that may differ from the folder's.
        reasons: why a stage is to be done, by stage; those that are finished are not among them.
    """

    to_load: bool
    may_differ: list[str]
    reasons: Mapping[Stage, str]


def first_look(
    run: RunFolder, plain: Mapping[str, Any], resume: bool, wanted: list[Stage], due: list[Stage]
) -> Look:
    """What is to be done, given that the folder takes this run; touches nothing.

    Raises:
        RunFolderError: it does not, or a stage lacks what an earlier one leaves.
    """
    may_differ = _may_differ(run, wanted)
    held = run.holds_this_run(plain, verb="measure", resume=resume, ignore=may_differ)
    refuse_missing(run, wanted, held)
    reasons: dict[Stage, str] = {}
    for stage in due:
        again = [need for need in needs(stage) if need in reasons]
        reason = reason_to_do(run, stage, plain) if held else "not done"
        if reason or again:
            reasons[stage] = reason or f"{', '.join(again)} done again"
    to_load = not held or any(PLANS[s].needs_policy for s in reasons)
    return Look(to_load, may_differ, reasons)


def _begin(
    session: Session, plain: Mapping[str, Any], resume: bool, may_differ: list[str], limits: list[str]
) -> None:
    """Make the run folder, or see whether the one that is there is still of this checkpoint and task."""
    config, run = session.config, session.run
    digest = checkpoint_digest(Path(config.checkpoint)) if session.has_policy else None
    loss = own_loss_source(session.policy.settings.loss_type) if session.has_policy else None
    RunFolder.open(
        run.path,
        plain,
        verb="measure",
        resume=resume,
        ignore=may_differ,
        extra={
            "checkpoint": str(Path(config.checkpoint).resolve()),
            "checkpoint_digest": digest,
            "limits": limits,
            "seeds": {"update": config.update.seed, "probe": config.probe.seed},
        }
        | ({} if loss is None else {"own_loss": loss}),
    )
    if digest not in (None, before := run.provenance()["checkpoint_digest"]):
        raise RunFolderError(
            f"{run.path}: the checkpoint has changed since this run was started (digest {before} then, "
            f"{digest} now); choose another folder with --out"
        )
    if loss is not None and loss != run.provenance().get("own_loss"):
        raise RunFolderError(
            f"{run.path}: the file of the loss {loss['name']} has changed since this run was started; choose "
            "another folder with --out"
        )
    run.file(EXAMPLE).unlink(missing_ok=True)
    run.renew_config({key: plain[key] for key in may_differ if key not in HERE_ONLY})
    if session.has_policy:
        hold_data(run, [session.task], config)


def _run_stage(
    session: Session, stage: Stage, config: Mapping[str, Any], *, wanted: bool, pace: Pace | None
) -> None:
    """Do a stage that is not done yet, or is stale; of one that is not asked for, only the second is said."""
    run, plan = session.run, PLANS[stage]
    reason, before = current().from_main(lambda: (reason_to_do(run, stage, config), run.is_done(stage)))
    if not reason:
        if wanted:
            say(f"{stage}: done before (remove {plan.writes[0]} to repeat it)")
        return
    if before:
        say(f"{stage}: stale, done again ({reason})")
    done = main_only(lambda: run.stage(stage, plan.writes, inputs=partial(inputs, plan, config=config)))
    keeps = current().is_main and stage != "report"  # the page shows the time of the stages before it
    with profiled_stage(stage), done:
        figures = plan.work(session)
        if keeps:
            write_summary(run, stage, figures)
    if keeps:
        write_summary(run, stage, figures)
    if not current().is_main:
        return
    say(f"{stage}: {run.seconds(stage):.1f} s{'' if pace is None else pace.words(stage)}")


def _write_profile(run: RunFolder, profiler: Profiler) -> None:
    """The table and the trace of this call, also on standard error."""
    profile = profiler.profile()
    write_record(run.file(PROFILE), profile)
    whole(run.file(TRACE), profiler.write_trace)
    say(profile.table())


def _refuse_impossible(session: Session) -> list[str]:
    """Say what is wrong with checkpoint, task or quantities before anything is written.

    Returns:
        What limits the measurement, warned of too.

    Raises:
        ConfigError: ``scratch`` is no folder, or the run has logged prompts that ask otherwise.
        MeasurementError: what ``check`` fails.
    """
    config = session.config
    if config.scratch is not None and not Path(config.scratch).is_dir():
        raise ConfigError(f"scratch: {config.scratch} is no folder; make it, or leave scratch out")
    _ = session.policy, session.task, session.reference
    if conflict := prompt_conflict(session.policy, session.task):
        raise ConfigError(conflict)
    found = findings(session.policy, config, config.stages)
    if against := [f"{f.what}; {f.cure}" for f in found if f.level == "fail"]:
        raise MeasurementError(f"{config.checkpoint}: {'; '.join(against)}")
    limits = [finding for finding in found if finding.level == "warn"]
    for finding in limits:
        warnings.warn(f"{finding.what}; {finding.cure}", stacklevel=2)
    return [finding.what for finding in limits]


def refuse_missing(run: RunFolder, wanted: list[Stage], held: bool) -> None:
    """Refuse stages that lack what earlier ones leave."""
    for stage in wanted:
        missing = [need for need in needs(stage) if need not in wanted and not (held and run.is_done(need))]
        if missing:
            raise RunFolderError(
                f"{run.path}: stage {stage} needs what {' and '.join(missing)} leaves, which is not there; "
                f"run --stages {','.join([*missing, stage])}"
            )


def _may_differ(run: RunFolder, wanted: list[Stage]) -> list[str]:
    """Keys of the configuration that may change between two calls on one run folder.

    These are the keys that nothing which stays depends on: they say how and not what (``HERE_ONLY``), or
    all finished stages that depend on them are asked for, and done again. The batches always stay.
    """
    done = run.provenance()["stages"] if run.file(PROVENANCE).is_file() else {}
    stay = {
        key for stage, plan in PLANS.items() for key in plan.config if stage in done and stage not in wanted
    }
    keys = set(MeasureConfig.model_fields) - stay - set(PLANS["rollouts"].config)
    return sorted(keys.union(HERE_ONLY))
