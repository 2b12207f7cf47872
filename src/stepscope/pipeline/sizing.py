"""How long a measurement takes here, by a trial of a few responses, and batches that fit a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepscope.config import MeasureConfig, Stage
from stepscope.console import in_words, say
from stepscope.pipeline.inputs.tasks import open_task
from stepscope.pipeline.speed import FLOORS, LONG, PILOT, least_speed
from stepscope.pipeline.stages.session import Session
from stepscope.policy.gradients.derivatives import gradient, response_logprob
from stepscope.policy.group import current
from stepscope.policy.loss.registry import of_preferences
from stepscope.policy.loss.settings import NEXT_BATCH, StepSettings
from stepscope.policy.rollouts import sample_rollouts
from stepscope.results import same_text
from stepscope.tasks import Task

PASSES: Mapping[Stage, float] = {
    **FLOORS,
    "validation": 50.0,
    "models": 30.0,
    "curvature": 60.0,
    "frontier": 15.0,
    "kinship": 20.0,
}
"""Passes of each stage; of the last five, which have sizes of their own, a rough guess."""

RESERVE = 0.8
"""Of the time that is left, what batches are sized for: a trial of a few responses errs by some."""

FEWEST = 8
"""Prompts that either batch has at least; below it every figure is flagged."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one sequence on this machine.

    Attributes:
        sampled: to sample it.
        passed: of a forward and a backward pass.
    """

    sampled: float
    passed: float

    def each(self, stages: Iterable[Stage]) -> float:
        """Seconds of a sequence over all these stages."""
        return sum(self.of(stage) for stage in stages)

    def of(self, stage: Stage) -> float:
        """Seconds of a sequence in a stage."""
        passes = PASSES.get(stage, 0.0) * self.passed
        return passes + self.sampled if stage == "rollouts" else passes


@dataclass
class Pace:
    """How a measurement gets on.

    Attributes:
        expected: seconds of each stage to come, in their order.
        begin: when the first began.
    """

    expected: Mapping[Stage, float]
    begin: float = field(default_factory=time.monotonic)

    def left(self, done: Stage) -> float:
        """Seconds that the stages after this one take, by what those so far took against their forecast."""
        names = list(self.expected)
        if done not in names:
            return 0.0
        at = names.index(done) + 1
        spent = sum(self.expected[name] for name in names[:at])
        rest = sum(self.expected[name] for name in names[at:])
        return rest * (time.monotonic() - self.begin) / spent if spent > 0 else rest

    def words(self, done: Stage) -> str:
        """What to say of it after a stage; nothing where it is hardly more."""
        left = self.left(done)
        return f"; about {in_words(left)} left" if left >= 2 else ""


def within_task(session: Session, fixed: frozenset[str] = frozenset()) -> MeasureConfig:
    """The configuration with no more prompts in its batches than the task has, update and probe apart.

    Where both batches are from the same prompts they share them in proportion, with :data:`FEWEST` each at
    least; what was asked for stays, and is refused where it is drawn.

    Args:
        session: of the measurement.
        fixed: batches that stay as they are.
    """
    config = session.config
    update, probe = config.update, config.probe
    task = open_task(config.task, session.policy, own=config)
    ours, theirs = _different(task, update.split), _different(task, probe.split)
    wanted, most = update.num_prompts + probe.num_prompts, len(ours | theirs)
    sizes = {"update": min(update.num_prompts, len(ours)), "probe": min(probe.num_prompts, len(theirs))}
    if ours & theirs and sum(sizes.values()) > most:
        sizes["update"] = min(sizes["update"], max(FEWEST, most * update.num_prompts // wanted))
        sizes["probe"] = min(sizes["probe"], max(FEWEST, most - sizes["update"]))
    changed = {
        name: batch.model_copy(update={"num_prompts": sizes[name]})
        for name, batch in (("update", update), ("probe", probe))
        if name not in fixed and sizes[name] < batch.num_prompts
    }
    if changed:
        say(
            f"the task has {most} different prompts: "
            + ", ".join(f"{name}.num_prompts={sizes[name]}" for name in changed)
        )
    return config.model_copy(update=changed)


def _different(task: Task, split: str) -> set[str]:
    """The prompts of a split, copies once."""
    return {same_text(problem.question) for problem in task.problems(split)}


def trial(session: Session) -> Speed:
    """The speed of this machine, on a few prompts of the probe's split. Collective."""
    config, policy = session.config, session.policy
    task, seed, split = open_task(config.task, policy, own=config), config.probe.seed, config.probe.split
    found, most = Speed(0.0, 0.0), len(_different(task, split))
    for number in (min(few, most) for few in PILOT):
        begin = time.monotonic()
        few = sample_rollouts(policy, task, num_prompts=number, group_size=1, seed=seed, split=split)
        sampled = time.monotonic()
        gradient(policy, few, response_logprob, budget=session.budget)
        passed = time.monotonic()
        own = ((sampled - begin) / number, (passed - sampled) / number)
        found = Speed(*current().from_main(lambda own=own: own))  # type: ignore[misc]
        if number * (found.sampled + found.passed) > 1:
            break
    return found


def update_file(config: MeasureConfig, settings: StepSettings) -> str | None:
    """The file whose responses make the step: one that is given, or a training's from preferences."""
    if config.update.file is None and of_preferences(settings.loss_type):
        return str(Path(config.checkpoint) / NEXT_BATCH)
    return config.update.file


def batches_in_words(config: MeasureConfig, file: str | None) -> str:
    """What makes the step and what measures it.

    Args:
        config: with the batches.
        file: whose responses make the step; None where they are sampled.
    """
    update, probe = config.update, config.probe
    made = f"{update.num_prompts} x {update.group_size} responses make" if file is None else f"{file} makes"
    return f"{made} the step, {probe.num_prompts} x {probe.group_size} measure it"


def pace(config: MeasureConfig, speed: Speed, stages: Sequence[Stage]) -> Pace:
    """What the stages to come will take."""
    return Pace({stage: config.num_responses * speed.of(stage) for stage in stages})


def forecast(session: Session, stages: Sequence[Stage]) -> Pace | None:
    """Where a measurement may take hours, try how fast this machine is, and say so if it will. Collective.

    Args:
        session: with its policy loaded.
        stages: that are to be done.

    Returns:
        What the stages are expected to take; None where they take no hour on any machine, and nothing is
        tried.
    """
    config, policy = session.config, session.policy
    longest, size = policy.settings.max_response_tokens, sum(p.numel() for p in policy.model.parameters())
    passes = 1 + sum(PASSES.get(stage, 0.0) for stage in stages)
    operations = 6.0 * size * 1.5 * longest * config.num_responses * passes
    if operations < LONG * least_speed(policy.device):
        return None
    found = pace(config, trial(session), stages)
    if (total := sum(found.expected.values())) >= LONG:
        most = max(found.expected, key=lambda stage: found.expected[stage])
        say(
            f"warning: this will take about {in_words(total)}: {config.num_responses} responses of up to "
            f"{longest} tokens through a model of {size / 1e6:,.0f} million parameters on {policy.device}, "
            f"{found.expected[most] / total:.0%} of it in the stage {most}. --quick answers first, in some "
            "minutes; fewer prompts (update.num_prompts, probe.num_prompts), --stages without what is not "
            "needed, or a GPU (--device) make it shorter"
        )
    return found


def fitting(
    config: MeasureConfig,
    seconds: float,
    left: float,
    fixed: frozenset[str] = frozenset(),
    *,
    file: str | None = None,
    verb: str = "explain",
    more: str = "--minutes gives more",
) -> MeasureConfig:
    """A configuration whose batches can be measured in the time that is left, and a line that says so.

    Args:
        config: with the batches that are wanted.
        seconds: that a sequence takes, over all stages.
        left: seconds.
        fixed: batches that stay as they are.
        file: whose responses make the step; None where they are sampled.
        verb: that says so.
        more: how larger ones are had.
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
    less = (update.num_prompts, probe.num_prompts) != (config.update.num_prompts, config.probe.num_prompts)
    config = config.model_copy(update={"update": update, "probe": probe})
    total = config.num_responses * seconds
    say(
        f"{verb}: {batches_in_words(config, file)}: about {in_words(total)}"
        + (f" (smaller than the default, for the time; {more})" if less else "")
    )
    if total > left:
        say(
            f"{verb}: {in_words(left)} are left, and fewer than {FEWEST} prompts tell nothing; a "
            f"sequence takes {seconds:.1f} s here. A GPU (--device) or shorter responses "
            "(loss.max_response_tokens) would help"
        )
    return config
