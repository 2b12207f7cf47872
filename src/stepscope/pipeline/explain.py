"""``stepscope explain``: from a checkpoint to who moved the entropy, within a time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from stepscope.config import MeasureConfig, Stage, load_config
from stepscope.console import in_words, say
from stepscope.errors import ConfigError, RunFolderError
from stepscope.pipeline.inputs.tasks import open_task
from stepscope.pipeline.measure import run_measure
from stepscope.pipeline.stages.report import PAGE
from stepscope.pipeline.stages.session import Session
from stepscope.policy.gradients.derivatives import gradient, response_logprob
from stepscope.policy.rollouts import sample_rollouts
from stepscope.report.terminal import answer_of, as_record, printed
from stepscope.runs import CONFIG, RunFolder

STAGES: tuple[Stage, ...] = ("rollouts", "step", "change", "influence", "report")
"""What the sentence, the waterfall and the largest tokens need."""

FLOORS = 27.0
"""Plain forward and backward passes over both batches that these stages take (docs/RESULTS.md, by stage)."""

PILOT = (8, 32)
"""Prompts of the trial that tells the speed; the second where the first is done within a second."""

RESERVE = 0.8
"""Of the time that is left, what batches are sized for: a trial of a few responses errs by some."""

FEWEST = 8
"""Prompts that either batch has at least; below it every figure is flagged."""


def run_explain(
    config: MeasureConfig, *, minutes: float, fixed: frozenset[str] = frozenset(), as_json: bool = False
) -> Path:
    """Measure as much of a checkpoint's next step as a time allows, and print the answer.

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
    folder = measure_within(config, minutes=minutes, fixed=fixed)
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
    begin = time.monotonic()
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: give more than 0")
    config = config.model_copy(update={"stages": list(STAGES)})
    run, policy = RunFolder(Path(config.out)), None
    if run.file(CONFIG).is_file():
        config = _as_before(config, run, fixed)
    else:
        session = Session(config, run)
        policy = session.policy
        each = _seconds_each(session)
        config = fitting(config, each, 60 * minutes - (time.monotonic() - begin), fixed)
    return run_measure(config, resume=True, policy=policy, show_result=False)


def fitting(
    config: MeasureConfig, seconds: float, left: float, fixed: frozenset[str] = frozenset()
) -> MeasureConfig:
    """A configuration whose batches can be measured in the time that is left, and a line that says so.

    Args:
        config: with the batches that are wanted.
        seconds: that a sequence takes, over all stages.
        left: seconds.
        fixed: batches that stay as they are.
    """
    update, probe = config.update, config.probe
    sizes = {"update": update.num_prompts * update.group_size, "probe": probe.num_prompts * probe.group_size}
    given = sum(sizes[name] for name in fixed) * seconds
    rest = sum(size for name, size in sizes.items() if name not in fixed) * seconds
    share = min(1.0, max(0.0, RESERVE * left - given) / rest) if rest else 1.0

    def prompts(name: str, wanted: int) -> int:
        return wanted if name in fixed else min(wanted, max(FEWEST, int(wanted * share)))

    update = update.model_copy(update={"num_prompts": prompts("update", update.num_prompts)})
    probe = probe.model_copy(update={"num_prompts": prompts("probe", probe.num_prompts)})
    total = (update.num_prompts * update.group_size + probe.num_prompts * probe.group_size) * seconds
    less = (update.num_prompts, probe.num_prompts) != (config.update.num_prompts, config.probe.num_prompts)
    say(
        f"explain: {update.num_prompts} x {update.group_size} responses make the step, "
        f"{probe.num_prompts} x {probe.group_size} measure it: about {in_words(total)}"
        + (" (smaller than the default, for the time; --minutes gives more)" if less else "")
    )
    if total > left:
        say(
            f"explain: {in_words(left)} are left, and fewer than {FEWEST} prompts tell nothing; a sequence "
            f"takes {seconds:.1f} s here. A GPU (--device) or shorter responses "
            "(loss.max_response_tokens) would help"
        )
    return config.model_copy(update={"update": update, "probe": probe})


def _as_before(config: MeasureConfig, run: RunFolder, fixed: frozenset[str]) -> MeasureConfig:
    """The configuration with the batches that the folder has, where no others are asked for."""
    known = load_config(MeasureConfig, run.file(CONFIG), [])
    if Path(known.checkpoint).resolve() != Path(config.checkpoint).resolve():
        raise RunFolderError(
            f"{run.path} explains {known.checkpoint}, not {config.checkpoint}; give another --out"
        )
    kept = {name: getattr(known, name) for name in ("update", "probe") if name not in fixed}
    return config.model_copy(update=kept)


def _seconds_each(session: Session) -> float:
    """Seconds that a sequence takes over all stages, by a trial on a few prompts of the probe's split."""
    config, policy = session.config, session.policy
    task, seed, split = open_task(config.task, policy, own=config), config.probe.seed, config.probe.split
    found = 0.0
    for number in PILOT:
        begin = time.monotonic()
        trial = sample_rollouts(policy, task, num_prompts=number, group_size=1, seed=seed, split=split)
        sampled = time.monotonic()
        gradient(policy, trial, response_logprob, budget=session.budget)
        passed = time.monotonic()
        found = (sampled - begin + FLOORS * (passed - sampled)) / number
        if passed - begin > 1:
            break
    return found
