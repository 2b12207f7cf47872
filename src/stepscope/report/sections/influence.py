"""Which sequences and tokens did it, how sure their order is, and what re-made steps say of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stepscope.reading.answer import RANKED_BY, preference_roles
from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Response, Room, Section
from stepscope.report.sections.criteria import best_of
from stepscope.report.sections.responses import join_tokens, shown_responses, visible
from stepscope.report.tables import Cell, Table, number_cell, percent_cell, table
from stepscope.report.units import Unit, unit_in
from stepscope.results.influence import InfluenceSequences, InfluenceTokens, Reliabilities, Reliability
from stepscope.stats import Estimate

_TOP_TOKENS = 25
_SCORES_ON_HOVER = 3
_INFLUENTIAL = 8

_WAYS = {"fixed": "preconditioner and clipping fixed", "optimizer": "through the optimizer"}
"""The two ways in which influence is taken, in words."""

_SPLIT_BY = ("fixed", "optimizer")
"""That of sequences beside the other parts of the step, the first there is: it adds up with them."""


def section(measurement: Measurement, room: Room) -> Section | None:
    """Influence of sequences and tokens; None where neither was measured."""
    change, quantity, unit = measurement.change, measurement.quantity, unit_in(measurement)
    way = _way(measurement.influence_tokens, RANKED_BY)
    tokens = ranked_tokens(measurement)
    sentences = [_parts(measurement.summary, change.lr)] if change and change.lr > 0 else []
    figures = [_sequence_figure(measurement, quantity, unit)]
    tables: list[Table] = []
    responses: list[Response] = []
    if tokens is not None and "influence" in tokens:
        own = tokens[tokens.written]
        figures += [_share_figure(own, quantity, way), _scatter_figure(own, quantity, way, unit, room.points)]
        sentences.append(_concentration(own))
        tables = [_top_tokens(own, quantity, way, unit)]
        responses = _influential(measurement, tokens, room, unit)
    drawn = [f for f in figures if f is not None]
    if not drawn:
        return None
    return Section(
        "influence",
        "Which sequences and tokens did it",
        sentences=[s for s in sentences if s],
        intro=_certainty(measurement.reliability, quantity, way),
        facts=_ways(measurement.summary, unit),
        figures=[*_reliability_figures(measurement.reliability, quantity, way), *drawn],
        legend=bool(responses),
        responses=responses,
        tables=tables,
    )


def ranked_tokens(measurement: Measurement) -> Any:
    """The update batch's tokens with the influence that ranks them, in the page's unit.

    See :func:`join_tokens`.
    """
    scores = measurement.criteria_tokens.values if measurement.criteria_tokens else {}
    way = _way(measurement.influence_tokens, RANKED_BY)
    rows = _rows(measurement.influence_tokens, measurement.quantity, way)
    if rows is not None:
        columns = ["influence", "stderr", "shrunk"]
        rows = rows.assign(**{name: rows[name] * unit_in(measurement).factor for name in columns})
    best = {name: scores[name] for name in best_of(measurement, _SCORES_ON_HOVER) if name in scores}
    return join_tokens(measurement.update, measurement.update_tokens, rows, best)


def _rows(influences: InfluenceSequences | InfluenceTokens | None, quantity: str, through: str) -> Any:
    """The influences on a quantity, taken in one way; None where there are none."""
    if influences is None:
        return None
    found = influences.to_pandas()
    own = found[(found.quantity == quantity) & (found.through == through)]
    return None if own.empty else own


def _way(influences: InfluenceSequences | InfluenceTokens | None, order: Sequence[str]) -> str:
    """The first of these ways in which influence was taken."""
    taken = set() if influences is None else set(influences.through)
    return next((way for way in order if way in taken), order[0])


def _parts(summary: Mapping[str, Estimate], lr: float) -> str:
    """In words: what the batch's own sequences, momentum and weight decay contribute to the linear change."""
    names = {"sequences": "the batch's own sequences", "momentum": "momentum", "decay": "weight decay"}
    further = {
        "bonus": "the entropy bonus",
        "divergence": "the KL divergence",
        "router": "the router loss",
    }
    names |= {name: words for name, words in further.items() if f"influence_{name}" in summary}
    if not all(f"influence_{name}" in summary for name in names):
        return ""
    shown = [
        f"{text.bare(summary[f'influence_{name}'].scaled(lr))} from {words}" for name, words in names.items()
    ]
    return f"To first order and in the same unit, {text.joined(shown)}."


def _ways(summary: Mapping[str, Estimate], unit: Unit) -> list[tuple[str, str]]:
    """The influence of the whole batch either way, and what the fixed one neglects."""
    names = {
        "influence_sequences": f"the whole batch, {_WAYS['fixed']}",
        "influence_sequences_optimizer": f"the whole batch, {_WAYS['optimizer']}",
        "influence_sequences_own_prompts": f"the whole batch, {_WAYS['fixed']}, on fresh responses to its "
        "own prompts",
        "influence_neglected": "share of the tokens' influence that goes through what is fixed",
    }
    if "influence_nonlinear" in summary:
        names |= {
            "influence_sequences": "the batch's part of the step as a whole",
            "influence_sequences_optimizer": "sum over sequences, by the derivative of the step at the batch",
            "influence_nonlinear": "how far that derivative is from the batch's part, as a share of it",
        }
    found = [
        (f"{words}, {unit.label}", unit.influence(summary[key]))
        if summary[key].unit.endswith("/lr")
        else (words, summary[key])
        for key, words in names.items()
        if key in summary
    ]
    return [(words, text.bare(e) + (f" ({e.reason})" if e.reason else "")) for words, e in found]


def _concentration(tokens: Any) -> str:
    """In words: how few tokens hold half of the absolute influence, their net effect, and what they are."""
    values = _values(tokens)
    total, net = float(np.abs(values).sum()), float(values.sum())
    if total == 0 or net == 0:
        return ""
    order = np.argsort(-np.abs(values))
    half = int(np.searchsorted(np.cumsum(np.abs(values[order])), 0.5 * total)) + 1
    top = tokens.iloc[order[:half]]
    chosen, usual = (math.exp(np.median(part.logprob)) for part in (top, tokens))
    sentence = (
        f"Half of the absolute token influence sits in {text.percent(half / len(values))} of the batch's "
        f"{len(values):,} tokens; together they make "
        f"{text.percent(float(values[order[:half]].sum()) / net)} of the net effect of the batch. "
        f"Their median probability is {text.number(chosen, 2)} (all tokens: {text.number(usual, 2)})"
    )
    if "correct" in tokens:
        wrong, base = (float(1 - part.correct.mean()) for part in (top, tokens))
        sentence += (
            f", and {text.percent(wrong)} of them are in incorrect responses (all tokens: "
            f"{text.percent(base)})"
        )
    return sentence + "."


def _values(tokens: Any) -> Any:
    """(tok,) influences, 0 where the file has none for a token."""
    return np.nan_to_num(tokens.influence.to_numpy(np.float64))


def _sequence_figure(measurement: Measurement, quantity: str, unit: Unit) -> style.Figure | None:
    """Influence of every sequence in ascending order with its error, momentum and decay beside them."""
    way = _way(measurement.influence_sequences, _SPLIT_BY)
    rows = _rows(measurement.influence_sequences, quantity, way)
    if rows is None:
        return None
    rows = rows.assign(
        estimate=[
            unit.influence(Estimate(row.influence, row.stderr, 0, "", "", low=row.low, high=row.high))
            for row in rows.itertuples()
        ]
    )
    rows = rows.assign(influence=rows.influence * unit.factor)
    sequences = rows[rows.component == "sequence"].sort_values("influence", kind="stable")
    sequences = sequences.assign(rank=range(len(sequences)), verdict=None)
    if measurement.update is not None and not preference_roles(measurement.update):
        sequences = sequences.assign(verdict=measurement.update.correct[sequences.sequence_id.astype(int)])
    traces = []
    for name, own, verdict in (
        ("correct response", style.Look(style.GREEN), sequences.verdict.eq(True)),
        ("incorrect response", style.Look(style.PURPLE, "diamond"), sequences.verdict.eq(False)),
        ("response", style.Look(style.INK), sequences.verdict.isna()),
    ):
        chosen = sequences[verdict]
        if not chosen.empty:
            details = [
                f"sequence {row.sequence_id:.0f}<br>{text.estimate(row.estimate)}"
                for row in chosen.itertuples()
            ]
            traces.append(
                style.curve(
                    name,
                    chosen["rank"].tolist(),
                    chosen.estimate,
                    own,
                    f"{name}, %{{customdata}}",
                    mode="markers",
                    size=5,
                    details=details,
                )
            )
    others = rows[rows.component != "sequence"]
    beside = "; ".join(f"{row.component} {text.estimate(row.estimate)}" for row in others.itertuples())
    caption = (
        f"First-order influence of each of the {len(sequences)} sequences of the update batch on the "
        f"{quantity} (per token, on-policy) through this step, {_WAYS[way]}. Error bars: 95 % "
        "interval, clustered over probe prompts. Sum over sequences "
        f"{text.number(float(sequences.influence.sum()))}"
        + (f"; for comparison {beside}." if beside else ".")
    )
    return style.figure(
        "influence-sequences",
        "Influence of every sequence",
        caption,
        traces,
        height=360,
        xaxis=style.axis("sequence, in order of influence", zeroline=False),
        yaxis=style.axis(f"influence, {unit.label}", zeroline=True),
    )


def _share_figure(tokens: Any, quantity: str, way: str) -> style.Figure | None:
    """Cumulative share of absolute and net influence against the share of tokens taken, largest first."""
    values = _values(tokens)
    total, net = float(np.abs(values).sum()), float(values.sum())
    if total == 0 or net == 0:
        return None
    ordered = values[np.argsort(-np.abs(values))]
    picks = np.unique(np.geomspace(1, len(values), 200).round().astype(int)) - 1
    traces = [
        style.curve(
            f"{kind} influence",
            (picks + 1) / len(values),
            shares[picks],
            own,
            f"%{{x:.2%}} of tokens carry %{{y:.1%}} of the {kind} influence",
            mode="lines",
            width=2,
        )
        for kind, shares, own in (
            ("absolute", np.cumsum(np.abs(ordered)) / total, style.Look(style.GREEN)),
            ("net", np.cumsum(ordered) / net, style.Look(style.PURPLE, dash="dash")),
        )
    ]
    caption = (
        f"How concentrated the influence on the {quantity}, {_WAYS[way]}, is over {len(values):,} tokens. "
        "Solid: share of the summed |influence|. Dashed: share of the batch's net influence; it can pass "
        f"100 % because tokens of opposite sign cancel (the net is {text.percent(abs(net) / total)} of the "
        "summed |influence|). Point estimates: noise in single tokens makes it look more even than it is."
    )
    x = style.axis("share of tokens, largest |influence| first", type="log", tickformat="~%", dtick=1)
    return style.figure(
        "influence-share",
        "Concentration over tokens",
        caption,
        traces,
        wide=False,
        xaxis=x,
        yaxis=style.axis("cumulative share", tickformat=".0%", zeroline=True),
    )


def _scatter_figure(tokens: Any, quantity: str, way: str, unit: Unit, most: int) -> style.Figure:
    """Influence of single tokens against probability: the ``most``/2 largest, and one in so many others."""
    values = _values(tokens)
    order = np.argsort(-np.abs(values))
    rest = order[most // 2 :]
    stride = max(1, math.ceil(len(rest) / (most // 2)))
    chosen = tokens.assign(value=values).iloc[np.concatenate([order[: most // 2], rest[::stride]])]
    groups = [("tokens", style.Look(style.GREEN, "circle-open"), chosen)]
    if "correct" in chosen:
        groups = [
            ("in correct responses", style.Look(style.GREEN, "circle-open"), chosen[chosen.correct]),
            ("in incorrect responses", style.Look(style.PURPLE, "diamond-open"), chosen[~chosen.correct]),
        ]
    traces = [
        style.curve(
            name,
            np.exp(rows.logprob),
            rows.value,
            own,
            "%{customdata}<br>probability %{x:.3g}, influence %{y:.3g}",
            mode="markers",
            size=5,
            digits=3,
            marker={"line": {"width": 1}},
            details=[
                f"{text.plotly_text(visible(row.token))} (sequence {row.sequence_id})"
                for row in rows.itertuples()
            ],
        )
        for name, own, rows in groups
        if not rows.empty
    ]
    sampled = f"the {most // 2} largest and one in {stride} of the rest" if stride > 1 else "all"
    caption = (
        f"First-order influence of single tokens on the {quantity}, {_WAYS[way]}, against the probability "
        f"the policy gave them; {sampled} of {len(values):,} tokens. Point estimates without error."
    )
    return style.figure(
        "influence-tokens",
        "Influence and probability of tokens",
        caption,
        traces,
        wide=False,
        xaxis=style.axis("probability of the token"),
        yaxis=style.axis(f"influence, {unit.label}", zeroline=True),
    )


def _top_tokens(tokens: Any, quantity: str, way: str, unit: Unit) -> Table:
    """The tokens with the largest absolute influence: shrunken where that is known, since it ranks better."""
    values = _values(tokens)
    total = float(np.abs(values).sum())
    shrunk = bool(tokens.shrunk.notna().any())
    ranked = np.nan_to_num(tokens.shrunk) if shrunk else values
    top = tokens.assign(value=values, ranked=ranked).iloc[np.argsort(-np.abs(ranked))[:_TOP_TOKENS]]
    caption = (
        f"The {len(top)} tokens with the largest absolute influence on the {quantity}, {_WAYS[way]}, of "
        f"{len(values):,}"
        + (", in the order of the shrunken influence" if shrunk else "")
        + ". ± is one standard error, from folds of the probe prompts, for the given update batch; the "
        "largest of many are overestimated."
    )
    return table(
        "top-tokens",
        "Most influential tokens",
        caption,
        [
            {
                "Token": visible(row.token),
                "Sequence": row.sequence_id,
                "Position": row.position,
                "Response": _verdict(getattr(row, "correct", None)),
                "Log-prob": row.logprob,
                "Entropy": row.entropy,
                **({"Token weight": row.token_weight} if "token_weight" in tokens else {}),
                f"Influence, {unit.label}": Cell(
                    text.plus_minus(row.value, row.stderr), row.value, row.stderr
                ),
                **({"Shrunken": number_cell(row.ranked)} if shrunk else {}),
                "Share of |influence|": percent_cell(abs(row.value) / total if total else None),
            }
            for row in top.itertuples()
        ],
    )


def _verdict(correct: bool | None) -> str:
    return "" if correct is None else "correct" if correct else "incorrect"


def _influential(measurement: Measurement, tokens: Any, room: Room, unit: Unit) -> list[Response]:
    """The responses with the largest summed |influence|, tokens coloured on one common scale."""
    if measurement.update is None:
        return []
    sizes = pd.Series(np.abs(_values(tokens)))
    scale = float(sizes.quantile(0.995)) or float(sizes.max()) or 1.0
    weight = sizes.groupby(tokens.sequence_id.to_numpy(), sort=False).sum()
    top = weight.sort_values(ascending=False, kind="stable").index[:_INFLUENTIAL]
    return shown_responses(measurement.update, tokens, top, scale, room.tokens(_INFLUENTIAL), unit.times)


# ---- how sure the order is ----

_SURE = ((0.9, "is well determined"), (0.7, "is roughly determined"), (0.0, "is mostly noise in its detail"))
"""Verdicts by the smallest correlation between two probes."""


def _rankings(found: Reliabilities | None, quantity: str, way: str) -> list[Reliability]:
    """What is known of the order of tokens and of sequences by the influence that ranks."""
    rankings = found.rankings if found else ()
    return [own for own in rankings if (own.quantity, own.through) == (quantity, way)]


def _certainty(known: Reliabilities | None, quantity: str, way: str) -> str:
    """In words: how far the order of tokens and sequences would be found again, and what makes it sure."""
    found = _rankings(known, quantity, way)
    if known is None or not found:
        return ""
    first = found[0]
    if not first.whole.reliable:
        return f"How sure the order of tokens is cannot be said: {first.whole.reason}."
    verdict = next((words for least, words in _SURE if first.whole.value >= least), _SURE[-1][1])
    agreement = text.joined([f"{text.bare(own.whole)} for {own.level}s" for own in found])
    shares = [
        f"{text.percent(estimate.value)} of the {text.percent(float(share))} with the largest influence"
        for share, estimate in first.top.items()
    ]
    needed = [f"{text.bare(o.needed)} probe prompts for {o.level}s" for o in found if o.needed.reliable]
    gains = [
        own.gain
        for own in known.shrunk
        if (own.quantity, own.through) == (quantity, way) and own.gain.reliable
    ]
    return " ".join(
        [
            f"The order below {verdict}: that from another {first.num_prompts:,} probe prompts would "
            f"correlate with it at about {agreement}.",
            f"Of the {first.level}s, two halves of this probe agree on {text.joined(shares)}.",
            f"A correlation of {first.target:g} takes about {text.joined(needed)}."
            if needed
            else f"This probe is too small to say how many prompts a correlation of {first.target:g} takes.",
            *(
                "The table of tokens is in the order of their shrunken influence, which takes "
                f"{text.bare(gain)} times fewer."
                for gain in gains[:1]
            ),
        ]
    )


def _reliability_figures(known: Reliabilities | None, quantity: str, way: str) -> list[style.Figure]:
    """Correlation between two probes against their number of prompts."""
    found = [own for own in _rankings(known, quantity, way) if own.whole.reliable]
    if not found:
        return []
    traces = [
        style.curve(
            f"{own.level}s",
            [point.prompts for point in own.curve],
            [
                Estimate(p.correlation, p.stderr, own.halves.n, own.halves.unit, own.halves.method)
                for p in own.curve
            ],
            style.look(number),
            f"{own.level}s, %{{x:,}} prompts: %{{y:.3f}}",
            size=6,
            width=2,
        )
        for number, own in enumerate(found)
    ]
    caption = (
        "Rank correlation of the influences that two independent probes of a size would give, by Spearman "
        f"and Brown from halves of this probe of {found[0].num_prompts:,} prompts in {found[0].halves.n} "
        "folds; error bars: 95 %, jackknife over folds, for the given update batch. Beyond this probe's own "
        "size it is an extrapolation, and a hopeful one where a few responses carry the noise."
    )
    return [
        style.figure(
            "influence-reliability",
            "How sure the order is",
            caption,
            traces,
            wide=False,
            xaxis=style.axis("probe prompts", type="log", dtick=1),
            yaxis=style.axis("rank correlation between probes", range=[0, 1.02]),
        )
    ]


# ---- influence against re-made steps ----

_SETS = (
    (
        "subset",
        "random subset of the batch",
        style.Look(style.GREEN),
        "lds",
        "Spearman correlation over subsets (LDS)",
    ),
    (
        "single",
        "one sequence left out",
        style.Look(style.PURPLE, "diamond"),
        "leave_one_out",
        "Pearson correlation, leave one out",
    ),
)
_REMOVALS = {
    "zeroed": "the gradient of what is left out is zero, all else as it was",
    "recomputed": "the advantages of each group are those of the responses that stay",
}


def validation(measurement: Measurement, room: Room) -> Section | None:
    """The scatter plots behind the linear datamodelling score, and the scores."""
    facts, figures = [], []
    for key, found in (measurement.validation or {}).items():
        label = f"{found.removal}, {_WAYS[found.through]}"
        for kind, name, own, score, words in _SETS:
            for how, known in (("same probe", score), ("across probes", f"{score}_across")):
                facts.append((f"{words}, {how}, {label}", text.bare(getattr(found, known))))
            predicted, true = (getattr(found, f"{kind}_{part}") for part in ("predicted", "true"))
            if len(predicted):
                caption = (
                    f"Change of the {found.quantity} at lr {text.number(found.lr)}: the step is made again "
                    f"({_REMOVALS[found.removal]}) and measured on the same probe samples; predicted is lr "
                    f"times the sum of influences. The grey line is equality. {len(true)} points."
                )
                figures.append(
                    style.figure(
                        f"validation-{kind}-{key}",
                        f"{name.capitalize()}, {label}",
                        caption,
                        _against(predicted, true, name, own),
                        wide=False,
                        xaxis=style.axis("predicted change", zeroline=False, nticks=5),
                        yaxis=style.axis("true change", zeroline=False),
                        showlegend=False,
                    )
                )
    title = "Influence against re-made steps"
    return Section("validation", title, facts=facts, figures=figures) if figures else None


def _against(predicted: Sequence[float], true: Sequence[float], name: str, own: style.Look) -> list[Any]:
    ends = [min(predicted), max(predicted)]
    hover = "predicted %{x:.4g}<br>true %{y:.4g}"
    return [
        style.silent(ends, ends, style.MUTED, width=1),
        style.curve(name, predicted, true, own, hover, mode="markers", size=6),
    ]
