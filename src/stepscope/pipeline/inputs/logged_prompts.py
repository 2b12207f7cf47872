"""What a run asked, where TRL logged it (``log_completions=True``), against what is about to be asked."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stepscope.errors import CheckpointError
from stepscope.policy.state import Policy
from stepscope.tasks.formats.prompts import encode_prompt
from stepscope.tasks.formats.templates import CHAT, FIELD
from stepscope.tasks.formats.wording import PROMPT
from stepscope.tasks.load import TemplatedTask
from stepscope.tasks.problem import Chat
from stepscope.tasks.sources.own import OwnPrompts

FOLDER = "completions"
"""Where TRL puts its tables, beside the checkpoints."""

_MOST = 64
_ROWS = 1024


@dataclass(frozen=True)
class _Logged:
    """A logged prompt: as TRL was given it, the part that asks, and the system message."""

    asked: str | Chat
    question: str
    system: str


def prompt_conflict(policy: Policy, task: TemplatedTask) -> str | None:
    """What to tell the user where the run's logged prompts ask the problems of the task in other token ids.

    Nothing is claimed where nothing is logged, or where fewer than half of the logged prompts ask problems of
    this task in one and the same way: then they are of another task.

    Raises:
        CheckpointError: the log cannot be read.
        TaskError: a logged prompt cannot be rendered.
    """
    if policy.path is None:
        return None
    folder = policy.path.parent / FOLDER
    logged = list(islice(_distinct(folder, policy.settings.chat_template_kwargs or {}), _MOST))
    problems = [problem for split in ("train", "test") for problem in task.problems(split)]
    ways: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for entry in logged:
        asking = [p for p in problems if p.question in entry.question]
        if not asking:
            continue
        problem = max(asking, key=lambda p: len(p.question))
        ours = encode_prompt(task.prompt(problem, policy.tokenizer), policy.tokenizer)
        theirs = encode_prompt(entry.asked, policy.tokenizer)
        if ours.token_ids == theirs.token_ids:
            return None
        template = entry.question.replace(problem.question, FIELD, 1)
        template = template if isinstance(entry.asked, str) else CHAT + template
        ways.setdefault((template, entry.system), []).append((theirs.text, ours.text))
    if not ways:
        return None
    (template, system), pairs = max(ways.items(), key=lambda item: len(item[1]))
    if len(pairs) < max(2, len(logged) / 2):
        return None
    cures = [_flag("prompt_template", template)]
    if system != policy.settings.system_prompt:
        cures.append(_flag("system_prompt", system))
    if isinstance(task.source, OwnPrompts):
        wording = template.removeprefix(CHAT).replace(FIELD, PROMPT)
        cures = ["the prompts as the run had them, or --template: the run asked in", repr(wording)]
    theirs_text, ours_text = pairs[0]
    return (
        f"{folder}: the run asked {_brief(theirs_text)}, and here the same problem would be asked as "
        f"{_brief(ours_text)} ({len(pairs)} of {len(logged)} logged prompts differ so); give "
        f"{' '.join(cures)}"
    )


def _distinct(folder: Path, variables: dict[str, Any]) -> Iterator[_Logged]:
    """The different prompts of the last tables, those in messages with text alone."""
    seen: set[str] = set()
    for file in sorted(folder.glob("completions_*.parquet"), reverse=True)[:4]:
        try:
            with pq.ParquetFile(file) as table:
                batch = next(table.iter_batches(_ROWS, columns=["prompt"]), None)
                prompts = [] if batch is None or not batch.num_columns else batch.column(0).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError(
                f"{file}: the run's log of prompts cannot be read ({str(error).splitlines()[0][:120]}); "
                f"copy it again, or move {folder} away"
            ) from error
        for prompt in prompts:
            if str(prompt) not in seen:
                seen.add(str(prompt))
                if (found := _logged(prompt, variables)) is not None:
                    yield found


def _logged(prompt: Any, variables: dict[str, Any]) -> _Logged | None:
    """A row of the log; None where it is neither text nor messages of text."""
    if isinstance(prompt, str):
        return _Logged(prompt, prompt, "")
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and m.get("role") for m in prompt):
        return None
    messages = [{key: value for key, value in m.items() if value is not None} for m in prompt]
    if not messages or not all(isinstance(m.get("content"), str) for m in messages):
        return None
    system = "\n".join(m["content"] for m in messages if m["role"] == "system")
    return _Logged(Chat(messages, variables), messages[-1]["content"], system)


def _flag(name: str, text: str) -> str:
    """A setting as a shell takes it; quoted as YAML where it has more than one line."""
    return shlex.quote(f"loss.{name}={json.dumps(text) if len(text.splitlines()) > 1 else text}")


def _brief(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]} ... {text[-80:]}")
