"""The prompts of a training, as rows of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from stepscope.config import TrainConfig
from stepscope.errors import ConfigError
from stepscope.results import same_text
from stepscope.tasks.formats.prompts import encode_prompt
from stepscope.tasks.problem import Problem, Task


def question_settings(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint's ``StepSettings`` say of the questions and how they are scored."""
    return {
        "task": config.task,
        "prompt_template": config.template or "",
        "system_prompt": config.system_prompt or "",
        "prefill": config.prefill or "",
        "chat_template_kwargs": config.chat_template_kwargs,
        "seed": config.seed,
        "format_weight": config.format_weight,
        "answer_format": config.answer_format,
    }


def prompt_rows(
    task: Task,
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    longest: int | None,
    distinct: bool = False,
    section: str = "rl",
) -> Dataset:
    """A row per problem: prompt, its token ids, problem index; prompts over ``longest`` tokens are left out.

    With ``distinct`` the copies of a prompt are left out, too. ``section`` is that of the configuration.

    Raises:
        ConfigError: no prompt is short enough.
        TaskError: a prompt cannot be rendered.
    """
    prompts = [encode_prompt(task.prompt(problem, tokenizer), tokenizer) for problem in problems]
    kept = list(range(len(prompts)))
    if longest is not None:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        kept = [i for i in kept if lengths[i] <= longest]
        if not kept:
            raise ConfigError(
                f"{section}.max_prompt_tokens: {longest} is shorter than every prompt, the shortest has "
                f"{min(lengths)} tokens; raise it"
            )
    if distinct:
        kept = sorted({same_text(problems[i].question): i for i in reversed(kept)}.values())
    return Dataset.from_dict(
        {
            "prompt": [prompts[i].text for i in kept],
            "prompt_token_ids": [list(prompts[i].token_ids) for i in kept],
            "index": kept,
        }
    )
