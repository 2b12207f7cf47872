"""``stepscope explain`` and ``measure --quick``: who moved the entropy, within a time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from stepscope.config import MeasureConfig, Stage, load_config
from stepscope.errors import ConfigError, RunFolderError
from stepscope.pipeline.measure import measure, refuse_lone_shard
from stepscope.pipeline.sizing import Pace, fitting, pace, trial, update_file, within_task
from stepscope.pipeline.stages.report import PAGE
from stepscope.pipeline.stages.session import Session
from stepscope.pipeline.together import together
from stepscope.policy.group import current
from stepscope.report.terminal import answer_of, as_record, printed
from stepscope.runs import CONFIG, RunFolder

STAGES: tuple[Stage, ...] = ("rollouts", "step", "change", "influence", "report")
"""What the sentence, the waterfall and the largest tokens need."""

QUICK = 1.0
"""Minutes that ``measure --quick`` is sized for."""


def run_explain(
    config: MeasureConfig, *, minutes: float, fixed: frozenset[str] = frozenset(), as_json: bool = False
) -> Path:
    """Measure as much of a checkpoint's next step as a time allows, and print the answer.

    Several processes that were started together (torchrun) take the sizes of the first one, which prints.

    Args:
        config: as for ``measure``.
        minutes: what it may take, loading included.
        fixed: batches (``update``, ``probe``) whose number of prompts was asked for, and stays.
        as_json: print one JSON object instead of text.

    Returns:
        The run folder.

    Raises:
        ConfigError, MeasurementError, CheckpointError, TaskError: see :func:`measure_within`.
    """
    _refuse_no_time(config, minutes)
    with together(config.device, Path(config.out), lockstep=config.shard):
        folder = _sized(config, minutes, fixed, resume=True, quick=False)
        if current().is_main:
            answer = answer_of(folder)
            if as_json:
                print(json.dumps(as_record(answer, folder / PAGE), ensure_ascii=False, indent=2))
            else:
                printed(answer, folder / PAGE, file=sys.stdout)
    return folder


def measure_within(config: MeasureConfig, *, minutes: float, fixed: frozenset[str] = frozenset()) -> Path:
    """Measure as much of a checkpoint's next step as a time allows.

    The stages are those of ``measure``, with nothing else in them; batches are the configuration's, or
    smaller in proportion where a trial says that the time does not do. A folder that was explained before
    keeps the sizes it has, and what is finished is not done again.

    Args:
        config: as for ``measure``.
        minutes: what it may take, loading included.
        fixed: batches (``update``, ``probe``) whose number of prompts was asked for, and stays.

    Returns:
        The run folder.

    Raises:
        ConfigError: no time to measure in.
        MeasurementError, CheckpointError, TaskError: as ``measure``.
    """
    _refuse_no_time(config, minutes)
    with together(config.device, Path(config.out), lockstep=config.shard):
        return _sized(config, minutes, fixed, resume=True, quick=False)


def _refuse_no_time(config: MeasureConfig, minutes: float) -> None:
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: give more than 0")
    refuse_lone_shard(config)


def run_quick(config: MeasureConfig, *, fixed: frozenset[str] = frozenset(), resume: bool = False) -> Path:
    """Measure what ``explain`` does, in about a minute, and end as ``measure`` ends.

    Args:
        config: as for ``measure``; its stages are not used.
        fixed: batches whose number of prompts was asked for, and stays.
        resume: go on with the run that the folder holds, in its sizes.

    Returns:
        The run folder.

    Raises:
        RunFolderError, MeasurementError, CheckpointError, TaskError: as ``measure``.
    """
    refuse_lone_shard(config)
    with together(config.device, Path(config.out), lockstep=config.shard):
        return _sized(config, QUICK, fixed, resume=resume, quick=True)


def _sized(
    config: MeasureConfig, minutes: float, fixed: frozenset[str], *, resume: bool, quick: bool
) -> Path:
    """Measure in batches for so many minutes, or in those of the folder, in the group that was entered."""
    begin = time.monotonic()
    config = explaining(config)
    run = RunFolder(Path(config.out))
    before = current().from_main(lambda: as_before(config, run, fixed))
    if before is not None:
        return measure(before, resume=resume, show_result=quick)
    session = Session(config, run)
    config = within_task(session, fixed)
    policy, speed = session.policy, trial(session)
    left = current().from_main(lambda: 60 * minutes - (time.monotonic() - begin))
    verb, more = (
        ("measure --quick", "without --quick they are larger")
        if quick
        else ("explain", "--minutes gives more")
    )
    file = update_file(config, policy.settings)
    config = fitting(config, speed.each(STAGES), left, fixed, file=file, verb=verb, more=more)

    def expected(_: Session, stages: list[Stage]) -> Pace:
        return pace(config, speed, stages)

    return measure(config, resume=resume, policy=policy, show_result=quick, forecast=expected)


def explaining(config: MeasureConfig) -> MeasureConfig:
    """The configuration with the stages of an explanation."""
    return config.model_copy(update={"stages": list(STAGES)})


def as_before(config: MeasureConfig, run: RunFolder, fixed: frozenset[str]) -> MeasureConfig | None:
    """The configuration with the batches that the folder has, where no others are asked for; None if new.

    Raises:
        RunFolderError: the folder explains another checkpoint.
    """
    if not run.file(CONFIG).is_file():
        return None
    known = load_config(MeasureConfig, run.file(CONFIG), [])
    if Path(known.checkpoint).resolve() != Path(config.checkpoint).resolve():
        raise RunFolderError(
            f"{run.path} explains {known.checkpoint}, not {config.checkpoint}; give another --out"
        )
    kept = {name: getattr(known, name) for name in ("update", "probe") if name not in fixed}
    return config.model_copy(update=kept)
