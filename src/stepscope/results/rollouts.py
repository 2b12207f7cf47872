"""A batch of sampled responses, to disk and back."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stepscope.errors import BatchError, RunFolderError
from stepscope.results.brief import Brief
from stepscope.results.records import VERSION, BoolArray, FloatArray, IntArray
from stepscope.results.rollout_checks import refuse_broken, refuse_values
from stepscope.results.rollout_tokens import RolloutTokens
from stepscope.results.tables import Column, checked, read_table, write_table
from stepscope.results.views import Parts, Readable

if TYPE_CHECKING:
    import pandas as pd

_S = TypeVar("_S", bound=np.generic)


def same_text(text: str) -> str:
    """What two texts have in common that ask the same: NFC, one kind of line end, no white space around.

    Nothing else is evened out: case, inner white space and compatibility forms (``x²``) can be what is asked.
    """
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()


@dataclass(frozen=True, repr=False)
class Rollouts(Readable, Brief):
    """A batch of sampled responses, one entry per sequence on every field.

    Attributes:
        prompt_ids: global id of the prompt, for example ``arithmetic/train/12``; equal ids form a group
            whose responses share a baseline.
        prompts: the prompt as given to the tokenizer; empty where it is not known.
        responses: the decoded response.
        prompt_token_ids: token ids of the prompt, no padding.
        response_token_ids: token ids of the response, no padding; the end-of-sequence token counts.
        rewards: (seq,) total reward; nan where nobody graded the response.
        correct: (seq,) whether the answer was verified correct.
        truncated: (seq,) whether the response was cut at ``max_response_tokens`` without an end-of-sequence
            token.
        logprobs: per sequence (tok,) log-prob of each response token at ``temperature``, in nats.
        entropies: per sequence (tok,) entropy of the policy before each response token, in nats.
        temperature: sampling temperature; the policy is the softmax of logits / temperature.
        max_response_tokens: L, the longest response allowed.
        advantages: (seq,) or None where the batch makes no step.
        questions: what was asked, as the task has it, or None where that is not known. Equal questions are
            one prompt, whatever their ids; without questions equal ``prompts`` are, without these equal ids.
        response_masks: per sequence (tok,) True on tokens that the policy wrote, False on those of a tool or
            an environment between its turns, which are context alone: log-prob and entropy are 0 there, and
            nothing that is summed or averaged over tokens counts them. None where the policy wrote all.
        token_advantages: per sequence (tok,) advantages that differ within a response, used by the loss in
            place of ``advantages``; None where they do not.
        old_logprobs: per sequence (tok,) log-probs of the policy that the loss divides by, where it is not
            the one of ``logprobs`` (a second update on a batch); None where it is.
        sampler_logprobs: per sequence (tok,) log-probs of what the sampler drew from, which some losses
            correct for; nan where it gave none, None where not known or where it was the policy itself.
        decoding_logprobs: per sequence (tok,) the same as this policy has them, at the sampler's temperature
            and truncation; None where those are the policy's, or not known.
        kept_masses: per sequence (tok,) S_k, the probability under the policy of all tokens that truncation
            keeps at the position; None where there is none, or it is not known.

    Values per token come in two layouts: *rows*, one (tok,) array per sequence over the whole response, and
    *flat*, one array over all tokens of the batch that the policy wrote; :meth:`flat` and :meth:`rows` lead
    from one to the other.
    """

    format_version: ClassVar[int] = 2

    prompt_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    prompt_token_ids: tuple[tuple[int, ...], ...]
    response_token_ids: tuple[tuple[int, ...], ...]
    rewards: FloatArray
    correct: BoolArray
    truncated: BoolArray
    logprobs: tuple[FloatArray, ...]
    entropies: tuple[FloatArray, ...]
    temperature: float
    max_response_tokens: int
    advantages: FloatArray | None = None
    questions: tuple[str, ...] | None = None
    response_masks: tuple[BoolArray, ...] | None = None
    token_advantages: tuple[FloatArray, ...] | None = None
    old_logprobs: tuple[FloatArray, ...] | None = None
    sampler_logprobs: tuple[FloatArray, ...] | None = None
    decoding_logprobs: tuple[FloatArray, ...] | None = None
    kept_masses: tuple[FloatArray, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse fields of different length, numbers that are not finite, and a policy that wrote nothing.

        Raises:
            BatchError: naming the field and the sequence.
        """
        refuse_broken(self)

    def refuse_ungraded(self) -> None:
        """Refuse a batch with a reward that is not known.

        Raises:
            BatchError: naming the sequence.
        """
        refuse_values(self, np.isnan(self.rewards), "rewards")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.prompt_ids)

    @cached_property
    def num_tokens(self) -> IntArray:
        """(seq,) response lengths in tokens, those of tools and environments among them."""
        return np.array([len(ids) for ids in self.response_token_ids], dtype=np.int64)

    @cached_property
    def num_policy_tokens(self) -> IntArray:
        """(seq,) response tokens that the policy wrote."""
        return np.array([int(mask.sum()) for mask in self.written], dtype=np.int64)

    @cached_property
    def written(self) -> tuple[BoolArray, ...]:
        """Per sequence (tok,) True on response tokens that the policy wrote."""
        if self.response_masks is not None:
            return self.response_masks
        return tuple(np.ones(n, dtype=np.bool_) for n in self.num_tokens)

    @cached_property
    def places(self) -> tuple[IntArray, IntArray]:
        """Flat: the sequence of each token that the policy wrote, and its position in the response."""
        counts = self.num_policy_tokens
        owners = np.repeat(np.arange(len(self), dtype=np.int64), counts)
        return owners, np.concatenate([np.flatnonzero(mask) for mask in self.written]).astype(np.int64)

    def flat(self, rows: Sequence[npt.NDArray[_S]]) -> npt.NDArray[_S]:
        """Values of every response token, one (tok,) array per sequence, at those that the policy wrote."""
        return np.concatenate([row[mask] for row, mask in zip(rows, self.written, strict=True)])

    def rows(self, flat: npt.NDArray[_S]) -> tuple[npt.NDArray[_S], ...]:
        """What :meth:`flat` came from, 0 at tokens that the policy did not write."""
        found = np.zeros(int(self.num_tokens.sum()), dtype=flat.dtype)
        found[np.concatenate(self.written)] = flat
        return tuple(np.split(found, np.cumsum(self.num_tokens)[:-1]))

    @cached_property
    def prompt_keys(self) -> tuple[str, ...]:
        """What each sequence's prompt is: its question, else its text, else its id; see :func:`same_text`."""
        texts = self.prompts if self.questions is None else self.questions
        return tuple(same_text(text) or own for text, own in zip(texts, self.prompt_ids, strict=True))

    @cached_property
    def asked(self) -> frozenset[str]:
        """All that the batch's prompts go by: ids, prompts and questions, so that others can avoid them."""
        return frozenset({*self.prompt_ids, *map(same_text, self.prompts), *self.prompt_keys} - {""})

    @cached_property
    def prompt_index(self) -> IntArray:
        """(seq,) cluster of each sequence: the number of its prompt, in order of first appearance.

        Responses to copies of a prompt are no more independent than responses to one.
        """
        return _numbered(self.prompt_keys)

    @cached_property
    def group_index(self) -> IntArray:
        """(seq,) number of each sequence's group; copies of a prompt that were asked twice are two groups."""
        return _numbered(self.prompt_ids)

    @property
    def num_prompts(self) -> int:
        """Number of distinct prompts."""
        return len(set(self.prompt_keys))

    @property
    def behaviour(self) -> tuple[FloatArray, ...]:
        """Per sequence (tok,) the log-probs that the loss divides by."""
        return self.logprobs if self.old_logprobs is None else self.old_logprobs

    @cached_property
    def entropy_per_seq(self) -> FloatArray:
        """(seq,) sum of the position entropies of each response, in nats."""
        return np.array([float(h.sum()) for h in self.entropies])

    def select(self, indices: Sequence[int] | IntArray) -> Rollouts:
        """The sub-batch at ``indices``, in that order."""
        idx = [int(i) for i in indices]

        def pick(values: Any) -> Any:
            if isinstance(values, np.ndarray):
                return values[idx]
            return tuple(values[i] for i in idx) if isinstance(values, tuple) else values

        return replace(self, **{field.name: pick(getattr(self, field.name)) for field in fields(self)})

    def to_parquet(
        self,
        sequences_path: Path,
        tokens_path: Path,
        *,
        tokens: Sequence[Sequence[str]],
        token_weights: Sequence[FloatArray] | None = None,
        entropy_weights: Sequence[FloatArray] | None = None,
    ) -> None:
        """Write the batch as two tables: a row per sequence and a row per response token.

        ``sequence_id`` is the position in the batch. Floats are stored as they are, so that
        :meth:`from_parquet` gives back the same bits. Each file appears whole or not at all.

        Args:
            sequences_path: table of sequences (``update.parquet``).
            tokens_path: table of tokens (``update_tokens.parquet``).
            tokens: decoded text of every response token, per sequence.
            token_weights: per sequence (tok,) -dLoss/dl, where the batch has made a step.
            entropy_weights: per sequence (tok,) -dLoss/dH, where the loss sees entropies.

        Raises:
            BatchError: ``tokens`` do not match the response lengths.
        """
        flat = self.token_rows(tokens, token_weights=token_weights, entropy_weights=entropy_weights)
        settings = {
            VERSION: str(self.format_version),
            "stepscope.temperature": repr(float(self.temperature)),
            "stepscope.max_response_tokens": str(self.max_response_tokens),
        }
        flat.write(tokens_path)
        write_table(self._sequences().replace_schema_metadata(settings), sequences_path)

    def token_rows(
        self,
        tokens: Sequence[Sequence[str]],
        *,
        token_weights: Sequence[FloatArray] | None = None,
        entropy_weights: Sequence[FloatArray] | None = None,
    ) -> RolloutTokens:
        """A row per response token; arguments as for :meth:`to_parquet`.

        Raises:
            BatchError: ``tokens`` do not match the response lengths.
        """
        if [len(r) for r in tokens] != self.num_tokens.tolist():
            raise BatchError("rollouts: tokens do not match the response lengths")
        count = len(self)
        return RolloutTokens(
            sequence_id=np.repeat(np.arange(count, dtype=np.int64), self.num_tokens),
            position=np.concatenate([np.arange(n, dtype=np.int64) for n in self.num_tokens]),
            token_id=np.array([t for row in self.response_token_ids for t in row], dtype=np.int64),
            token=np.array([t for row in tokens for t in row], dtype=np.object_),
            logprob=np.concatenate(self.logprobs).astype(np.float64, copy=False),
            entropy=np.concatenate(self.entropies).astype(np.float64, copy=False),
            response_mask=_joined(self.response_masks),
            advantage=_joined(self.token_advantages),
            old_logprob=_joined(self.old_logprobs),
            sampler_logprob=_joined(self.sampler_logprobs),
            decoding_logprob=_joined(self.decoding_logprobs),
            kept_mass=_joined(self.kept_masses),
            token_weight=_joined(token_weights),
            entropy_weight=_joined(entropy_weights),
        )

    def to_pandas(self) -> pd.DataFrame:
        """A row per sequence as a data frame of pandas; columns as in the file."""
        return self._sequences().to_pandas()

    def _viewed(self) -> Parts:
        facts = f"{len(self)} responses to {self.num_prompts} prompts"
        return Parts(facts, {"update": self})

    def _sequences(self) -> pa.Table:
        count = len(self)
        columns: dict[str, Any] = {
            "sequence_id": pa.array(range(count), pa.int64()),
            "prompt_id": list(self.prompt_ids),
            "question": pa.array(self.questions or [None] * count, pa.string()),
            "prompt": list(self.prompts),
            "response": list(self.responses),
            "prompt_token_ids": pa.array([list(r) for r in self.prompt_token_ids], pa.list_(pa.int64())),
            "response_token_ids": pa.array([list(r) for r in self.response_token_ids], pa.list_(pa.int64())),
            "reward": pa.array(self.rewards, pa.float64()),
            "advantage": pa.nulls(count, pa.float64())
            if self.advantages is None
            else pa.array(self.advantages, pa.float64()),
            "correct": pa.array(self.correct, pa.bool_()),
            "num_tokens": pa.array(self.num_tokens, pa.int64()),
            "logprob": pa.array([float(v.sum()) for v in self.logprobs], pa.float64()),
            "entropy_mean": pa.array(self.entropy_per_seq / self.num_policy_tokens, pa.float64()),
            "truncated": pa.array(self.truncated, pa.bool_()),
        }
        return pa.table(columns)

    @classmethod
    def from_parquet(cls, sequences_path: Path, tokens_path: Path, *, graded: bool = True) -> Rollouts:
        """Read back what :meth:`to_parquet` wrote, bit for bit.

        Args:
            sequences_path: table of sequences.
            tokens_path: table of tokens.
            graded: refuse a batch with a reward that is not known.

        Raises:
            RunFolderError: a file is missing, damaged, lacks a column, or holds one of another type or with
                nulls.
            BatchError: a number in it is not finite.
        """
        sequences, flat = read_table(sequences_path), read_table(tokens_path)
        settings = sequences.schema.metadata or {}
        sequences = checked(sequences, _SEQUENCE_COLUMNS, sequences_path, _CURE)
        flat = checked(flat, _TOKEN_COLUMNS, tokens_path, _CURE)
        version = settings.get(VERSION.encode(), b"none").decode(errors="replace")
        if version != str(cls.format_version):
            raise RunFolderError(
                f"{sequences_path}: {VERSION} {version}, and this stepscope reads version "
                f"{cls.format_version}; {_CURE}"
            )
        if b"stepscope.temperature" not in settings:
            raise RunFolderError(
                f"{sequences_path}: no sampling temperature in its metadata, so it was not written by "
                "stepscope; sample the batch again with `stepscope measure --stages rollouts`"
            )
        rows = sequences.to_pydict()
        lengths = np.array(rows["num_tokens"], dtype=np.int64)
        if not lengths.size:
            raise RunFolderError(f"{sequences_path}: no sequences; sample the batch again")
        if int(lengths.sum()) != flat.num_rows:
            raise RunFolderError(
                f"{tokens_path}: {flat.num_rows} tokens, but {sequences_path.name} counts "
                f"{int(lengths.sum())}; the two files belong to different batches"
            )
        owners = np.repeat(np.arange(len(lengths)), lengths)
        if not np.array_equal(flat.column("sequence_id").to_numpy(), owners):
            raise RunFolderError(
                f"{tokens_path}: its rows are not in the order of the sequences of {sequences_path.name}; "
                "sort them by sequence_id and position, or sample the batch again"
            )
        cuts = np.cumsum(lengths)[:-1]
        advantages, questions = rows["advantage"], rows.get("question", [None])
        if None in advantages and any(a is not None for a in advantages):
            raise RunFolderError(
                f"{sequences_path}: advantage of sequence {advantages.index(None)} is null and others are "
                "not; give all or none"
            )
        found = cls(
            prompt_ids=tuple(rows["prompt_id"]),
            prompts=tuple(rows["prompt"]),
            responses=tuple(rows["response"]),
            prompt_token_ids=tuple(tuple(r) for r in rows["prompt_token_ids"]),
            response_token_ids=tuple(tuple(r) for r in rows["response_token_ids"]),
            rewards=np.array(rows["reward"], dtype=np.float64),
            correct=np.array(rows["correct"], dtype=np.bool_),
            truncated=np.array(rows["truncated"], dtype=np.bool_),
            logprobs=tuple(np.split(_floats(flat, "logprob"), cuts)),
            entropies=tuple(np.split(_floats(flat, "entropy"), cuts)),
            temperature=float(settings[b"stepscope.temperature"]),
            max_response_tokens=int(settings[b"stepscope.max_response_tokens"]),
            advantages=None if advantages[0] is None else np.array(advantages, dtype=np.float64),
            questions=None if None in questions else tuple(questions),
            response_masks=_split(flat, "response_mask", cuts),
            token_advantages=_split(flat, "advantage", cuts),
            old_logprobs=_split(flat, "old_logprob", cuts),
            sampler_logprobs=_split(flat, "sampler_logprob", cuts),
            decoding_logprobs=_split(flat, "decoding_logprob", cuts),
            kept_masses=_split(flat, "kept_mass", cuts),
        )
        if graded:
            found.refuse_ungraded()
        return found


def _numbered(names: Sequence[str]) -> IntArray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


_SEQUENCE_COLUMNS = {
    "prompt_id": Column(pa.string()),
    "question": Column(pa.string(), nullable=True, optional=True),
    "prompt": Column(pa.string()),
    "response": Column(pa.string()),
    "prompt_token_ids": Column(pa.list_(pa.int64())),
    "response_token_ids": Column(pa.list_(pa.int64())),
    "reward": Column(pa.float64()),
    "advantage": Column(pa.float64(), nullable=True),
    "correct": Column(pa.bool_()),
    "truncated": Column(pa.bool_()),
    "num_tokens": Column(pa.int64()),
}
_TOKEN_COLUMNS = {
    "sequence_id": Column(pa.int64()),
    "logprob": Column(pa.float64()),
    "entropy": Column(pa.float64()),
    "response_mask": Column(pa.bool_(), optional=True),
    "advantage": Column(pa.float64(), optional=True),
    "old_logprob": Column(pa.float64(), optional=True),
    "sampler_logprob": Column(pa.float64(), optional=True),
    "decoding_logprob": Column(pa.float64(), optional=True),
    "kept_mass": Column(pa.float64(), optional=True),
}
_CURE = "sample the batch again with `stepscope measure --stages rollouts`"


def _joined(rows: Sequence[npt.NDArray[Any]] | None) -> npt.NDArray[Any] | None:
    return None if rows is None else np.concatenate(rows)


def _split(table: pa.Table, column: str, cuts: IntArray) -> tuple[npt.NDArray[Any], ...] | None:
    if column not in table.column_names:
        return None
    return tuple(np.split(np.array(table.column(column).to_numpy()), cuts))


def _floats(table: pa.Table, column: str) -> FloatArray:
    return np.array(table.column(column).to_numpy(), dtype=np.float64)
