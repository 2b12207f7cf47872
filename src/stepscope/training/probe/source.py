"""Where a probe's prompts and rewards come from: a task, or the trainer that the probe watches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from accelerate.utils import gather_object
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational

from stepscope.errors import BatchError, ConfigError, RewardError
from stepscope.own_code import what_happened
from stepscope.policy.rollouts import SamplingOptions, sample_responses, sample_rollouts
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.tasks import Task, TemplatedTask
from stepscope.tasks.example import Example
from stepscope.tasks.load import shown_place
from stepscope.training.watching.guest import weighted_rewards

Used = frozenset[tuple[int, ...]]
"""Prompts of the batch under way, as token ids."""


class Source(Protocol):
    """Gives a probe its batches."""

    @property
    def name(self) -> str:
        """Where the prompts come from, in words."""

    @property
    def doubtful(self) -> str:
        """What may be wrong with them, and what to do, should their entropy not be that of the training."""

    def used(self) -> Used:
        """Prompts that the step under way is made of; every process has to call this."""

    def sample(self, policy: Policy, count: int, *, seed: int, used: Used) -> Rollouts:
        """One response to each of ``count`` prompts that are not in ``used``, with rewards."""


@dataclass(frozen=True)
class TaskSource:
    """Prompts of one split of a task, graded by it."""

    task: Task
    split: str

    @property
    def name(self) -> str:
        """The task's specification and the split."""
        return f"{self.task.spec}, {self.split} split"

    @property
    def doubtful(self) -> str:
        """They are asked in another way than the training's."""
        return (
            "are not asked the way the training asks; leave out task, so that the probe takes the trainer's "
            "prompts, or give the template of the training"
        )

    def used(self) -> Used:
        """Nothing: the split is not the one that is trained on."""
        return frozenset()

    def sample(self, policy: Policy, count: int, *, seed: int, used: Used) -> Rollouts:
        """One response to each of ``count`` prompts."""
        return sample_rollouts(
            policy,
            self.task,
            num_prompts=count,
            group_size=1,
            seed=seed,
            split=self.split,
            options=SamplingOptions(
                exclude=self.task.shared if isinstance(self.task, TemplatedTask) else frozenset()
            ),
        )


@dataclass(frozen=True)
class TrainerSource:
    """Rows of the trainer's own data, tokenized by its own method and graded by its own reward functions.

    Prompts are those of its ``eval_dataset``; without one, of its ``train_dataset``; none that is in the
    batch under way. A prompt is its token ids: equal rows are drawn once.

    Attributes:
        trainer: a GRPO trainer of TRL.
        rewards: also grade the responses; without it, and with several processes, rewards are nan.
    """

    trainer: Any
    rewards: bool

    @property
    def held_out(self) -> bool:
        """Whether there is a data set that is not trained on."""
        return self.trainer.eval_dataset is not None

    @property
    def name(self) -> str:
        """Which of the trainer's data sets."""
        return f"{'eval' if self.held_out else 'train'}_dataset without the prompts of the batch"

    @property
    def doubtful(self) -> str:
        """They are of another kind, or the run does not sample from the policy itself."""
        return (
            "are of another kind than the batch, or the batch is not sampled from the policy itself; compare "
            "eval_dataset with train_dataset, and look at top_p, top_k, min_p and repetition_penalty"
        )

    @property
    def tables(self) -> list[Any]:
        """The data sets that rows are drawn from; ``eval_dataset`` may be several by name."""
        data = self.trainer.eval_dataset if self.held_out else self.trainer.train_dataset
        return list(data.values()) if isinstance(data, Mapping) else [data]

    def check(self, count: int) -> None:
        """Refuse a trainer whose prompts and responses a probe cannot make.

        Raises:
            ConfigError: its data cannot be indexed or are too few, or its responses are more than text that
                the model writes in one go.
        """
        turns = [
            n for n in ("tools", "environment_factories", "rollout_func") if getattr(self.trainer, n, None)
        ]
        if turns:
            raise ConfigError(
                f"the trainer samples with {turns[0]}, a probe samples one plain response to each prompt; "
                "give the probe a task of its own, StepProbe(task=...)"
            )
        where = "eval_dataset" if self.held_out else "train_dataset"
        for table in self.tables:
            if not hasattr(table, "__len__"):
                raise ConfigError(
                    f"the trainer's {where} is a stream and has no rows to draw from; give the trainer an "
                    "eval_dataset of type datasets.Dataset, or the probe a task, StepProbe(task=...)"
                )
            columns = set(table.column_names)
            if "prompt" not in columns or columns & {"image", "images"}:
                raise ConfigError(
                    f"the trainer's {where} has the columns {', '.join(sorted(columns))}, expected a prompt "
                    "of text alone; give the probe a task of its own, StepProbe(task=...)"
                )
        rows = sum(map(len, self.tables))
        if rows < count:
            raise ConfigError(f"num_prompts is {count}, the trainer's {where} has {rows} rows; lower it")

    def used(self) -> Used:
        """The prompts of the generated batch that this step belongs to, those of all processes."""
        own = [
            tuple(ids[mask.bool()].tolist())
            for batch in self.trainer._buffered_inputs or []
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        return frozenset(gather_object(own))

    def sample(self, policy: Policy, count: int, *, seed: int, used: Used) -> Rollouts:
        """One response to each of ``count`` different prompts that are not in ``used``.

        Raises:
            BatchError: too few prompts are left, or one is too long for the model.
            RewardError: the trainer's reward functions fail on these responses.
        """
        chosen: dict[tuple[int, ...], dict[str, Any]] = {}
        for rows in self._shuffled(seed, count):
            ids, _, _ = self.trainer._tokenize_prompts([row["prompt"] for row in rows])
            for prompt, row in zip(map(tuple, ids), rows, strict=True):
                if prompt and prompt not in used and len(chosen) < count:
                    chosen.setdefault(prompt, row)
            if len(chosen) == count:
                break
        if len(chosen) < count:
            raise BatchError(
                f"{self.name}: {len(chosen)} different prompts are left, num_prompts is {count}; lower it, "
                "or give the trainer an eval_dataset"
            )
        rollouts = sample_responses(policy, list(chosen), seed=seed)
        if not self.rewards or self.trainer.accelerator.num_processes > 1:
            return rollouts
        try:
            rewards = self._grade(list(chosen.values()), rollouts)
        except Exception as error:
            fault = what_happened(error)
            raise RewardError(fault, replace(example_of(rollouts, self.name), fault=fault)) from error
        return replace(rollouts, rewards=rewards)

    def _shuffled(self, seed: int, size: int) -> Iterator[list[dict[str, Any]]]:
        """All rows in random order, ``size`` at a time."""
        ends = np.cumsum([0, *map(len, self.tables)])
        order = np.random.default_rng([seed, 0]).permutation(int(ends[-1]))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            which = np.searchsorted(ends, places, side="right") - 1
            yield [self.tables[t][int(i - ends[t])] for i, t in zip(places, which, strict=True)]

    def _grade(self, rows: Sequence[dict[str, Any]], rollouts: Rollouts) -> FloatArray:
        """(seq,) weighted sums of the trainer's reward functions, as TRL takes them; nan where all are."""
        prompts = [row["prompt"] for row in rows]
        ids = [list(response) for response in rollouts.response_token_ids]
        completions: list[Any] = self.trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            tokenizer = self.trainer._tokenizer
            if any(getattr(tokenizer, n, None) is not None for n in ("response_template", "response_schema")):
                asked = map(list, rollouts.prompt_token_ids)
                completions = [
                    [parse_response(tokenizer, response, prefix=prompt)]
                    for response, prompt in zip(ids, asked, strict=True)
                ]
            else:
                completions = [[{"role": "assistant", "content": text}] for text in completions]
        with _logs_untouched(self.trainer):
            found = self.trainer._calculate_rewards(list(rows), prompts, completions, ids)
        return weighted_rewards(self.trainer, found)


def example_of(rollouts: Rollouts, source: str) -> Example:
    """A response of a probe batch with its prompt and reward.

    Args:
        rollouts: the batch.
        source: where its prompts come from, and who grades.
    """
    i = shown_place(rollouts)
    reward = float(rollouts.rewards[i])
    return Example(
        prompt=rollouts.prompts[i],
        response=rollouts.responses[i],
        truncated=bool(rollouts.truncated[i]),
        grader=source,
        reward=None if math.isnan(reward) else reward,
    )


@contextmanager
def _logs_untouched(trainer: Any) -> Iterator[None]:
    """What reward functions add to the trainer's logs inside the block is taken back."""
    names = ("_pending_extra_logs", "_pending_metrics")
    kept = [
        (log, {k: list(v) for k, v in log.items()})
        for n in names
        if (log := getattr(trainer, n, None)) is not None
    ]
    try:
        yield
    finally:
        for log, before in kept:
            log.clear()
            log.update(before)
