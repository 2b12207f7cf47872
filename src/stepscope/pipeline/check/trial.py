"""A few responses of a checkpoint: how it is asked, what it answers, what that earns, how long it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from stepscope.config import MeasureConfig
from stepscope.errors import BatchError, RewardError, TaskError
from stepscope.measure.change.uncertainty import estimate_ratio
from stepscope.pipeline.check.answers import answer_finding
from stepscope.pipeline.inputs.logged_entropy import entropy_against_log
from stepscope.pipeline.inputs.tasks import open_task
from stepscope.policy.check.findings import Finding
from stepscope.policy.gradients.derivatives import gradient, response_logprob
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import sample_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.tasks import TemplatedTask
from stepscope.tasks.example import Example
from stepscope.tasks.load import example_in, shown_place

NUM_RESPONSES = 16
MAX_TOKENS = 512
"""Longest response sampled here, so that a check stays a matter of seconds to minutes."""


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        findings: what is to be said of it.
        example: a response with its prompt, as the policy gets it, and its grade; None where there is none.
        cures: settings that a finding proposes.
        sampled: the responses; None where there are none.
        sampling_seconds: that a response took to be sampled, scored and graded.
        pass_seconds: that a forward and a backward pass over one took.
    """

    findings: list[Finding]
    example: Example | None = None
    cures: list[str] = field(default_factory=list)
    sampled: Rollouts | None = None
    sampling_seconds: float = 0.0
    pass_seconds: float = 0.0


def try_out(policy: Policy, config: MeasureConfig) -> Trial:
    """Sample ``NUM_RESPONSES`` responses of at most ``MAX_TOKENS`` tokens, always the same, and look at them.

    Args:
        policy: of the checkpoint.
        config: the measurement, with its task, or its prompts and rewards; without either nothing is tried.

    Raises:
        TaskError: what the configuration asks cannot be loaded.
        ConfigError: likewise.
    """
    if not (config.task or config.prompts or policy.settings.task):
        return Trial([])
    settings = policy.settings
    try:
        task = open_task(config.task, policy, own=config)
        split = "test" if len(task.problems("test")) else "train"
        short = replace(settings, max_response_tokens=min(settings.max_response_tokens, MAX_TOKENS))
        brief = replace(policy, settings=short)
        begin = time.perf_counter()
        sampled = sample_rollouts(
            brief,
            task,
            num_prompts=min(NUM_RESPONSES, len(task.problems(split))),
            group_size=1,
            seed=0,
            split=split,
        )
        done = time.perf_counter()
    except RewardError as error:
        shown = error.example if isinstance(error.example, Example) else None
        return Trial([Finding("fail", str(error), "mend the reward function")], shown)
    except (TaskError, BatchError) as error:
        if (config.task or config.prompts) and isinstance(error, TaskError):
            raise
        return Trial([replace(Finding.from_error(error), level="warn")])
    findings, cures = _of_rewards(task, sampled)
    if (found := _against_log(brief, sampled)) is not None:
        findings.append(found)
    gradient(brief, sampled, response_logprob, budget=Budget(max_sequences=config.batch_size))
    passed = time.perf_counter()
    ids = sampled.prompt_token_ids[shown_place(sampled)]
    return Trial(
        findings,
        replace(example_in(task, sampled), prompt=policy.tokenizer.decode(list(ids))),
        cures,
        sampled,
        (done - begin) / len(sampled),
        (passed - done) / len(sampled),
    )


def _of_rewards(task: TemplatedTask, sampled: Rollouts) -> tuple[list[Finding], list[str]]:
    """What the responses earn, and settings that would change it."""
    if task.reward is None:
        found, other = answer_finding(task, sampled)
        return [found], [f"loss.answer_format={other}"] if other else []
    rewards = sampled.rewards
    what = (
        f"rewards of {len(sampled)} responses by {task.reward.name}: {rewards.mean():.4g} on average, "
        f"{rewards.min():.4g} to {rewards.max():.4g}, {int(sampled.correct.sum())} of at least 1"
    )
    if rewards.min() < rewards.max():
        return [Finding("ok", what)], []
    cure = "all the same make no step: look at the prompt, response and grade below"
    return [Finding("warn", what, cure)], []


def _against_log(policy: Policy, sampled: Rollouts) -> Finding | None:
    """Whether the entropy is that of the training; None where none is logged, or responses are cut short."""
    if policy.settings.max_response_tokens == MAX_TOKENS and sampled.truncated.any():
        return None  # the training may let them be longer
    entropy = estimate_ratio(
        sampled.entropy_per_seq,
        sampled.num_policy_tokens,
        sampled.prompt_index,
        errors="delta",
        unit="nats/token",
        method="ratio of sums over responses",
    )
    found = entropy_against_log(policy, entropy)
    if found is None:
        return None
    if found["doubt"]:
        return Finding("warn", found["doubt"], "look at the prompt below; ask as the training asks")
    what = (
        f"entropy {entropy.value:.3g} +- {entropy.stderr:.2g} nats per token, the trainer logged "
        f"{found['value']:.3g} up to step {found['last_step']}"
    )
    return Finding("ok", what)
