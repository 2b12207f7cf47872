# ruff: noqa: RUF001 (typographic signs are meant)
"""The page: one self-contained HTML file from the artifacts of a run.

Nothing is recomputed and nothing is fetched: plotly.js is inlined once from the plotly package, and the
page's
own content security policy forbids every network request. All text of a run is escaped by the template
engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.report.change import overlay_figure
from stepscope.report.evaluation import evaluation_figures, evaluation_sentences, evaluation_tables
from stepscope.report.figures import Figure
from stepscope.report.law import law_figure, law_table
from stepscope.report.load import (
    Measurement,
    Run,
    Training,
    load_evaluation,
    load_measurement,
    load_run,
    reads_artifacts,
)
from stepscope.report.sections import measurement_panel
from stepscope.report.tables import TableBlock, comparison_table, series_table
from stepscope.report.training import before_after_tables, training_figures, training_sentences

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class _Block:
    """A part of the page above the measurements."""

    sentences: Sequence[str]
    tables: Sequence[TableBlock]
    figures: Sequence[Figure]


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
    count = len(loaded.measurements)
    page = render_page(
        title=_title(loaded),
        lede=_lede(loaded),
        training=_training_section(loaded.training) if loaded.training else None,
        evaluation=_evaluation_section(loaded.training) if loaded.training else None,
        checkpoints=series_table(loaded.measurements),
        measurements=[measurement_panel(m, f"m{i}", count) for i, m in enumerate(loaded.measurements)],
        footer=_footer(loaded.measurements),
    )
    path = loaded.path / "report.html"
    runs.write_text(path, page)
    return path


@reads_artifacts
def write_evaluation(table: Path) -> Path:
    """Write ``eval.html`` beside ``eval.parquet``: curves over the checkpoints, changes, profiles, law.

    Raises:
        RunFolderError: there is no such table, or a file beside it is damaged.
    """
    loaded = load_evaluation(table)
    if not loaded.evaluations:
        raise RunFolderError(f"{table}: no such evaluation; run `stepscope eval`")
    steps = sorted({step for entry in loaded.evaluations.values() for step in entry["step"]})
    extra = _evaluation_section(loaded)
    page = render_page(
        title=f"Evaluation of {table.resolve().parent.name}",
        lede=f"{table}: {len(steps)} evaluated checkpoints.",
        evaluation=_Block(
            [*training_sentences(loaded), *(extra.sentences if extra else [])],
            [*before_after_tables(loaded), *(extra.tables if extra else [])],
            [*training_figures(loaded), *(extra.figures if extra else [])],
        ),
        measurements=[],
        footer=_footer(()),
    )
    path = table.with_suffix(".html")
    runs.write_text(path, page)
    return path


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
        law = load_evaluation(folder / "eval.parquet").law
        if law is None:
            raise RunFolderError(
                f"{folder}: no entropy_law.json; run `stepscope eval {folder}` on at least four checkpoints"
            )
        laws[name] = law
    page = render_page(
        title=f"Entropy laws of {len(laws)} runs",
        lede=", ".join(map(str, folders)),
        comparison=_Block([], [law_table(laws)], [law_figure(laws)]),
        measurements=[],
        footer=_footer(()),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(out, page)
    return out


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
    table = comparison_table(names, (pair[0].summary, pair[1].summary))
    if not table.rows:
        raise RunFolderError(f"{run_a} and {run_b}: their summary.json share no figure; nothing to compare")
    panels = [
        measurement_panel(m, f"m{i}", len(pair), title=f"{'AB'[i]}: {names[i]}") for i, m in enumerate(pair)
    ]
    overlay = overlay_figure(names, pair)
    page = render_page(
        title=f"{names[0]} against {names[1]}",
        lede=f"A: {pair[0].path}. B: {pair[1].path}. Differences are B minus A.",
        comparison=_Block(
            sentences=[f"{'AB'[i]}: {s}" for i, p in enumerate(panels) for s in p.sentences[:1]],
            tables=[table],
            figures=[overlay] if overlay else [],
        ),
        measurements=panels,
        footer=_footer(pair),
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, page)
    return path


def _training_section(training: Training) -> _Block | None:
    figures = training_figures(training)
    return _Block(training_sentences(training), before_after_tables(training), figures) if figures else None


def _evaluation_section(training: Training) -> _Block | None:
    figures = evaluation_figures(training)
    return _Block(evaluation_sentences(training), evaluation_tables(training), figures) if figures else None


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
    parts = []
    if run.training.log:
        parts.append(f"{len(run.training.log)} log entries")
    steps = {step for table in run.training.evaluations.values() for step in table["step"]}
    if steps:
        parts.append(f"{len(steps)} evaluated checkpoints")
    if run.measurements:
        parts.append(f"{len(run.measurements)} measured checkpoints")
    return f"{run.path}: {', '.join(parts)}."


def _footer(measurements: Sequence[Measurement]) -> str:
    versions = {str((m.provenance or {}).get("versions", {}).get("stepscope", "")) for m in measurements} - {
        ""
    }
    made = f" {', '.join(sorted(versions))}" if versions else ""
    return f"Made by stepscope{made} from the artifacts of the run; nothing on this page was recomputed."


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _page_json(value: object) -> Markup:
    encoded = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return Markup(encoded)


def _prose(sentence: str) -> str:
    """Our own sentences with the spaces that no line may break at."""
    return sentence.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0").replace(" × ", "\u00a0×\u00a0")


def render_page(**content: Any) -> str:
    """The page of the template ``page.html.j2``, self-contained.

    Args:
        content: ``title``, ``lede``, ``footer`` and ``measurements`` (panels); optionally ``training``,
            ``checkpoints`` (a table) and ``comparison``.
    """
    environment = Environment(
        loader=PackageLoader("stepscope.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"page_json": _page_json, "prose": _prose}

    def own(name: str) -> str:
        return (_TEMPLATES / name).read_text(encoding="utf-8")

    # Style and scripts are ours and plotly's, not data of a run: they go in unescaped.
    defaults: dict[str, Any] = {
        "training": None,
        "evaluation": None,
        "checkpoints": None,
        "comparison": None,
        "glossary": yaml.safe_load(own("glossary.yaml")),
        "css": Markup(own("style.css")),
        "script": Markup(own("script.js")),
        "plotly_js": Markup(get_plotlyjs()),
    }
    return environment.get_template("page.html.j2").render({**defaults, **content})
