"""Pairs of a chosen and a rejected response: made from rollouts, read from a file, kept beside a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stepscope.errors import ConfigError, TaskError
from stepscope.results import Rollouts
from stepscope.results.tables import read_table, write_table
from stepscope.tasks.formats.prompts import encode_prompt
from stepscope.tasks.problem import Chat
from stepscope.tasks.sources.rows import Number, Row, kind_of, read_rows, row_has, shown

FIELDS = ("prompt", "chosen", "rejected")
"""Of a user's file. ``prompt`` may be messages, for the tokenizer's chat template."""

IDS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
"""Of the file that a run keeps, beside ``question``."""


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, of which one is preferred.

    Attributes:
        question: what is asked: the task's question, or the prompt of a file.
        prompt: token ids.
        chosen: token ids of the preferred response, its end among them.
        rejected: token ids of the other.
    """

    question: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def pairs_from_rollouts(rollouts: Rollouts, *, per_prompt: int, seed: int) -> list[Pair]:
    """Right against wrong responses of the same prompt, each in one pair at most, drawn at random.

    A prompt gives as many as it has right and wrong responses, none where all are alike; a pair that comes
    twice is taken once.

    Args:
        rollouts: graded; ``correct`` says which is which.
        per_prompt: most pairs of a prompt.
        seed: of the draw.
    """
    random = np.random.default_rng([seed, 5])
    found: dict[Pair, None] = {}
    asked = rollouts.prompts if rollouts.questions is None else rollouts.questions
    for number in range(int(rollouts.prompt_index.max()) + 1):
        rows = np.flatnonzero(rollouts.prompt_index == number)
        right = random.permutation(rows[rollouts.correct[rows]])
        wrong = random.permutation(rows[~rollouts.correct[rows]])
        for chosen, rejected in list(zip(right, wrong, strict=False))[:per_prompt]:
            ids = rollouts.response_token_ids
            pair = Pair(asked[chosen], rollouts.prompt_token_ids[chosen], ids[chosen], ids[rejected])
            found[pair] = None
    return list(found)


def read_pairs(
    path: Path,
    tokenizer: Any,
    *,
    longest: int,
    longest_prompt: int | None = None,
    vocabulary: int | None = None,
    variables: dict[str, Any] | None = None,
) -> list[Pair]:
    """Pairs of a user's file of texts, or of the file that another run has kept (``pairs.parquet``).

    A response is its text's tokens and the end token; a prompt in messages goes through the chat template.

    Args:
        path: ``.jsonl`` or ``.parquet``.
        tokenizer: of the policy.
        longest: tokens that a response may have.
        longest_prompt: tokens that a prompt may have; None for any number.
        vocabulary: token ids that the model knows; None where all do.
        variables: further variables of the chat template.

    Raises:
        TaskError: the file cannot be read, or a row is no pair.
        ConfigError: a response or a prompt is too long.
    """
    found = []
    for row in _rows(path):
        if all(row.fields.get(name) is not None for name in IDS):
            prompt, chosen, rejected = (_ids(row, name) for name in IDS)
            question = row.optional_text("question") or tokenizer.decode(list(prompt))
        else:
            row_has(row, FIELDS)
            question, prompt = _prompt(row, tokenizer, variables or {})
            chosen, rejected = (_response(row, name, tokenizer) for name in FIELDS[1:])
        if chosen == rejected:
            raise row.refuse("chosen and rejected are the same response; leave the row out")
        if (length := max(len(chosen), len(rejected))) > longest:
            raise ConfigError(
                f"hypo.max_response_tokens: {row.where}: a response has {length} tokens, its end among "
                f"them, and {longest} are allowed; raise it, or leave the row out"
            )
        if longest_prompt is not None and len(prompt) > longest_prompt:
            raise ConfigError(
                f"hypo.max_prompt_tokens: {row.where}: the prompt has {len(prompt)} tokens, and "
                f"{longest_prompt} are allowed; raise it, or leave the row out"
            )
        if vocabulary is not None and (odd := max(*prompt, *chosen, *rejected)) >= vocabulary:
            raise row.refuse(
                f"token {odd}, and the model knows 0 to {vocabulary - 1}; give pairs of this model's "
                "tokenizer, or texts"
            )
        found.append(Pair(question, prompt, chosen, rejected))
    return found


def keep_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """Write the pairs of a run, for its continuation and for other runs."""
    columns = {"question": [p.question for p in pairs]}
    ids = {name: [list(getattr(p, name.removesuffix("_token_ids"))) for p in pairs] for name in IDS}
    whole = {name: pa.array(rows, pa.list_(pa.int64())) for name, rows in ids.items()}
    write_table(pa.table({**columns, **whole}), path)


def kept_pairs(path: Path) -> list[Pair]:
    """What :func:`keep_pairs` wrote.

    Raises:
        RunFolderError: the file is damaged.
    """
    return [
        Pair(row["question"], *(tuple(row[name]) for name in IDS)) for row in read_table(path).to_pylist()
    ]


def _rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        yield from (row for _, row in read_rows(path, ()))
        return
    if path.suffix != ".parquet":
        raise TaskError(f"hypo.pairs: {path}: expected a .jsonl or .parquet file; give one of these")
    if kind_of(path) != "file":
        raise TaskError(f"cannot read {path}: no such file")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise TaskError(
            f"cannot read {path} as parquet ({str(error).splitlines()[0]}); copy it again"
        ) from error
    yield from (Row(f"{path} row {i + 1}", fields) for i, fields in enumerate(table.to_pylist()))


def _prompt(row: Row, tokenizer: Any, variables: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """What is asked and the ids of the prompt; a text is given to the tokenizer as it is."""
    value = row.fields["prompt"]
    if not isinstance(value, list):
        text = row.text("prompt")
        return text, encode_prompt(text, tokenizer).token_ids
    said = [m for m in value if isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role")]
    if not said or len(said) < len(value) or said[-1]["role"] != "user":
        raise row.refuse("prompt must be a text, or messages with role and content that end with the user's")
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in said]
    return messages[-1]["content"], encode_prompt(Chat(messages, variables), tokenizer).token_ids


def _response(row: Row, name: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids of a response, the end token put to them where the text has none."""
    value = row.fields[name]
    if isinstance(value, list):  # TRL's form, one message of the assistant
        plain = len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant"
        if not plain:
            raise row.refuse(f"{name} must be a text or one message of the assistant, got {shown(value)}")
        text = Row(row.where, {name: value[0].get("content")}).text(name)
    else:
        text = row.text(name)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if ids[-1] == tokenizer.eos_token_id else (*ids, int(tokenizer.eos_token_id))


def _ids(row: Row, name: str) -> tuple[int, ...]:
    value = row.fields[name]
    if not isinstance(value, list) or not value:
        raise row.refuse(f"{name} is {shown(value)}, expected token ids, one at least")
    for token in value:
        whole = token.isdecimal() if isinstance(token, Number) else type(token) is int and token >= 0
        if not whole:
            raise row.refuse(f"{name} has {shown(token)} in it, expected token ids")
    return tuple(map(int, value))
