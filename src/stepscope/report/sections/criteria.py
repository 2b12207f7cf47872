"""Which cheap criteria find the tokens that matter, what dropping them buys, and what they are like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Board, Table, board_column, table
from stepscope.report.units import Unit
from stepscope.results import Rollouts
from stepscope.results.criteria import CriterionDefinition, LeaderboardRow, Pareto, Regression
from stepscope.stats import Estimate

PRIMARY = {
    "level": "token",
    "target": "signed",
    "truth": "column",
    "preconditioner": "adamw",
    "version": "on_policy",
}
"""What the page shows first: what a token does to the entropy, through the whole kernel and the optimizer."""

_SHOWN = 24

CAPTION = (
    "Correlation of each criterion with the measured effect of each token (or sequence) on the entropy. "
    "Magnitude criteria (masks, weights, norms) are compared with the size of the effect. Captured: share of "
    "the total absolute effect on the tokens it puts first."
)
"""What the columns of a leaderboard are."""

OVER = "over update prompts and, where the truth was measured on a probe, over probe prompts"
"""What the errors of a standing are over."""

_CHOICES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "level": ("of", {"token": "tokens", "sequence": "sequences"}),
    "target": ("predicting", {"signed": "effects with their sign", "magnitude": "sizes of effects"}),
    "truth": (
        "truth",
        {
            "column on_policy": "what a token does to the entropy, on-policy (column sums)",
            "column fixed_prefix": "what a token does to the entropy, fixed-prefix (column sums)",
            "row fixed_prefix": "what happens at its position (row sums)",
            "diagonal fixed_prefix": "what it does at its own position (diagonal)",
        },
    ),
    "preconditioner": ("step", {"adamw": "the optimizer", "sgd": "plain gradient"}),
    "kind": (
        "criteria",
        {
            "literature": "of the literature",
            "model": "models of the kernel",
            "control": "trivial controls",
        },
    ),
}


def section(measurement: Measurement, room: Room) -> Section | None:
    """Every criterion against every truth; the best ones as a figure and in words."""
    found = measurement.criteria
    if found is None or not found.rows:
        return None
    board = make_board(
        [Entry(row, row.best_control or "") for row in found.rows],
        found.shares,
        found.definitions,
        f"{CAPTION} ± is one standard error, {OVER}. Gain: Spearman less "
        "|Spearman| of the best trivial control, on the same tokens and probes.",
    )
    ranked = _ranked(found.rows)
    figures = [_standings_figure(ranked[:_SHOWN])] if ranked else []
    studies = [_properties_table(study) for study in found.properties]
    return Section(
        "criteria",
        "Which cheap criteria find these tokens",
        intro=f"{_sentence(ranked, found.shares)} {_basis_sentence(ranked, measurement.update)}".strip(),
        figures=figures,
        board=board,
        more_title="What kind of token carries influence" if studies else "",
        more_tables=studies,
    )


def best_of(measurement: Measurement, count: int) -> list[str]:
    """Names of the signed criteria of the literature that follow the measured influence best."""
    ranked = _ranked(measurement.criteria.rows) if measurement.criteria else []
    return [row.criterion for row in ranked if row.kind == "literature"][:count]


def agrees(row: Any, values: Mapping[str, Any]) -> bool:
    """Whether a record has the given values."""
    return all(getattr(row, name) == value for name, value in values.items())


def truth_words(row: Any) -> str:
    """The truth that a standing is about, and the step it belongs to, in words."""
    what = _CHOICES["truth"][1][f"{row.truth} {row.version}"]
    return f"{what}, step by {_CHOICES['preconditioner'][1][row.preconditioner]}"


def _ranked(rows: Iterable[LeaderboardRow]) -> list[LeaderboardRow]:
    """Standings about the primary truth, the largest |Spearman| first."""
    known = [
        row for row in rows if agrees(row, PRIMARY) and style.rounded([row.spearman.value])[0] is not None
    ]
    return sorted(known, key=lambda row: -abs(row.spearman.value))


@dataclass(frozen=True)
class Entry:
    """A row of a leaderboard: a standing, the best control in words, and in a study where it is from."""

    standing: Any
    control: str
    checkpoint: str = ""
    repeats: int = 1

    def choice(self, name: str) -> str:
        """The value that a filter looks at."""
        if name == "checkpoint":
            return self.checkpoint
        value: str = getattr(self.standing, name)
        return f"{value} {self.standing.version}" if name == "truth" else value


def make_board(
    entries: Sequence[Entry],
    shares: Sequence[str],
    definitions: Mapping[str, CriterionDefinition],
    caption: str,
    checkpoints: Mapping[str, str] | None = None,
) -> Board:
    """A table of standings with a filter for each thing that tells them apart.

    Args:
        entries: its rows.
        shares: keys of ``captured``.
        definitions: of the criteria by name.
        caption: below the table.
        checkpoints: names of the checkpoints of a study by path, or None for one measurement.
    """
    first = {**PRIMARY, "truth": f"{PRIMARY['truth']} {PRIMARY['version']}"}
    choices = {"checkpoint": ("checkpoint", checkpoints), **_CHOICES} if checkpoints else _CHOICES
    filters: list[dict[str, Any]] = []
    for key, (label, names) in choices.items():
        found = {entry.choice(key) for entry in entries}
        values = [value for value in names if value in found]
        if len(values) > 1:
            options = [] if key in first else [["", "all"]]
            options += [[value, names[value]] for value in values]
            chosen = first[key] if first.get(key) in values else options[0][0]
            filters.append({"key": key, "label": label, "options": options, "first": chosen})
    statistics = {
        "Spearman": "spearman",
        "Kendall τ": "kendall",
        "Pearson": "pearson",
        **{f"Captured by top {text.percent(float(share))}": share for share in shares},
        "Sign agreement": "sign_agreement",
        "AUC": "auc",
        "Gain over best control": "gain_over_control",
    }
    lead = ["Criterion", "Kind", *(["Checkpoint", "Repeats"] if checkpoints else [])]

    def cells(entry: Entry) -> list[Any]:
        own = entry.standing
        return [
            own.criterion,
            own.kind,
            *([checkpoints[entry.checkpoint], entry.repeats] if checkpoints else []),
            *(_pair(own.captured.get(n) if n in shares else getattr(own, n)) for n in statistics.values()),
            entry.control,
        ]

    spec = {
        "filters": filters,
        "columns": [board_column(name, name in statistics) for name in (*lead, *statistics, "Best control")],
        "rows": [[[entry.choice(f["key"]) for f in filters], cells(entry)] for entry in entries],
        "notes": {name: _note(about) for name, about in definitions.items()},
        "sort": len(lead),
    }
    return Board("leaderboard", caption, spec)


def _note(about: CriterionDefinition) -> str:
    source = " ".join(filter(None, (about.paper, about.equation)))
    note = about.formula + (f" ({source})" if source else "")
    return note if about.verified else f"{note}; formula not verified against the paper"


def _pair(estimate: Estimate | None) -> list[float | None] | None:
    """Value and standard error with three digits; None where there is none."""
    if estimate is None:
        return None
    pair = style.rounded([estimate.value, estimate.stderr], 3)
    return None if pair[0] is None else pair


def _sentence(ranked: Sequence[LeaderboardRow], shares: Sequence[str]) -> str:
    """In words: how much of the influence the best criterion and control capture, and who ranks best."""
    if not ranked or not shares:
        return ""
    share = shares[len(shares) // 2]
    known = [row for row in ranked if share in row.captured and math.isfinite(row.captured[share].value)]
    best, control = (
        max((row for row in known if row.kind == kind), key=lambda r: r.captured[share].value, default=None)
        for kind in ("literature", "control")
    )
    if best is None or control is None:
        return ""
    percent = text.percent(float(share))
    first = next(row for row in ranked if row.kind == "literature")
    model = next((row for row in ranked if row.kind == "model"), None)
    layer = (
        f" Of what a forward pass says of the last layer, which knows of effects at other positions, "
        f"{model.criterion} is best: Spearman {text.bare(model.spearman)}."
        if model is not None
        else ""
    )
    return (
        f"Of the literature's criteria, {best.criterion} finds most: the {percent} of tokens that it puts "
        f"first hold {text.bare(best.captured[share])} of the influence on the entropy; chance would be "
        f"{percent}. The best trivial control, {control.criterion}, holds "
        f"{text.bare(control.captured[share])}. By the order of all tokens {first.criterion} is best: "
        f"Spearman {text.bare(first.spearman)}.{layer}"
    )


def _basis_sentence(ranked: Sequence[LeaderboardRow], update: Rollouts | None) -> str:
    """In words: on how many of the update prompts the first board stands, where that is not on all."""
    if not ranked or update is None:
        return ""
    behind, asked = ranked[0].spearman.n, len(set(update.prompt_ids))
    if behind >= asked:
        return ""
    return (
        f"This board stands on {behind} of the batch's {asked} prompts: the responses to each of the others "
        "were rewarded alike, so their advantages are zero and their tokens have no influence to rank."
    )


def _standings_figure(ranked: Sequence[LeaderboardRow]) -> style.Figure:
    """Rank correlation of the best criteria and controls with the measured influence of tokens."""
    rows = ranked[::-1]
    groups = (
        (
            "criterion of the literature",
            style.Look(style.GREEN),
            [row for row in rows if row.kind == "literature"],
        ),
        (
            "model of the kernel",
            style.Look(style.PURPLE, "square"),
            [row for row in rows if row.kind == "model"],
        ),
        (
            "trivial control",
            style.Look(style.MUTED, "diamond"),
            [row for row in rows if row.kind == "control"],
        ),
    )
    traces = [
        style.curve(
            name,
            [row.spearman for row in chosen],
            [row.criterion for row in chosen],
            own,
            "%{y}: %{x:.3f}",
            mode="markers",
        )
        for name, own, chosen in groups
        if chosen
    ]
    caption = (
        f"The {len(rows)} criteria that follow the influence of the update batch's tokens on the on-policy "
        "entropy best, sign included, through the whole kernel and the optimizer's preconditioner. Error "
        f"bars: 95 %, {OVER}."
    )
    names = [row.criterion for row in rows]
    return style.figure(
        "criteria-standings",
        "Criteria against the truth",
        caption,
        traces,
        height=120 + 20 * len(rows),
        xaxis=style.axis("Spearman correlation with measured influence", zeroline=True),
        yaxis={"automargin": True, "categoryorder": "array", "categoryarray": names},
    )


def pareto_figure(pareto: Pareto, unit: Unit) -> style.Figure:
    """Entropy kept against reward given up, one line for each rule, one point for each share of tokens."""
    traces = []
    for number, rule in enumerate(dict.fromkeys(point.rule for point in pareto.points)):
        points = [point for point in pareto.points if point.rule == rule]
        traces.append(
            style.curve(
                rule.replace("_", " "),
                [p.reward_given_up for p in points],
                [unit.change(p.entropy_kept) for p in points],
                style.look(number),
                f"{rule}, %{{customdata}}",
                width=1,
                details=[
                    f"{p.num_dropped} tokens ({text.percent(p.share)})<br>"
                    f"entropy kept {text.bare(unit.change(p.entropy_kept))}<br>"
                    f"reward given up {text.bare(p.reward_given_up)}"
                    for p in points
                ],
            )
        )
    caption = (
        "The step is made again without the tokens that a rule drops, and measured on the same probe "
        f"samples at lr {text.number(pareto.lr)}: how much less the entropy changes, against how much "
        "less the reward rises. The full step changes the entropy by "
        f"{text.bare(unit.change(pareto.full_entropy_change))} and the reward by "
        f"{text.bare(pareto.full_reward_change)}. "
        "Influence: the exact one, largest loss of entropy first; no reward: only tokens that do not raise "
        "the reward; both chosen by one half of the probe prompts and measured on the other, both ways. Up "
        "and left is better."
    )
    return style.figure(
        "criteria-pareto",
        "Dropping tokens: entropy kept, reward given up",
        caption,
        traces,
        height=460,
        xaxis=style.axis("reward given up", zeroline=True, nticks=6),
        yaxis=style.axis(f"entropy kept, {unit.label}", zeroline=True),
    )


def _properties_table(study: Regression) -> Table:
    """Regression of influence, or of its size, on properties of tokens or of sequences."""
    outcome = "|influence|" if study.outcome == "abs_influence" else study.outcome
    return table(
        f"properties-{study.outcome}-{study.level}".replace("_", "-"),
        f"What {outcome} goes with, by {study.level}",
        f"Least squares of the {outcome} on all properties at once, {study.num_items:,} items, "
        f"R² {text.number(study.r2, 2)}; errors clustered by prompt. Standardised: standard "
        "deviations of influence per standard deviation of the property. It describes; properties that "
        "go together share what they explain.",
        [
            {
                "Property": name.replace("_", " "),
                "Standardised": study.standardised[name],
                "Coefficient": value,
                "Unit": value.unit,
            }
            for name, value in study.coefficients.items()
            if name in study.standardised
        ],
    )
