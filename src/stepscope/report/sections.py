"""The sections of one measurement, in the order of the page; a missing artifact leaves its section out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from stepscope.report import (
    change,
    criteria,
    influence,
    kernel,
    pareto,
    reliability,
    tables,
    text,
    validation,
)
from stepscope.report.criteria import Board
from stepscope.report.figures import Figure, step_figures
from stepscope.report.influence import TokenTable
from stepscope.report.load import Measurement, point_at
from stepscope.report.noise import batch_size_table, noise_figures
from stepscope.report.responses import Response, influential_responses, sampled_responses
from stepscope.report.tables import TableBlock

_T = TypeVar("_T")

_TOKENS_ON_PAGE = 9000
"""Tokens shown on one page in all; each costs about a hundred bytes."""

_POINTS_ON_PAGE = 2400
"""Tokens in the scatter plots of one page in all."""

_HEAT_MAP_SIDE = 128
"""Sequences in a heat map where a page shows one measurement; n take n^2 numbers of six bytes."""

_SCORES_ON_HOVER = 3
_INFLUENTIAL = 8
_SAMPLED_EACH = 3


@dataclass(frozen=True)
class Section:
    """One section of a measurement as the template shows it.

    Attributes:
        key: part of its element id.
        title: heading.
        intro: a sentence below the heading.
        facts: names and values.
        figures: figures, after the facts.
        legend: whether the colour scale of tokens is explained.
        responses: responses with their tokens.
        tables: tables.
        board: a table that the reader filters.
        more_title: what unfolds; empty where nothing does.
        more_facts: facts that unfold.
        more_figures: figures that unfold.
        more_tables: tables that unfold.
    """

    key: str
    title: str
    intro: str = ""
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    legend: bool = False
    responses: Sequence[Response] = ()
    tables: Sequence[TableBlock] = ()
    board: Board | None = None
    more_title: str = ""
    more_facts: Sequence[tuple[str, str]] = ()
    more_figures: Sequence[Figure] = ()
    more_tables: Sequence[TableBlock] = ()


@dataclass(frozen=True)
class Panel:
    """One measurement on the page: key of its element, title, headline sentences, sections."""

    key: str
    title: str
    sentences: Sequence[str]
    sections: Sequence[Section]


def measurement_panel(measurement: Measurement, key: str, count: int, title: str = "") -> Panel:
    """All there is to show of one measurement.

    Args:
        measurement: its artifacts.
        key: of its element on the page.
        count: measurements on the page, which share its room for tokens.
        title: what to call it; its own title where empty.
    """
    quantity = str(measurement.change["quantity"]) if measurement.change else "entropy"
    tokens = influence.join_tokens(
        measurement.update,
        measurement.update_tokens,
        measurement.influence_tokens,
        quantity,
        measurement.criteria_tokens,
        criteria.best_of(measurement, _SCORES_ON_HOVER),
    )
    sections = (
        _headline_section(measurement),
        _provenance_section(measurement),
        _change_section(measurement),
        _step_section(measurement),
        _influence_section(measurement, tokens, quantity, count),
        _validation_section(measurement),
        _kernel_section(measurement, round(_HEAT_MAP_SIDE / math.sqrt(count))),
        _noise_section(measurement),
        _criteria_section(measurement),
        _responses_section(measurement, _TOKENS_ON_PAGE // (4 * _SAMPLED_EACH * count)),
    )
    return Panel(
        key=key,
        title=title or measurement.title,
        sentences=_sentences(measurement, tokens),
        sections=[s for s in sections if s is not None],
    )


def _sentences(measurement: Measurement, tokens: TokenTable | None) -> list[str]:
    sentences = []
    series = measurement.change
    if series is not None:
        sentences.append(own_change(series))
        if series["lr"] > 0:
            sentences.append(influence.parts(measurement.summary, series["lr"]))
    if tokens is not None:
        sentences.append(influence.concentration(tokens))
    return [s for s in sentences if s]


def own_change(series: Mapping[str, Any]) -> str:
    """The headline of a measurement, from ``change.json``; empty where the sweep left out the own rate."""
    if not series["lr"] > 0:
        return (
            "The checkpoint's own learning rate is 0, so its next step changes nothing; the sweep shows what "
            "the step would do at other learning rates."
        )
    point = point_at(series, series["lr"])
    if point is None:
        return ""
    true = (series.get("taken") or point)["true"]
    return text.change_sentence(series["quantity"], series["lr"], true, point["linear"])


_FIRST_FACTS = (
    ("checkpoint", "checkpoint"),
    ("checkpoint digest", "digest"),
    ("task", "task"),
    ("precision", "precision"),
    ("update num_prompts", "update prompts"),
    ("update group_size", "responses per prompt"),
    ("probe num_prompts", "probe prompts"),
    ("seeds update", "seed of the update batch"),
    ("seeds probe", "seed of the probe batch"),
    ("versions stepscope", "stepscope"),
    ("versions torch", "torch"),
    ("versions transformers", "transformers"),
    ("started", "started"),
    ("command", "command"),
)


def _provenance_section(measurement: Measurement) -> Section | None:
    record = dict(_flat({**(measurement.config or {}), **(measurement.provenance or {})}))
    if not record:
        return None
    first = [(name, record[key]) for key, name in _FIRST_FACTS if key in record]
    shown = {key for key, _ in _FIRST_FACTS}
    rest = [
        (key.replace("_", " "), value)
        for key, value in record.items()
        if key not in shown and not key.startswith("stages ")
    ]
    return Section(
        "provenance",
        "What was measured",
        facts=first,
        more_title="All settings and versions" if rest else "",
        more_facts=rest,
    )


def _headline_section(measurement: Measurement) -> Section:
    table = tables.estimates_table(
        "headline",
        "",
        "Value ± one standard error, clustered by prompt; n: independent units behind it; trust: whether "
        "its diagnostics passed. Changes are those at the step's own learning rate. Each name links to its "
        "definition.",
        measurement.summary,
    )
    return Section("headline", "Headline figures", tables=[table])


def _change_section(measurement: Measurement) -> Section | None:
    series, table = measurement.change, tables.change_table(measurement)
    if series is None or table is None:
        return None
    others = [
        change.change_figure(s, key=f"change-{i}") for i, s in enumerate(series.get("others", []), start=1)
    ]
    return Section(
        "change",
        "Change against learning rate",
        figures=[change.change_figure(series)],
        more_title=f"All changes as a table, and {len(others)} other quantities and versions"
        if others
        else "All changes as a table",
        more_figures=others,
        more_tables=[table],
    )


def _step_section(measurement: Measurement) -> Section | None:
    figures = step_figures(measurement)
    if not figures:
        return None
    summary = measurement.step_summary or {}
    facts = [
        (
            name,
            text.number(float(summary[key]), 4) if isinstance(summary[key], float) else f"{summary[key]:,}",
        )
        for key, name in (
            ("lr", "learning rate"),
            ("grad_norm", "gradient norm before clipping"),
            ("clip_coefficient", "clip coefficient"),
            ("num_parameters", "trainable parameters"),
            ("num_sequences", "sequences"),
            ("num_tokens", "tokens"),
        )
        if isinstance(summary.get(key), int | float)
    ]
    later = summary.get("lifetime")
    intro = text.lifetime_sentence(later) if later else ""
    if rounding := summary.get("rounding"):
        intro = f"{intro} {text.rounding_sentence(rounding)}".strip()
        series = measurement.change or {}
        if taken := series.get("taken"):
            intro += f" {text.rounded_change_sentence(str(series['quantity']), taken)}"
        intro += " Components, shares and influences are those of the step before rounding."
    return Section("step", "What the step is made of", intro=intro, facts=facts, figures=figures)


def _influence_section(
    measurement: Measurement, tokens: TokenTable | None, quantity: str, count: int
) -> Section | None:
    points = measurement.change["points"] if measurement.change else []
    unit = points[0]["linear"].unit if points else "change"
    max_tokens = _TOKENS_ON_PAGE // (2 * _INFLUENTIAL * count)
    scatter = max(200, _POINTS_ON_PAGE // count)
    figures = [influence.sequence_figure(measurement, quantity, unit)]
    blocks: list[TableBlock | None] = []
    responses: list[Response] = []
    if tokens is not None:
        figures += [
            influence.share_figure(tokens, quantity),
            influence.scatter_figure(tokens, quantity, unit, scatter),
        ]
        blocks.append(influence.top_tokens_table(tokens, quantity))
        responses = influential_responses(measurement, tokens, most=_INFLUENTIAL, max_tokens=max_tokens)
    drawn = _present(figures)
    if not drawn:
        return None
    return Section(
        "influence",
        "Which sequences and tokens did it",
        intro=reliability.certainty(measurement, quantity),
        facts=influence.ways(measurement.summary),
        figures=[*_present([reliability.reliability_figure(measurement, quantity)]), *drawn],
        legend=bool(responses),
        responses=responses,
        tables=_present(blocks),
    )


def _validation_section(measurement: Measurement) -> Section | None:
    figures = validation.validation_figures(measurement)
    if not figures:
        return None
    return Section(
        "validation",
        "Influence against re-made steps",
        facts=validation.validation_facts(measurement),
        figures=figures,
    )


def _kernel_section(measurement: Measurement, side: int) -> Section | None:
    table = kernel.kernel_table(measurement)
    if table is None:
        return None
    return Section(
        "kernel",
        "Which responses pull together",
        intro=kernel.kernel_sentence(measurement),
        figures=kernel.kernel_figures(measurement, side),
        tables=[table],
    )


def _noise_section(measurement: Measurement) -> Section | None:
    table = tables.noise_table(measurement)
    if table is None:
        return None
    sizes = batch_size_table(measurement)
    return Section(
        "noise",
        "Gradient noise scale",
        figures=noise_figures(measurement),
        tables=[table, *([sizes] if sizes else [])],
    )


def _criteria_section(measurement: Measurement) -> Section | None:
    board = criteria.leaderboard(measurement)
    if board is None:
        return None
    studies = pareto.properties_tables(measurement)
    return Section(
        "criteria",
        "Which cheap criteria find these tokens",
        intro=f"{criteria.criteria_sentence(measurement)} {criteria.basis_sentence(measurement)}".strip(),
        figures=_present([criteria.standings_figure(measurement), pareto.pareto_figure(measurement)]),
        board=board,
        more_title="What kind of token carries influence" if studies else "",
        more_tables=studies,
    )


def _responses_section(measurement: Measurement, max_tokens: int) -> Section | None:
    responses = sampled_responses(measurement, each=_SAMPLED_EACH, max_tokens=max_tokens)
    if not responses:
        return None
    return Section(
        "responses",
        "Sampled responses",
        intro="The first correct and incorrect responses of the batch, one per prompt, not selected "
        "otherwise. Hover a token for its log-prob and entropy.",
        responses=responses,
    )


def _present(items: Iterable[_T | None]) -> list[_T]:
    return [item for item in items if item is not None]


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Entries of nested mappings as text; what is not set is left out."""
    found: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key} ")
        elif value is not None and value != "":
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((f"{prefix}{key}", shown))
    return found
