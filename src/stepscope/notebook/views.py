"""Which sections of the page a result is shown by; nothing is computed or drawn here a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

from stepscope.errors import MeasurementError
from stepscope.reading.evaluation import Evaluation
from stepscope.reading.ledger import LedgerFolder, WhatIfFolder
from stepscope.reading.measurement import InMemory, Measurement
from stepscope.reading.study import Study
from stepscope.report.load import load_training, read_study
from stepscope.report.parts import Room, Section
from stepscope.report.sections import (
    answer,
    change,
    criteria,
    curvature,
    frontier,
    headline,
    influence,
    kernel,
    kinds,
    kinship,
    law,
    ledger,
    ledger_kinship,
    ledger_tokens,
    models,
    noise,
    responses,
    step,
    study,
    training,
    what_if,
)
from stepscope.report.tables import Table, Value, interval_cell, table
from stepscope.report.units import unit_for
from stepscope.results import Rollouts, RolloutTokens
from stepscope.results.best_step import BestStep
from stepscope.results.criteria import Pareto
from stepscope.results.curvature import PairReport
from stepscope.results.entropy_law import EntropyLaw
from stepscope.results.views import Parts
from stepscope.stats import Estimate

_ROOM = Room(1)

_ARTIFACTS = (
    change.section,
    step.section,
    influence.section,
    kernel.section,
    models.section,
    curvature.section,
    kinship.section,
    noise.section,
    criteria.section,
    frontier.section,
    responses.section,
)
"""Sections that show an artifact; one whose artifact is not there is left out."""


@dataclass(frozen=True)
class View:
    """What there is to see of a result.

    Attributes:
        title: above it.
        sections: with its figures and responses, made when they are asked for.
        head: those whose sentences, facts and tables are shown; None for all.
    """

    title: str
    sections: Callable[[], Iterable[Section]]
    head: Callable[[], Iterable[Section]] | None = None


def view(shown: object, policy: Any = None) -> View:
    """The view of a result.

    Args:
        shown: the result.
        policy: whose tokenizer gives the texts of tokens in memory, or None.

    Raises:
        MeasurementError: it has none.
    """
    return _of_parts(shown, policy) if isinstance(shown, Parts) else _view(shown)


@singledispatch
def _view(shown: object) -> View:
    raise MeasurementError(f"{type(shown).__name__} has no view; print it, or take its to_pandas()")


def _of_parts(shown: Parts, policy: Any) -> View:
    """What is in memory, by the sections of a measurement that has nothing else."""
    found = dict(shown.found)
    batch, influenced = found.get("update"), "influence_tokens" in found
    if batch is not None and (texts := _texts(batch, policy, ids=influenced)) is not None:
        found["update_tokens"] = texts

    def sections() -> Iterator[Section]:
        if shown.figures:
            yield Section("figures", "", tables=[_figures_table(shown.figures)])
        if batch is not None and set(shown.found) == {"update"}:
            yield _batch(batch)
        measurement = InMemory(found)
        wanted = [make for make in _ARTIFACTS if make is not responses.section or not influenced]
        yield from (section for make in wanted if (section := make(measurement, _ROOM)) is not None)

    return View(shown.title, sections)


def _texts(batch: Rollouts, policy: Any, *, ids: bool) -> RolloutTokens | None:
    """The tokens of a batch in memory; with their ids for texts where these are asked for and not known."""
    if policy is not None:
        from stepscope.policy.rollouts import response_text  # with torch, which the policy has loaded

        reader = response_text(policy)
        return batch.token_rows([reader.by_token(row) for row in batch.response_token_ids])
    return batch.token_rows([[f"⟨{t}⟩" for t in row] for row in batch.response_token_ids]) if ids else None


def _batch(batch: Rollouts) -> Section:
    facts = {
        "correct": f"{int(batch.correct.sum())} of {len(batch)}",
        "truncated": f"{int(batch.truncated.sum())} of {len(batch)}",
        "tokens that the policy wrote": f"{int(batch.num_policy_tokens.sum()):,}",
        "temperature": f"{batch.temperature:g}",
        "longest response allowed": f"{batch.max_response_tokens} tokens",
    }
    return Section("batch", "", facts=list(facts.items()))


def _figures_table(figures: Mapping[str, Estimate], key: str = "figures") -> Table:
    rows: list[Mapping[str, Value]] = [
        {"": name, "Value ± standard error": e, "95 %": interval_cell(e), "Unit": e.unit, "n": e.n}
        for name, e in figures.items()
    ]
    return table(key, "", "", rows)


@_view.register
def _(shown: Measurement) -> View:
    first = answer.answer(shown)

    def sections() -> Iterator[Section]:
        if first is not None and first.figure is not None:
            yield Section("answer", "", figures=[first.figure])
        for make in (kinds.section, *_ARTIFACTS):
            if (section := make(shown, _ROOM)) is not None:
                yield section
        if shown.pareto is not None:
            yield from _view(shown.pareto).sections()

    def head() -> Iterator[Section]:
        if first is not None:
            yield Section(
                "answer",
                "",
                sentences=[first.sentence],
                facts=[(mark.words, mark.why) for mark in first.marks],
                tables=[
                    _culprits(f"What {verb} it most, {first.unit}", found)
                    for verb, found in (("lowered", first.lowered), ("raised", first.raised))
                ],
            )
        yield headline.section(shown, _ROOM)

    return View(f"Measurement {shown.path}", sections, head)


def _culprits(title: str, found: Iterable[Any]) -> Table:
    rows = [
        {
            "Before it": c.before,
            "Token": c.token,
            "After it": c.after,
            "Times": c.times,
            "Change": c.value + ("" if c.resolved else " ○"),
            "Share": c.share,
        }
        for c in found
    ]
    return table("culprits", title, "", rows)


@_view.register
def _(shown: LedgerFolder) -> View:
    account = shown.ledger.accounts[0]

    def sections() -> Iterator[Section]:
        entries = shown.entries(account.quantity)
        yield ledger.account_section(shown, entries, account)
        found = what_if.section(shown, account, first=True)
        if found is not None:
            yield found
        yield ledger_tokens.as_responses(entries, _ROOM.excerpts)
        yield ledger.classes_section(shown, account)
        more = (ledger_kinship.section(shown), ledger.plane_section(shown, entries))
        yield from (section for section in more if section is not None)

    def head() -> Iterator[Section]:
        section = ledger.account_section(shown, shown.entries(account.quantity), account)
        yield Section("account", "", sentences=ledger.headline(shown, account), tables=section.tables)

    return View(f"Ledger of {shown.name}", sections, head)


@_view.register
def _(shown: WhatIfFolder) -> View:
    return View(f"Without {shown.result.rule}", lambda: [what_if.of_rule(shown)])


@_view.register
def _(shown: Study) -> View:
    loaded = read_study(shown.path)
    panels = [study.panel(loaded, s, f"m{i}") for i, s in enumerate(loaded.distinct("setting"))]
    sections = [section for panel in panels for section in panel.sections]
    lead = Section("study", "", sentences=[line for panel in panels for line in panel.sentences])
    return View(study.lede(loaded), lambda: [lead, *sections])


@_view.register
def _(shown: Evaluation) -> View:
    loaded = load_training(shown.table)
    found = [training.section(loaded), training.evaluation(loaded)]
    sections = [section for section in found if section is not None]
    return View(f"Evaluation {shown.table}", lambda: sections)


@_view.register
def _(shown: EntropyLaw) -> View:
    section = Section(
        "law",
        "",
        sentences=law.law_sentences(shown),
        figures=[law.law_figure({"": shown})],
        tables=[law.law_table({"": shown})],
    )
    return View("Entropy law", lambda: [section])


@_view.register
def _(shown: BestStep) -> View:
    return View(f"Best step for {shown.quantity}", partial(noise.best_sections, shown))


@_view.register
def _(shown: Pareto) -> View:
    effect = shown.full_entropy_change
    unit = unit_for(shown.lr, abs(effect.value), "entropy", effect.unit)
    rows: list[Mapping[str, Value]] = [
        {
            "Dropped by": point.rule.replace("_", " "),
            "Tokens": point.num_dropped,
            f"Entropy kept, {unit.label}": unit.change(point.entropy_kept),
            "Reward given up": point.reward_given_up,
        }
        for point in shown.points
    ]
    section = Section(
        "pareto",
        "",
        figures=[criteria.pareto_figure(shown, unit)],
        tables=[table("pareto", "", "", rows)],
    )
    return View("Dropping tokens: entropy kept, reward given up", lambda: [section])


@_view.register
def _(shown: PairReport) -> View:
    sums = {name.replace("_", " "): getattr(shown.whole, name) for name in ("diagonal", "batch", "total")}
    section = Section(
        "pairs",
        "",
        intro=curvature.intro(shown),
        figures=[curvature.spectrum_figure(shown)],
        tables=[_figures_table(sums)],
    )
    return View(f"Second-order kernel of {shown.quantity}", lambda: [section])
