"""The table of a training's tokens with their entries, and its sums by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.reading.recording import RecordedBatch, RecordFolder
from stepscope.results.ledger import LedgerFolds, LedgerTokenFolds, LedgerTokens, fold_sums
from stepscope.results.records import FloatArray, IntArray
from stepscope.results.rollups import LedgerRollups
from stepscope.results.two_way import class_sums
from stepscope.rules.token_classes import UNKNOWN, WAYS, Labels, kinds, ordered, token_names
from stepscope.stats import Estimate, clustered_mean

if TYPE_CHECKING:
    import pandas as pd

Way = str | Callable[["pd.DataFrame"], Labels]
"""A name of :data:`stepscope.rules.token_classes.WAYS`, or a function of the table of tokens."""

_PLACE = ("step", "sequence_id", "position")
_FIGURES = ("influence", "own_step", "later", "stderr")


def recorded_tokens(record: RecordFolder, first: int, last: int) -> pd.DataFrame:
    """A row per token that the policy wrote in the batches of some steps, in the order of the ledger.

    Columns: ``step``, ``sequence_id``, ``position``; ``token_id``, ``token``, ``kind``; ``logprob``,
    ``probability``, ``entropy``, ``token_weight``; ``prompt`` (the question, or its text), ``prompt_number``,
    ``pass_rate`` (of the prompt in its batch; nan where nothing was graded), ``reward``, ``advantage``,
    ``correct``, ``truncated``, ``num_tokens``; ``context``, equal where prompt, prefix and token are.

    Args:
        record: of the training.
        first: number of the first step.
        last: of the last.
    """
    import pandas as pd

    contexts: dict[Any, int] = {}
    prompts: dict[str, int] = {}
    return pd.concat(
        [_batch(step, record.batch(step), prompts, contexts) for step in range(first, last + 1)],
        ignore_index=True,
    )


def _batch(
    step: int, batch: RecordedBatch, prompts: dict[str, int], contexts: dict[Any, int]
) -> pd.DataFrame:
    import pandas as pd

    found = batch.rollouts
    sequence, position = found.places
    numbers = np.array([prompts.setdefault(key, len(prompts)) for key in found.prompt_keys])
    graded = np.isfinite(found.rewards)
    rate = np.full(len(found), np.nan)
    for group in np.unique(found.prompt_index):
        own = (found.prompt_index == group) & graded
        if own.any():
            rate[found.prompt_index == group] = found.correct[own].mean()
    texts, names, merged = [], [], []
    for i, row in enumerate(batch.texts):
        ended = not found.truncated[i]
        names.append(np.array(kinds(row, ended), dtype=object))
        texts.append(np.array(token_names(row, ended), dtype=object))
        node: Any = (-1, int(numbers[i]))
        nodes = []
        for token in found.response_token_ids[i]:
            node = contexts.setdefault((node, int(token)), len(contexts))
            nodes.append(node)
        merged.append(np.array(nodes, dtype=np.int64))
    each: dict[str, Any] = {
        "prompt": np.array(found.prompt_keys, dtype=object),
        "prompt_number": numbers,
        "pass_rate": rate,
        "reward": found.rewards,
        "correct": found.correct,
        "truncated": found.truncated,
        "num_tokens": found.num_policy_tokens,
    }
    advantage = np.full(len(sequence), np.nan)
    if found.token_advantages is not None:
        advantage = found.flat(found.token_advantages)
    elif found.advantages is not None:
        advantage = found.advantages[sequence]
    logprob = found.flat(found.logprobs)
    return pd.DataFrame(
        {
            "step": np.full(len(sequence), step, dtype=np.int64),
            "sequence_id": sequence,
            "position": position,
            "token_id": found.flat([np.asarray(ids, dtype=np.int64) for ids in found.response_token_ids]),
            "token": found.flat(texts),
            "kind": found.flat(names),
            "logprob": logprob,
            "probability": np.exp(logprob),
            "entropy": found.flat(found.entropies),
            "token_weight": found.flat(batch.token_weights),
            "advantage": advantage,
            **{name: values[sequence] for name, values in each.items()},
            "context": found.flat(merged),
        }
    )


@dataclass(frozen=True)
class Entries:
    """The tokens of a training with their entries for one quantity.

    Attributes:
        quantity: its name.
        table: the columns of :func:`recorded_tokens`, and ``influence``, ``own_step``, ``later``, ``stderr``.
        folds: (fold, tok) what each fold of the probe says of each token.
        shares: (fold,) of the probe sequences.
    """

    quantity: str
    table: pd.DataFrame
    folds: FloatArray
    shares: FloatArray

    @classmethod
    def of(
        cls,
        recorded: pd.DataFrame,
        tokens: LedgerTokens,
        token_folds: LedgerTokenFolds,
        folds: LedgerFolds,
        quantity: str,
    ) -> Entries:
        """Join a ledger to its record.

        Raises:
            MeasurementError: the ledger is of other batches than the record.
        """
        own = tokens.where((tokens.quantity == quantity) & (tokens.through == "fixed"))
        by_fold = token_folds.where(token_folds.quantity == quantity)
        for entries in (own, by_fold):
            if len(recorded) != len(entries) or any(
                (recorded[name].to_numpy() != getattr(entries, name)).any() for name in _PLACE
            ):
                raise MeasurementError(
                    f"the ledger has {len(entries)} tokens with an entry for {quantity}, and the record of "
                    f"these steps {len(recorded)}, or they are others; make the ledger again from this record"
                )
        first = folds.where(
            (folds.quantity == quantity) & (folds.through == "fixed") & (folds.step == folds.step[0])
        )
        table = recorded.assign(**{name: getattr(own, name) for name in _FIGURES})
        return cls(quantity, table, np.stack(list(by_fold.folds.values())), first.share)

    def by(self, way: Way) -> LedgerRollups:
        """Sums by class; see :func:`roll_up`."""
        return roll_up(self.table, self.folds, self.shares, way, self.quantity)

    def top(self, count: int) -> pd.DataFrame:
        """The tokens with the largest |influence|, the same prompt, prefix and token counted as one.

        Columns: ``context``, ``prompt``, ``token``, ``kind``, ``influence`` (the sum), ``stderr`` (over probe
        prompts), ``times`` (how often it was drawn), ``first_step``, ``last_step``, and ``row``: of the
        table, the one with the largest part.
        """
        table = self.table
        by = table.assign(row=np.arange(len(table)), size=table.influence.abs())
        by = by.sort_values("size", ascending=False, kind="stable")
        found = by.groupby("context", sort=False).agg(
            prompt=("prompt", "first"),
            token=("token", "first"),
            kind=("kind", "first"),
            influence=("influence", "sum"),
            times=("influence", "size"),
            first_step=("step", "min"),
            last_step=("step", "max"),
            row=("row", "first"),
        )
        chosen = found.influence.abs().sort_values(ascending=False, kind="stable").index[:count]
        top = found.loc[chosen].reset_index()
        place = np.full(int(table.context.max()) + 1, -1)
        place[top.context] = np.arange(len(top))
        own = place[table.context]
        classes = own[own >= 0]
        parts = np.stack(
            [np.bincount(classes, weights=row[own >= 0], minlength=len(top)) for row in self.folds]
        )
        errors = [fold_sums(self.shares, part).estimate("", "").stderr for part in parts.T]
        top.insert(5, "stderr", errors if len(self.shares) > 1 else np.nan)
        return top

    def labels(self, way: str) -> list[str]:
        """The class of every token."""
        return [str(label) for label in _labels(self.table, way)[1]]

    def order(self, way: str) -> list[str]:
        """The classes that occur, in their order."""
        name, labels = _labels(self.table, way)
        return [str(label) for label in ordered(name, labels)]

    def class_steps(self, way: str) -> pd.DataFrame:
        """(step, class) sums of the entries, steps down and classes across."""
        sums = self.table.assign(label=self.labels(way)).pivot_table(
            index="step", columns="label", values="influence", aggfunc="sum", fill_value=0.0
        )
        return sums[self.order(way)]

    def rewards(self) -> dict[int, Estimate]:
        """Mean reward of the batch of every step, clustered by prompt; nan where a response has none."""
        each = self.table.drop_duplicates(["step", "sequence_id"])
        return {
            int(step): clustered_mean(own.reward, own.prompt_number, unit="", method="rewards of the batch")
            for step, own in each.groupby("step")
        }


def roll_up(
    table: pd.DataFrame, folds: FloatArray, shares: FloatArray, way: Way, quantity: str
) -> LedgerRollups:
    """Sums of the entries by class.

    Args:
        table: of :class:`Entries`.
        folds: (fold, tok) entries by fold.
        shares: (fold,) of the probe sequences.
        way: how tokens are divided.
        quantity: name of the quantity.

    Raises:
        MeasurementError: no such way, or the function gives another number of labels.
    """
    name, labels = _labels(table, way)
    order = ordered(name, labels)
    code = {label: k for k, label in enumerate(order)}
    classes: IntArray = np.array([code[label] for label in labels], dtype=np.int64)
    count = len(order)
    sums, parts = class_sums(folds, shares, classes, table.prompt_number.to_numpy(), count)
    unit_of = [(sums.over_probe(k), sums.over_both(k)) for k in range(count)]
    part_of = [(parts.over_probe(k), parts.over_both(k)) for k in range(count)]
    reasons = [_reason(*pair) for pair in unit_of]

    def column(pairs: Sequence[tuple[Any, Any]], which: int, end: str) -> FloatArray:
        return np.array([getattr(pair[which], end) for pair in pairs], dtype=np.float64)

    return LedgerRollups(
        quantity=np.full(count, quantity, dtype=object),
        by=np.full(count, name, dtype=object),
        label=np.array([str(label) for label in order], dtype=object),
        place=np.arange(count, dtype=np.int64),
        tokens=np.bincount(classes, minlength=count),
        influence=_summed(classes, table.influence, count),
        stderr=column(unit_of, 0, "stderr"),
        low=column(unit_of, 0, "low"),
        high=column(unit_of, 0, "high"),
        stderr_over_prompts=column(unit_of, 1, "stderr"),
        low_over_prompts=column(unit_of, 1, "low"),
        high_over_prompts=column(unit_of, 1, "high"),
        own_step=_summed(classes, table.own_step, count),
        share=parts.values,
        share_stderr=column(part_of, 0, "stderr"),
        share_low=column(part_of, 0, "low"),
        share_high=column(part_of, 0, "high"),
        share_low_over_prompts=column(part_of, 1, "low"),
        share_high_over_prompts=column(part_of, 1, "high"),
        reliable=np.array([not reason for reason in reasons], dtype=np.bool_),
        reason=np.array(reasons, dtype=object),
    )


def _reason(probe: Any, both: Any) -> str:
    if not np.isfinite(probe.stderr):
        return "a single fold of the probe tells no error; make the ledger with num_folds of 8 or more"
    return str(probe.reason or both.reason)


def _labels(table: pd.DataFrame, way: Way) -> tuple[str, list[Any]]:
    if isinstance(way, str):
        if way not in WAYS:
            raise MeasurementError(
                f"no way {way!r} to divide tokens, expected one of {', '.join(WAYS)}, or a function of the "
                "table of tokens"
            )
        return way, list(WAYS[way](table))
    labels = [UNKNOWN if label is None or label != label else label for label in way(table)]
    if len(labels) != len(table):
        raise MeasurementError(
            f"the function gave {len(labels)} labels for {len(table)} tokens; it must give one for each row"
        )
    return getattr(way, "__name__", "function"), labels


def _summed(classes: IntArray, values: Any, count: int) -> FloatArray:
    return np.bincount(classes, weights=values, minlength=count).astype(np.float64)
