"""From a task specification to a task."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepscope.errors import ConfigError, TaskError
from stepscope.results import Rollouts
from stepscope.tasks.example import Example
from stepscope.tasks.formats.response import TAGS, AnswerFormat, load_answer_format
from stepscope.tasks.formats.templates import (
    BOXED,
    FIELD,
    HASH,
    LAST_NUMBER,
    PLAIN,
    R1,
    SHORT,
    Template,
    load_template,
)
from stepscope.tasks.formats.wording import Wording, load_wording
from stepscope.tasks.own_reward import OwnReward
from stepscope.tasks.problem import SPLITS, Chat, Problem, Score, Source, Task, Written
from stepscope.tasks.sources.arithmetic import Arithmetic
from stepscope.tasks.sources.gsm8k import Gsm8k
from stepscope.tasks.sources.jsonl import JsonLines
from stepscope.tasks.sources.own import OwnPrompts
from stepscope.tasks.sources.reasoning import ReasoningGym

FORMS = {
    "arithmetic": "arithmetic[:terms=3,digits=2,...]",
    "gsm8k": "gsm8k[:DIR]",
    "rg": "rg:NAME[:key=value,...]",
    "jsonl": "jsonl:FILE",
}


@dataclass(frozen=True)
class TemplatedTask:
    """A source of problems, asked through a template; the task that :func:`load_task` returns.

    Attributes:
        spec: what it was loaded from.
        source: problems and their grader.
        template: from question to prompt.
        format_weight: added to the reward of a well-formed response.
        opening: think block that the prompt ends with, where the response begins; it depends on the chat
            template, see :func:`asked_through`.
        answer_format: where in a response its answer stands.
        reward: a function of the user's that grades in place of the source, or None. What it returns is the
            whole reward; from 1 on a response counts as correct.
    """

    spec: str
    source: Source
    template: Template
    format_weight: float = 0.0
    opening: str = ""
    answer_format: AnswerFormat = TAGS
    reward: OwnReward | None = None

    def through(self, tokenizer: Any) -> TemplatedTask:
        """The task with the opening that its prompts have with this tokenizer."""
        example = None
        if isinstance(self.source, OwnPrompts):
            example = self.prompt(next(p for split in SPLITS for p in self.problems(split)), tokenizer)
        return replace(self, opening=self.template.opening(tokenizer, example))

    @property
    def grader(self) -> str:
        """Who grades: the task, or the user's function."""
        return self.spec if self.reward is None else self.reward.name

    @property
    def digest(self) -> str:
        """What tells one state of the task's data apart from another; see :class:`Source`."""
        return self.source.digest

    @property
    def shared(self) -> frozenset[str]:
        """Questions that both splits ask; see :class:`Source`."""
        return self.source.shared

    @property
    def overlap(self) -> str:
        """What to know about questions that both splits ask; empty where there are none."""
        if not self.shared:
            return ""
        return (
            f"task {self.spec}: {len(self.shared)} question(s) of the test split are asked in the training "
            f"split, too ({min(self.shared)[:40]!r}); what is evaluated on them is not held out"
        )

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of ``train`` or ``test``, in a fixed order."""
        return self.source.problems(split)

    def prompt(self, problem: Problem, tokenizer: Any) -> str | Chat:
        """What is asked, as a text or in messages; see :meth:`Template.ask`."""
        messages = problem.metadata.get("messages")
        if messages is not None:
            return self.template.pass_on(messages)
        return self.template.ask(problem.question, tokenizer)

    def scores(self, written: Sequence[Written], tokenizer: Any) -> list[Score]:
        """Scores of a batch of responses, in their order.

        Raises:
            RewardError: the user's function cannot grade them.
        """
        if self.reward is None or not written:
            return [self.score(one.problem, one.response) for one in written]
        return [
            Score(reward=reward, correct=reward >= 1, formatted=self.formatted(one.response))
            for one, reward in zip(written, self.reward.grade(written, tokenizer), strict=True)
        ]

    def score(self, problem: Problem, response: str) -> Score:
        """Score of a decoded response by the source; see :meth:`scores` for a function of the user's."""
        reading = self.answer_format.read(self.opening + response)
        credit = 0.0 if reading.answer is None else self.source.grade(problem, reading.answer)
        reward = credit + self.format_weight * reading.formatted
        return Score(reward=reward, correct=credit >= 1, formatted=reading.formatted)

    def formatted(self, response: str) -> bool:
        """Whether a response keeps the answer format."""
        return self.answer_format.read(self.opening + response).formatted

    def demonstration(self, problem: Problem) -> str:
        """A full worked response in the answer format.

        Raises:
            TaskError: the task has no worked solution, its own scoring does not take it for correct, or the
                format only says how an answer is read.
        """
        worked = self.source.worked(problem)
        text = self.answer_format.lay_out(
            worked.thought, worked.answer, opening=self.opening, compact=self.template.compact
        )
        score = self.score(problem, text)
        if not (score.correct and score.formatted):
            raise TaskError(
                f"{problem.metadata.get('where', problem.prompt_id)}: its demonstration does not score as "
                f"correct and well-formed (the answer shown is {worked.answer[:40]!r}, the reference "
                f"{problem.answer[:40]!r}); mend solution and answer, or leave it out"
            )
        return text


def asked_through(task: Task, tokenizer: Any) -> Task:
    """The task as a tokenizer asks it: a think block that the prompt opens goes on in the response.

    Tasks of the user's own are returned as they are.

    Raises:
        TaskError: the tokenizer's chat template does not render the prompt.
    """
    return task.through(tokenizer) if isinstance(task, TemplatedTask) else task


def scored(task: Task, written: Sequence[Written], tokenizer: Any) -> list[Score]:
    """Scores of a batch of responses, in their order: by the whole batch, where the task can.

    Raises:
        RewardError: a function of the user's cannot grade them.
    """
    if isinstance(task, TemplatedTask):
        return task.scores(written, tokenizer)
    return [task.score(one.problem, one.response) for one in written]


def example_in(task: Task, rollouts: Rollouts) -> Example:
    """A response of a batch with its grade, one that ends by itself where there is such.

    Args:
        task: that asked and graded.
        rollouts: at least one response.
    """
    i = shown_place(rollouts)
    row = {name: getattr(rollouts, f"{name}s")[i] for name in ("prompt_id", "prompt", "response", "reward")}
    return example_of(task, {**row, "correct": rollouts.correct[i], "truncated": rollouts.truncated[i]})


def shown_place(rollouts: Rollouts) -> int:
    """Place of the response that stands for a batch: the first that ends by itself, or else the first."""
    ended = np.flatnonzero(~rollouts.truncated)
    return int(ended[0]) if len(ended) else 0


def example_of(task: Task, row: Mapping[str, Any]) -> Example:
    """A response with its grade.

    Args:
        task: that asked and graded.
        row: ``prompt_id``, ``prompt``, ``response``, ``reward``, ``correct``, ``truncated``.
    """
    problems = (p for split in SPLITS for p in task.problems(split))
    problem = next((p for p in problems if p.prompt_id == row["prompt_id"]), None)
    found = Example(
        prompt=row["prompt"],
        response=row["response"],
        truncated=bool(row["truncated"]),
        grader=task.grader if isinstance(task, TemplatedTask) else task.spec,
        reward=float(row["reward"]),
        correct=bool(row["correct"]),
        reference="" if problem is None else problem.answer,
    )
    if not isinstance(task, TemplatedTask) or task.reward is not None:
        return found
    answer = task.answer_format.read(task.opening + found.response).answer
    return replace(found, answer=answer, answer_format=task.answer_format.name)


def default_template(spec: str, answer_format: str = TAGS.name) -> str:
    """Name of the template a task is asked through where none is chosen: it asks for the answer format."""
    if spec.partition(":")[0] == "arithmetic":
        return SHORT.name
    asking = {TAGS.name: R1, **{t.name: t for t in (BOXED, HASH, LAST_NUMBER)}}
    return asking.get(answer_format, PLAIN).name


def load_task(
    spec: str,
    *,
    template: str | None = None,
    format_weight: float = 0.0,
    system_prompt: str = "",
    prefill: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answer_format: str = TAGS.name,
    chat_template: str = "",
) -> TemplatedTask:
    """Load a task.

    Args:
        spec: ``arithmetic`` (with options ``arithmetic:terms=2-4,digits=2,ops=+``), ``gsm8k`` (hub),
            ``gsm8k:DIR``, ``rg:NAME`` (with options ``rg:chain_sum:size=500,min_terms=2``), ``jsonl:FILE``.
        template: name or text of the prompt template, see :func:`load_template`; None or an empty text means
            ``short`` for ``arithmetic``, and for the rest the one that asks for the answer format (``r1`` for
            ``tags``).
        format_weight: added to the reward of a well-formed response. 0 by default: the reward is correctness
            alone, as the supervised warm-up has already taught the format.
        system_prompt: system message of the chat template, see :func:`load_template`.
        prefill: what the response's turn begins with, at the end of the prompt.
        chat_template_kwargs: variables of the chat template.
        answer_format: where in a response its answer stands: ``tags``, ``boxed``, ``hash``, ``last_number``
            or ``regex:EXPRESSION``, see :mod:`stepscope.tasks.formats.response`.
        chat_template: a chat template in place of the tokenizer's, as text.

    Raises:
        TaskError: unknown task, option, template or answer format, or its data cannot be read.
    """
    name, rest = source_of(spec)
    stands = load_answer_format(answer_format)
    chosen = load_template(
        template or default_template(spec, answer_format),
        system_prompt=system_prompt,
        prefill=prefill,
        chat_template_kwargs=chat_template_kwargs,
        chat_template=chat_template,
    )
    return TemplatedTask(spec, _source(name, rest), chosen, format_weight, chosen.opening(), stands)


def load_prompts(
    path: str | Path,
    *,
    reward: str | None = None,
    template: str | None = None,
    system_prompt: str = "",
    prefill: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answer_format: str = TAGS.name,
    format_weight: float = 0.0,
) -> TemplatedTask:
    """The prompts of a run as a task: each row of a file is a whole prompt, asked as TRL asks it.

    Args:
        path: JSON lines, parquet or CSV with a column ``prompt``: a text, which is asked as it stands, or a
            chat's messages, for the tokenizer's chat template. See
            :class:`stepscope.tasks.sources.own.OwnPrompts` for other columns.
        reward: ``module:function`` of the user's own, see :class:`stepscope.tasks.own_reward.OwnReward`; None
            holds answers against the column ``answer``.
        template: what a text stands in, or a chat template for messages, see
            :func:`stepscope.tasks.formats.wording.load_wording`; None for nothing.
        system_prompt: system message before a text that a template makes the user's message.
        prefill: what the response's turn begins with, at the end of the prompt.
        chat_template_kwargs: variables of the chat template.
        answer_format: where in a response its answer stands; as for :func:`load_task`.
        format_weight: added to the reward of a well-formed response where no function grades.

    Raises:
        TaskError: the file cannot be read, or the template does not go with its prompts, or nothing says what
            a response earns.
        ConfigError: there is no such function.
    """
    spec = f"prompts:{path}"
    if not spec.isprintable():
        raise TaskError(
            f"prompts {ascii(str(path))[:80]}: holds characters that cannot be printed; rename it"
        )
    source = OwnPrompts.from_path(Path(path))
    wording = Wording() if template is None else load_wording(template)
    if source.in_messages and (wording.text or system_prompt):
        raise TaskError(
            f"prompts {path}: they are chats, and {'such a template' if wording.text else 'system_prompt'} "
            "goes around a text; give a chat template's file, or write it into the messages"
        )
    if not source.in_messages and wording.chat:
        raise TaskError(
            f"prompts {path}: they are texts, to which neither TRL nor stepscope applies a chat template; "
            "give messages, or template='chat:{prompt}' for the tokenizer's own chat template"
        )
    function = None if reward is None else OwnReward.named(reward)
    if function is None and (lacking := source.without_answer) is not None:
        raise ConfigError(
            f"{lacking.metadata['where']}: no answer, and so nothing to grade a response by; give a reward "
            "function (--reward module:function), or a column 'answer'"
        )
    chosen = load_template(
        wording.text or FIELD,
        system_prompt=system_prompt,
        prefill=prefill,
        chat_template_kwargs=chat_template_kwargs,
        chat_template=wording.chat,
    )
    stands = load_answer_format(answer_format)
    return TemplatedTask(spec, source, chosen, format_weight, chosen.opening(), stands, function)


def source_of(spec: str) -> tuple[str, str]:
    """Kind of source of a specification and the rest of it; nothing is read.

    Raises:
        TaskError: there is no such kind.
    """
    if not spec.isprintable():
        raise TaskError(f"task {ascii(spec)[:60]}: holds characters that cannot be printed; rename the file")
    name, _, rest = spec.partition(":")
    if name not in FORMS or (name in ("rg", "jsonl") and not rest):
        close = difflib.get_close_matches(name, FORMS, n=1)
        hint = f"; did you mean {FORMS[close[0]]!r}?" if close else ""
        raise TaskError(f"unknown task {spec!r}: available are {', '.join(FORMS.values())}{hint}")
    return name, rest


def changed_data(where: str, spec: str, before: str, now: str) -> TaskError:
    """The error that refuses to go on with other data than something was made with."""
    return TaskError(
        f"{where}: the data of task {spec} have changed since then (digest {before[:40]} then, "
        f"{now[:40]} now); put back the data of then, or start afresh in another folder (--out)"
    )


def _source(name: str, rest: str) -> Source:
    if name == "arithmetic":
        return Arithmetic.from_options(rest)
    if name == "gsm8k":
        return Gsm8k.from_folder(Path(rest)) if rest else Gsm8k.from_hub()
    if name == "rg":
        return ReasoningGym.from_options(rest)
    return JsonLines.from_path(Path(rest))
