# ruff: noqa: RUF001 (typographic signs are meant)
"""The pages: one self-contained HTML file each from the artifacts of a run, a study or an evaluation.

Nothing is recomputed and nothing is fetched: plotly.js is packed into the page once, and the page's own
content security policy forbids every network request. All text of a run is escaped by the
template engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.reading.evaluation import TABLE, Evaluation
from stepscope.reading.ledger import LedgerFolder, load_ledger
from stepscope.reading.measurement import Measurement, load_measurement
from stepscope.report import assets, text
from stepscope.report.load import (
    Run,
    load_run,
    load_training,
    read_study,
    reads_artifacts,
)
from stepscope.report.parts import Panel, Room, Section
from stepscope.report.sections import (
    answer,
    briefs,
    change,
    criteria,
    curvature,
    explore,
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
    provenance,
    remedies,
    responses,
    sampler,
    step,
    study,
    training,
    trust,
    what_if,
)
from stepscope.report.tables import GLOSSARY
from stepscope.results.ledger import LEDGER_PAGE, Account

_SECTIONS: Sequence[Callable[[Measurement, Room], Section | None]] = (
    explore.section,
    kinds.section,
    kinds.roles,
    trust.section,
    remedies.section,
    headline.section,
    provenance.section,
    change.section,
    step.section,
    influence.section,
    influence.validation,
    kernel.section,
    models.section,
    curvature.section,
    kinship.section,
    noise.section,
    criteria.section,
    frontier.section,
    sampler.section,
    responses.section,
)
"""Of a measurement, in the order of the page; a missing artifact leaves its section out."""


@reads_artifacts
def write_report(run: Path) -> Path:
    """Write ``report.html`` into a measure folder or a whole run folder.

    Args:
        run: a folder left by ``stepscope measure`` (``summary.json`` and companions) or by
            ``stepscope train`` and ``demo`` (``checkpoints/``, ``eval.parquet``, ``measure/step-N/``).

    Returns:
        The path of the page. It is replaced in one piece if it was there.

    Raises:
        RunFolderError: ``run`` is neither kind of folder, or an artifact is damaged.
    """
    loaded = load_run(Path(run))
    room = Room(len(loaded.measurements))
    steps = {m.checkpoint_step: f"#m{i}" for i, m in enumerate(loaded.measurements)}
    places = {step: place for step, place in steps.items() if step is not None}
    return _write(
        loaded.path / "report.html",
        title=_title(loaded),
        lede=_lede(loaded),
        training=training.section(loaded.training, places) if loaded.training else None,
        evaluation=training.evaluation(loaded.training) if loaded.training else None,
        checkpoints=headline.checkpoints(loaded.measurements),
        panels=[_panel(m, f"m{i}", room) for i, m in enumerate(loaded.measurements)],
        footer=_footer(loaded.measurements),
    )


@reads_artifacts
def write_evaluation(table: Path) -> Path:
    """Write ``eval.html`` beside ``eval.parquet``: curves over the checkpoints, changes, profiles, law.

    Raises:
        RunFolderError: there is no such table, or a file beside it is damaged.
    """
    loaded = load_training(table)
    first, more = training.section(loaded), training.evaluation(loaded)
    if not loaded.evaluations or first is None:
        raise RunFolderError(f"{table}: no such evaluation; run `stepscope eval`")
    steps = {int(s) for rows in loaded.evaluations.values() for s in rows.step}
    return _write(
        table.with_suffix(".html"),
        title=f"Evaluation of {table.resolve().parent.name}",
        lede=f"{table}: {len(steps)} evaluated checkpoints.",
        evaluation=Section(
            "evaluation",
            "Evaluation",
            sentences=[*first.sentences, *(more.sentences if more else ())],
            tables=[*first.tables, *(more.tables if more else ())],
            figures=[*first.figures, *(more.figures if more else ())],
        ),
    )


@reads_artifacts
def write_law_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page with the entropy laws of several runs in one figure and one table.

    Args:
        folders: run folders with ``entropy_law.json``.
        out: the HTML file to write; its folder is made where it is missing.

    Raises:
        RunFolderError: a run has no entropy law.
    """
    laws = {}
    for name, folder in zip(_short_names(folders), folders, strict=True):
        found = Evaluation(folder / TABLE).law
        if found is None:
            raise RunFolderError(
                f"{folder}: no entropy_law.json; run `stepscope eval {folder}` on at least four checkpoints"
            )
        laws[name] = found
    return _write(
        out,
        title=f"Entropy laws of {len(laws)} runs",
        lede=", ".join(map(str, folders)),
        comparison=Section(
            "comparison", "Comparison", tables=[law.law_table(laws)], figures=[law.law_figure(laws)]
        ),
    )


@reads_artifacts
def write_comparison(run_a: Path, run_b: Path, out: Path) -> Path:
    """Write a page that compares two measurements; differences are B minus A.

    Args:
        run_a: measure folder A.
        run_b: measure folder B.
        out: the HTML file to write; its folder is made where it is missing.

    Returns:
        ``out``.

    Raises:
        RunFolderError: one of the folders is not a finished measurement, or they share no headline figure.
    """
    pair = (load_measurement(Path(run_a)), load_measurement(Path(run_b)))
    first, second = _short_names([m.path for m in pair])
    names = (first, second)
    table = headline.comparison(names, pair)
    if table is None:
        raise RunFolderError(f"{run_a} and {run_b}: their summary.json share no figure; nothing to compare")
    sides = [f"A: {first}", f"B: {second}"]
    panels = [replace(_panel(m, f"m{i}", Room(2)), title=sides[i]) for i, m in enumerate(pair)]
    overlay = change.overlay(names, pair)
    return _write(
        Path(out),
        title=f"{first} against {second}",
        lede=f"A: {pair[0].path}. B: {pair[1].path}. Differences are B minus A.",
        comparison=Section(
            "comparison",
            "Comparison",
            sentences=[f"{'AB'[i]}: {s}" for i, p in enumerate(panels) for s in p.sentences[:1]],
            tables=[table],
            figures=[overlay] if overlay else [],
        ),
        panels=panels,
        footer=_footer(pair),
    )


@reads_artifacts
def write_study_report(folder: Path) -> Path:
    """Write ``study.html`` into a study folder, from ``study.parquet`` and ``study.json`` and nothing else.

    Args:
        folder: left by ``stepscope study``.

    Returns:
        The path of the page. It is replaced in one piece if it was there.

    Raises:
        RunFolderError: the folder holds no finished study, or a file of it is damaged.
    """
    loaded = read_study(Path(folder))
    return _write(
        loaded.path / "study.html",
        title=f"Study {loaded.path.resolve().name}",
        lede=study.lede(loaded),
        checkpoints=study.cells_table(loaded),
        panels=[study.panel(loaded, s, f"m{i}") for i, s in enumerate(loaded.distinct("setting"))],
        footer="Made by stepscope from study.parquet and study.json; nothing here was recomputed.",
    )


@reads_artifacts
def write_ledger_report(folder: Path) -> Path:
    """Write ``ledger.html`` into the folder of a ledger: who moved the quantities of a training.

    Args:
        folder: left by ``stepscope ledger``.

    Returns:
        The path of the page. It is replaced in one piece if it was there.

    Raises:
        RunFolderError: the folder holds no finished ledger, a file of it is damaged, or the record of the
            training has gone.
    """
    found = load_ledger(Path(folder))
    accounts, room = found.ledger.accounts, Room(len(found.ledger.accounts))
    return _write(
        found.path / LEDGER_PAGE,
        title=f"Who moved the {text.quantity_name(accounts[0].quantity)} of {found.name}",
        lede=f"{found.path}: steps {found.ledger.first_step} to {found.ledger.last_step}, "
        f"{len(found.recorded):,} tokens, {found.ledger.num_prompts} probe prompts.",
        panels=[
            _account_panel(found, account, f"m{i}", room, plane=i == 0) for i, account in enumerate(accounts)
        ],
    )


def _account_panel(found: LedgerFolder, account: Account, key: str, room: Room, *, plane: bool) -> Panel:
    entries = found.entries(account.quantity)
    sections = [
        ledger.account_section(found, entries, account),
        what_if.section(found, account, first=plane),
        ledger_tokens.section(entries, account.unit, room.excerpts),
        ledger.classes_section(found, account),
        ledger.prompts_section(found, entries, account),
        ledger_kinship.section(found) if account.quantity == "entropy" else None,
        ledger.plane_section(found, entries) if plane else None,
    ]
    shown = [section for section in sections if section is not None]
    return Panel(
        key,
        text.quantity_name(account.quantity).replace("_", " ").capitalize(),
        [*ledger.headline(found, account), *(line for section in shown for line in section.sentences)],
        shown,
    )


@reads_artifacts
def measured(folder: Path) -> list[str]:
    """The change of a measurement at its own learning rate; nothing before the stage ``change``."""
    found = Measurement(folder).change
    return [] if found is None else [change.own_change(found)]


@reads_artifacts
def evaluated(table: Path) -> list[str]:
    """pass@k and entropy of the evaluated checkpoints, by way of sampling."""
    return training.training_sentences(load_training(table))


@reads_artifacts
def studied(folder: Path) -> list[str]:
    """Slopes and changes of a study, by setting."""
    loaded = read_study(folder)
    return [line for s in loaded.distinct("setting") for line in study.study_sentences(loaded, s)]


def _panel(measurement: Measurement, key: str, room: Room) -> Panel:
    """All there is to show of one measurement."""
    made = [found for make in _SECTIONS if (found := make(measurement, room)) is not None]
    sections = [replace(section, brief=briefs.brief(section, measurement)) for section in made]
    sentences = [sentence for section in sections for sentence in section.sentences if sentence]
    first = answer.answer(measurement)
    if first is not None:
        sentences = [sentence for sentence in sentences if sentence != first.sentence]
    return Panel(key, headline.title(measurement), sentences, sections, first)


def _title(run: Run) -> str:
    if run.training is None:
        only = run.measurements[0]
        checkpoint = (only.provenance or {}).get("checkpoint")
        name = Path(str(checkpoint)).name if checkpoint else only.path.resolve().name
        return f"One optimizer step from {name}"
    return f"Training run {run.path.resolve().name}"


def _lede(run: Run) -> str:
    if run.training is None:
        return f"Measurement in {run.path}"
    counts = {
        "log entries": len(run.training.log),
        "evaluated checkpoints": len({s for rows in run.training.evaluations.values() for s in rows.step}),
        "measured checkpoints": len(run.measurements),
    }
    return f"{run.path}: {', '.join(f'{count} {what}' for what, count in counts.items() if count)}."


def _footer(measurements: Sequence[Measurement] = ()) -> str:
    versions = {str((m.provenance or {}).get("versions", {}).get("stepscope", "")) for m in measurements}
    made = " ".join(["Made by stepscope", ", ".join(sorted(versions - {""}))]).strip()
    return f"{made} from the artifacts of the run; nothing on this page was recomputed."


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _prose(sentence: str) -> str:
    """Our own sentences with the spaces that no line may break at."""
    return sentence.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0").replace(" × ", "\u00a0×\u00a0")


def templates() -> Environment:
    """Jinja's environment of the page's templates; whatever is put into them is escaped."""
    environment = Environment(
        loader=PackageLoader("stepscope.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.filters["held"] = _nowhere
    return environment


def _nowhere(value: object) -> int:
    """What a page keeps for its scripts cannot be kept where there is no page."""
    raise TypeError("only a page holds what its scripts draw")


def _write(path: Path, **content: Any) -> Path:
    """The page of the template ``page.html.j2``, self-contained, in one piece; its folder is made if missing.

    Args:
        path: the HTML file.
        content: ``title`` and ``lede``; optionally ``footer``, ``panels``, ``checkpoints`` (a table), and the
            sections ``training``, ``evaluation`` and ``comparison``.
    """
    held = assets.Held()
    environment = templates()
    environment.filters["held"] = held.keep
    # Style and scripts are ours and plotly's, not data of a run: they go in unescaped.
    defaults: dict[str, Any] = {
        **dict.fromkeys(("training", "evaluation", "checkpoints", "comparison")),
        "panels": [],
        "footer": _footer(),
        "glossary": GLOSSARY,
        "css": assets.style(),
        "script": assets.script(),
        "plotly_js": assets.plotly(),
        "held": held,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, environment.get_template("page.html.j2").render({**defaults, **content}))
    return path
