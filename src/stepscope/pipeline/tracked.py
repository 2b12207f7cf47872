"""What trackers see of an evaluation and of a ledger; made of files that are finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepscope.reading.ledger import LedgerFolder, load_ledger
from stepscope.results import FloatArray, read_table
from stepscope.results.evaluation import NAN, EvaluationRow
from stepscope.results.ledger import Account
from stepscope.runs import RunFolder, verified
from stepscope.stats import Estimate
from stepscope.trackers import Entry, Responses, ShownResponse, open_trackers, strongest

SENT = "trackers.yaml"
"""In the folder of the parts: what has gone to trackers that take nothing back."""

EACH = 3
"""Correct responses shown of an evaluation, and wrong ones."""

PARTS_OF_A_STEP = ("change", "tokens", "own_step", "bonus", "momentum_before", "decay", "level")
FIGURES_OF_ALL = ("before", "after", "predicted", "realised", "closing_error")
PARTS_OF_ALL = ("tokens", "bonus", "momentum_before", "decay")


def track_evaluation(
    names: Sequence[str] | None, out: Path, parts: RunFolder, rows: Sequence[EvaluationRow]
) -> None:
    """Log the evaluation of every checkpoint, under its step.

    Args:
        names: of trackers; see :func:`stepscope.trackers.open_trackers`.
        out: the table.
        parts: folder of the parts, with the responses.
        rows: of the checkpoints as they are, without other ways of sampling.
    """
    trackers = open_trackers(names, what=out.stem, beside=out.parent, sent=parts.file(SENT))
    if trackers.active:
        for row in rows:
            trackers.log(evaluation_entry(row, parts.file(f"{row.checkpoint}_responses.parquet")))
    trackers.close()


def evaluation_entry(row: EvaluationRow, responses: Path) -> Entry:
    """What there is to see of one checkpoint.

    Args:
        row: its evaluation.
        responses: file with what was sampled.
    """
    figures = row.estimates
    table = read_table(verified(responses))
    histograms = {
        "pass_rate": np.array([p.num_correct / p.num_samples for p in row.prompts]),
        "response_length": np.asarray(table["num_tokens"].to_numpy(), dtype=np.float64),
    }
    shown = None
    if "token" in table.column_names:
        histograms["token_entropy"] = _flat(table, "token_entropy")
        histograms["token_surprisal"] = -_flat(table, "token_logprob")
        shown = Responses("entropy before the token, nats", False, _first_of_each(table))
    scalars = {name: estimate.value for name, estimate in figures.items()}
    return Entry("eval", row.step, scalars, figures, histograms, shown)


def _flat(table: Any, column: str) -> FloatArray:
    return np.asarray(table[column].combine_chunks().flatten().to_numpy(), dtype=np.float64)


def _first_of_each(table: Any) -> list[ShownResponse]:
    """The first correct and wrong responses, one per prompt, not chosen otherwise."""
    chosen: list[int] = []
    for verdict in (True, False):
        first: dict[str, int] = {}
        for i, (prompt, correct) in enumerate(
            zip(table["prompt_id"].to_pylist(), table["correct"].to_pylist(), strict=True)
        ):
            if correct == verdict:
                first.setdefault(prompt, i)
        chosen += list(first.values())[:EACH]
    return [
        ShownResponse(
            prompt=row["prompt"],
            tokens=row["token"],
            values=np.array(row["token_entropy"], dtype=np.float64),
            facts={"answer": "correct" if row["correct"] else "wrong", "reward": float(row["reward"])},
        )
        for row in table.take(chosen).to_pylist()
    ]


def track_ledger(names: Sequence[str] | None, out: Path, parts: RunFolder) -> None:
    """Log a finished account, step by step.

    Args:
        names: of trackers; see :func:`stepscope.trackers.open_trackers`.
        out: folder of the ledger.
        parts: folder of its parts.
    """
    trackers = open_trackers(names, what="ledger", beside=out, sent=parts.file(SENT))
    if trackers.active:
        for entry in ledger_entries(load_ledger(out)):
            trackers.log(entry)
    trackers.close()


def ledger_entries(found: LedgerFolder) -> Iterator[Entry]:
    """What there is to see of an account at every step; at the last one also what it comes to."""
    ledger = found.ledger
    steps = found.steps.to_pandas().set_index(["step", "quantity"])
    tables = {account.quantity: found.table(account.quantity) for account in ledger.accounts}
    for step in range(ledger.first_step, ledger.last_step + 1):
        last = step == ledger.last_step
        scalars: dict[str, float] = {}
        histograms: dict[str, FloatArray] = {}
        for account in ledger.accounts:
            name, table = account.quantity, tables[account.quantity]
            row = steps.loc[(step, name)]
            scalars |= {f"{name}/{part}": float(row[part]) for part in PARTS_OF_A_STEP}
            histograms[f"{name}/influence"] = table.influence[table.step == step].to_numpy(np.float64)
        figures = _figures(ledger.accounts) if last else {}
        responses = _strongest(found, ledger.accounts[0], tables[ledger.quantity]) if last else None
        yield Entry("ledger", step, scalars, figures, histograms, responses)


def _figures(accounts: Sequence[Account]) -> dict[str, Estimate]:
    return {
        f"{account.quantity}/{name}": getattr(account, name)
        for account in accounts
        for name in (*FIGURES_OF_ALL, *PARTS_OF_ALL)
    }


def _strongest(found: LedgerFolder, account: Account, table: Any) -> Responses:
    """The responses of the whole training that moved the headline quantity most."""
    totals = table.groupby(["step", "sequence_id"], sort=False).influence.sum()
    shown = []
    for place in strongest(totals.to_numpy(np.float64)):
        step, sequence = (int(i) for i in totals.index[place])
        own = table[(table.step == step) & (table.sequence_id == sequence)]
        batch = found.record.batch(step)
        values = np.full(len(batch.texts[sequence]), NAN)
        values[own.position.to_numpy()] = own.influence.to_numpy()
        facts = {
            "step": float(step),
            "influence": float(totals.iloc[place]),
            "reward": float(batch.rollouts.rewards[sequence]),
        }
        shown.append(ShownResponse(batch.rollouts.prompts[sequence], batch.texts[sequence], values, facts))
    what = f"influence on the {account.quantity} over the rest of the path, {account.unit}"
    return Responses(what, True, shown)
