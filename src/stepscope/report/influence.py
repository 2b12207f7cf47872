"""Which sequences and tokens did it: figures, tables and coloured responses from the influence artifacts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import BLUE, INK, VERMILLION, Figure, error_bars, make_spec, rounded
from stepscope.report.load import RANKED_BY, Measurement, Table, estimates_of
from stepscope.report.tables import Cell, Column, TableBlock, count_cell, number_cell, text_cell
from stepscope.stats import Estimate

_TOP_TOKENS = 25

WAYS = {"fixed": "preconditioner and clipping fixed", "optimizer": "through the optimizer"}
"""The two ways in which influence is taken, in words."""

RANKING = WAYS[RANKED_BY]

END_MARK, PART_MARK = "⟨end⟩", "⟨part⟩"
"""Shown for tokens without a text of their own: the end of a response, bytes of a character still to come."""


@dataclass(frozen=True)
class TokenTable:
    """A batch's tokens joined with what is known of them; arrays over tokens, in order of the file."""

    sequence_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    token: Sequence[str]
    logprob: npt.NDArray[np.float64]
    entropy: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64] | None
    influence: npt.NDArray[np.float64] | None
    stderr: npt.NDArray[np.float64] | None
    shrunk: npt.NDArray[np.float64] | None
    correct: npt.NDArray[np.bool_] | None
    scores: Mapping[str, npt.NDArray[np.float64]]


def join_tokens(
    sequences: Table | None,
    tokens: Table | None,
    influence: Table | None,
    quantity: str,
    criteria: Table | None = None,
    names: Sequence[str] = (),
) -> TokenTable | None:
    """Tokens with their influence on ``quantity``, their scores under some criteria, and verdicts.

    Influence and scores are nan where their file lacks the token.
    """
    if tokens is None:
        return None
    ids = np.array(tokens["sequence_id"], dtype=np.int64)
    correct = None
    if sequences is not None and "correct" in sequences:
        verdicts = dict(zip(sequences["sequence_id"], sequences["correct"], strict=True))
        correct = np.array([bool(verdicts.get(i, False)) for i in ids.tolist()])
    chosen = None
    if influence is not None and quantity in influence["quantity"]:
        own = [q == quantity for q in influence["quantity"]]
        chosen = {name: list(compress(column, own)) for name, column in influence.items()}
    own_values = _at(tokens, chosen, ("influence", "stderr", "shrunk"))
    return TokenTable(
        sequence_id=ids,
        position=np.array(tokens["position"], dtype=np.int64),
        token=_named(tokens),
        logprob=np.array(tokens["logprob"], dtype=np.float64),
        entropy=np.array(tokens["entropy"], dtype=np.float64),
        weight=np.array(tokens["token_weight"], dtype=np.float64) if "token_weight" in tokens else None,
        influence=own_values.get("influence"),
        stderr=own_values.get("stderr"),
        shrunk=own_values.get("shrunk"),
        correct=correct,
        scores=_at(tokens, criteria, names),
    )


def _named(tokens: Table) -> list[str]:
    """Texts of tokens; in place of an empty one what the token is: the end, or part of a later character."""
    last: dict[int, int] = {}
    for sequence, position in zip(tokens["sequence_id"], tokens["position"], strict=True):
        last[sequence] = max(position, last.get(sequence, 0))
    return [
        str(token) or (END_MARK if position == last[sequence] else PART_MARK)
        for token, sequence, position in zip(
            tokens["token"], tokens["sequence_id"], tokens["position"], strict=True
        )
    ]


def _at(tokens: Table, table: Table | None, names: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    """Columns of another table of tokens, in the order of ``tokens``; nan where it lacks a token."""
    if table is None:
        return {}
    row_of = {pair: row for row, pair in enumerate(zip(table["sequence_id"], table["position"], strict=True))}
    rows = [row_of.get(pair) for pair in zip(tokens["sequence_id"], tokens["position"], strict=True)]
    return {
        name: np.array([math.nan if r is None else float(table[name][r]) for r in rows])
        for name in names
        if name in table
    }


def parts(summary: Mapping[str, Estimate], lr: float) -> str:
    """In words: what the batch's own sequences, momentum and weight decay contribute to the linear change."""
    names = [("sequences", "the batch's own sequences"), ("momentum", "momentum"), ("decay", "weight decay")]
    further = (("bonus", "the entropy bonus"), ("router", "the router loss"))
    names += [(name, words) for name, words in further if f"influence_{name}" in summary]
    found = [(words, summary.get(f"influence_{key}")) for key, words in names]
    shown = [
        f"{text.plus_minus(lr * value.value, lr * value.stderr)} from {words}"
        for words, value in found
        if value is not None
    ]
    if len(shown) < len(found):
        return ""
    return f"To first order and in the same unit, {', '.join(shown[:-1])} and {shown[-1]}."


def ways(summary: Mapping[str, Estimate]) -> list[tuple[str, str]]:
    """The influence of the whole batch either way, and what the fixed one neglects."""
    found = []
    for key, words in (
        ("influence_sequences", f"the whole batch, {WAYS['fixed']}"),
        ("influence_sequences_optimizer", f"the whole batch, {WAYS['optimizer']}"),
        (
            "influence_sequences_own_prompts",
            f"the whole batch, {WAYS['fixed']}, on fresh responses to its own prompts",
        ),
        ("influence_neglected", "share of the tokens' influence that goes through what is fixed"),
    ):
        if key in summary:
            figure = summary[key]
            shown = text.plus_minus(figure.value, figure.stderr)
            found.append((words, f"{shown} ({figure.reason})" if figure.reason else shown))
    return found


def concentration(tokens: TokenTable) -> str:
    """In words: how few tokens hold half of the absolute influence, their net effect, and what they are."""
    if tokens.influence is None:
        return ""
    values = np.nan_to_num(tokens.influence)
    total, net = float(np.abs(values).sum()), float(values.sum())
    if total == 0 or net == 0:
        return ""
    order = np.argsort(-np.abs(values))
    half = int(np.searchsorted(np.cumsum(np.abs(values[order])), 0.5 * total)) + 1
    top = order[:half]
    sentence = (
        f"Half of the absolute token influence sits in {text.percent(half / len(values))} of the batch's "
        f"{len(values):,} tokens; together they make {text.percent(float(values[top].sum()) / net)} of the "
        "net effect of the batch. "
    )
    chosen, usual = np.exp(np.median(tokens.logprob[top])), np.exp(np.median(tokens.logprob))
    sentence += (
        f"Their median probability is {text.number(float(chosen), 2)} (all tokens: "
        f"{text.number(float(usual), 2)})"
    )
    if tokens.correct is not None:
        wrong, base = float(1 - tokens.correct[top].mean()), float(1 - tokens.correct.mean())
        sentence += (
            f", and {text.percent(wrong)} of them are in incorrect responses (all tokens: "
            f"{text.percent(base)})"
        )
    return sentence + "."


def sequence_figure(measurement: Measurement, quantity: str, unit: str) -> Figure | None:
    """Influence of every sequence in ascending order with its error, momentum and decay beside them."""
    table = measurement.influence_sequences
    if table is None or quantity not in table["quantity"]:
        return None
    rows = [
        (c, s, estimate)
        for c, s, q, estimate in zip(
            *(table[k] for k in ("component", "sequence_id", "quantity")),
            estimates_of(table, "influence", beside=""),
            strict=True,
        )
        if q == quantity
    ]
    others = [row for row in rows if row[0] != "sequence"]
    sequences = sorted((row for row in rows if row[0] == "sequence"), key=lambda row: row[2].value)
    verdicts: dict[int, bool] = {}
    if measurement.update is not None and "correct" in measurement.update:
        verdicts = dict(zip(measurement.update["sequence_id"], measurement.update["correct"], strict=True))
    traces: list[Any] = []
    groups = (
        ("correct response", True, BLUE, "circle"),
        ("incorrect response", False, VERMILLION, "diamond"),
        ("response", None, INK, "circle"),
    )
    for name, verdict, color, symbol in groups:
        chosen = [(rank, row) for rank, row in enumerate(sequences) if verdicts.get(row[1]) is verdict]
        if chosen:
            traces.append(
                go.Scatter(
                    x=[rank for rank, _ in chosen],
                    y=rounded(row[2].value for _, row in chosen),
                    error_y=error_bars((row[2] for _, row in chosen), color),
                    mode="markers",
                    name=name,
                    marker={"size": 5, "color": color, "symbol": symbol},
                    customdata=[f"sequence {row[1]}<br>{text.estimate(row[2])}" for _, row in chosen],
                    hovertemplate=f"{name}, %{{customdata}}<extra></extra>",
                )
            )
    spec = make_spec(
        traces,
        xaxis={"title": {"text": "sequence, in order of influence"}, "zeroline": False},
        yaxis={"title": {"text": f"influence, {unit} per unit lr"}, "zeroline": True},
    )
    beside = "; ".join(f"{c} {text.estimate(e)}" for c, _, e in others)
    net = sum(row[2].value for row in sequences)
    caption = (
        f"First-order influence of each of the {len(sequences)} sequences of the update batch on the "
        f"{quantity} (per token, on-policy), per unit of learning rate, {WAYS['fixed']}. Error bars: 95 % "
        "interval, clustered over probe prompts. "
        f"Sum over sequences {text.number(net)}" + (f"; for comparison {beside}." if beside else ".")
    )
    return Figure("influence-sequences", "Influence of every sequence", caption, spec, height=360)


def share_figure(tokens: TokenTable, quantity: str) -> Figure | None:
    """Cumulative share of absolute and net influence against the share of tokens taken, largest first."""
    if tokens.influence is None:
        return None
    values = np.nan_to_num(tokens.influence)
    total, net = float(np.abs(values).sum()), float(values.sum())
    if total == 0 or net == 0:
        return None
    ordered = values[np.argsort(-np.abs(values))]
    picks = np.unique(np.geomspace(1, len(values), 200).round().astype(int)) - 1
    x = (picks + 1) / len(values)
    traces = [
        go.Scatter(
            x=rounded(x),
            y=rounded((np.cumsum(np.abs(ordered)) / total)[picks]),
            name="absolute influence",
            mode="lines",
            line={"color": BLUE, "width": 2},
            hovertemplate="%{x:.2%} of tokens carry %{y:.1%} of the absolute influence<extra></extra>",
        ),
        go.Scatter(
            x=rounded(x),
            y=rounded((np.cumsum(ordered) / net)[picks]),
            name="net influence",
            mode="lines",
            line={"color": VERMILLION, "width": 2, "dash": "dash"},
            hovertemplate="%{x:.2%} of tokens carry %{y:.1%} of the net influence<extra></extra>",
        ),
    ]
    spec = make_spec(
        traces,
        xaxis={
            "type": "log",
            "title": {"text": "share of tokens, largest |influence| first"},
            "tickformat": "~%",
            "dtick": 1,
        },
        yaxis={"title": {"text": "cumulative share"}, "tickformat": ".0%", "zeroline": True},
    )
    caption = (
        f"How concentrated the influence on the {quantity}, {RANKING}, is over {len(values):,} tokens. "
        "Solid: share of the summed |influence|. Dashed: share of the batch's net influence; it can pass "
        f"100 % because tokens of opposite sign cancel (the net is {text.percent(abs(net) / total)} of the "
        "summed |influence|). Point estimates: noise in single tokens makes it look more even than it is."
    )
    return Figure("influence-share", "Concentration over tokens", caption, spec, height=360, wide=False)


def scatter_figure(tokens: TokenTable, quantity: str, unit: str, most: int) -> Figure | None:
    """Influence of single tokens against probability: the ``most``/2 largest, and one in so many others."""
    if tokens.influence is None:
        return None
    values = np.nan_to_num(tokens.influence)
    order = np.argsort(-np.abs(values))
    rest = order[most // 2 :]
    stride = max(1, math.ceil(len(rest) / (most // 2)))
    chosen = np.concatenate([order[: most // 2], rest[::stride]])
    correct = tokens.correct if tokens.correct is not None else np.ones(len(values), dtype=bool)
    traces = []
    for name, verdict, color, symbol in (
        ("in correct responses", True, BLUE, "circle-open"),
        ("in incorrect responses", False, VERMILLION, "diamond-open"),
    ):
        idx = chosen[correct[chosen] == verdict]
        if len(idx):
            traces.append(
                go.Scatter(
                    x=rounded(np.exp(tokens.logprob[idx]), 3),
                    y=rounded(values[idx], 3),
                    mode="markers",
                    name=name if tokens.correct is not None else "tokens",
                    marker={"size": 5, "color": color, "symbol": symbol, "line": {"width": 1}},
                    customdata=[
                        f"{text.plotly_text(visible(tokens.token[i]))} (sequence {tokens.sequence_id[i]})"
                        for i in idx
                    ],
                    hovertemplate="%{customdata}<br>probability %{x:.3g}, influence %{y:.3g}<extra></extra>",
                )
            )
    spec = make_spec(
        traces,
        xaxis={"title": {"text": "probability of the token"}},
        yaxis={"title": {"text": f"influence, {unit} per unit lr"}, "zeroline": True},
    )
    sampled = f"the {most // 2} largest and one in {stride} of the rest" if stride > 1 else "all"
    caption = (
        f"First-order influence of single tokens on the {quantity}, {RANKING}, against the probability the "
        f"policy gave them; {sampled} of {len(values):,} tokens. Point estimates without error."
    )
    return Figure(
        "influence-tokens", "Influence and probability of tokens", caption, spec, height=360, wide=False
    )


def top_tokens_table(tokens: TokenTable, quantity: str) -> TableBlock | None:
    """The tokens with the largest absolute influence: shrunken where that is known, since it ranks better."""
    if tokens.influence is None:
        return None
    values = np.nan_to_num(tokens.influence)
    total = float(np.abs(values).sum())
    shrunk = tokens.shrunk is not None and bool(np.isfinite(tokens.shrunk).any())
    ranked = np.nan_to_num(tokens.shrunk) if shrunk and tokens.shrunk is not None else values
    errors = np.full(len(values), np.nan) if tokens.stderr is None else tokens.stderr
    columns = [
        Column("Token"),
        Column("Sequence", numeric=True),
        Column("Position", numeric=True),
        Column("Response"),
        Column("Log-prob", "def-logprob", numeric=True),
        Column("Entropy", "def-entropy", numeric=True),
        *([Column("Token weight", "def-token-weight", numeric=True)] if tokens.weight is not None else []),
        Column("Influence per unit lr", "def-influence", numeric=True, with_error=True),
        *([Column("Shrunken", "def-shrunk", numeric=True)] if shrunk else []),
        Column("Share of |influence|", numeric=True),
    ]
    rows = []
    for i in np.argsort(-np.abs(ranked))[:_TOP_TOKENS]:
        verdict = "" if tokens.correct is None else ("correct" if tokens.correct[i] else "incorrect")
        rows.append(
            [
                text_cell(visible(tokens.token[i])),
                count_cell(int(tokens.sequence_id[i])),
                count_cell(int(tokens.position[i])),
                text_cell(verdict),
                number_cell(float(tokens.logprob[i])),
                number_cell(float(tokens.entropy[i])),
                *([number_cell(float(tokens.weight[i]))] if tokens.weight is not None else []),
                _with_error(float(values[i]), float(errors[i])),
                *([number_cell(float(ranked[i]))] if shrunk else []),
                Cell(shown=text.percent(abs(values[i]) / total), raw=float(abs(values[i]) / total)),
            ]
        )
    caption = (
        f"The {len(rows)} tokens with the largest absolute influence on the {quantity}, {RANKING}, of "
        f"{len(values):,}"
        + (", in the order of the shrunken influence" if shrunk else "")
        + ". ± is one standard error, from folds of the probe prompts, for the given update batch; the "
        "largest of many are overestimated."
    )
    return TableBlock("top-tokens", "Most influential tokens", caption, columns, rows)


def _with_error(value: float, stderr: float) -> Cell:
    return Cell(text.plus_minus(value, stderr), value, stderr if math.isfinite(stderr) else None)


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
