"""The page of a study, from ``study.parquet`` and ``study.json`` and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepscope import runs
from stepscope.report import text
from stepscope.report.load import reads_artifacts
from stepscope.report.page import render_page
from stepscope.report.sections import Panel, Section
from stepscope.report.study_figures import difference_figure, line_figure
from stepscope.report.study_leaderboard import standings_figures, standings_sentence, study_board
from stepscope.report.study_load import STUDY_FIGURES, STUDY_TABLE, Study, agrees, at_own_lr, load_study
from stepscope.report.study_tables import cells_table, changes_table, lines_table


@reads_artifacts
def write_study_report(folder: Path) -> Path:
    """Write ``study.html`` into a study folder.

    Args:
        folder: left by ``stepscope study``.

    Returns:
        The path of the page. It is replaced in one piece if it was there.

    Raises:
        RunFolderError: the folder holds no finished study, or a file of it is damaged.
    """
    study = load_study(Path(folder))
    settings = study.distinct("setting")
    page = render_page(
        title=f"Study {study.path.resolve().name}",
        lede=_lede(study),
        checkpoints=cells_table(study),
        measurements=[_panel(study, setting, f"m{i}") for i, setting in enumerate(settings)],
        footer=f"Made by stepscope from {STUDY_TABLE} and {STUDY_FIGURES}; nothing here was recomputed.",
    )
    path = study.path / "study.html"
    runs.write_text(path, page)
    return path


def _lede(study: Study) -> str:
    cells = {(row["checkpoint"], row["setting"], row["repeat"]) for row in study.rows}
    repeats = len(study.distinct("repeat"))
    counts = [_counted(len(study.distinct(name)), name) for name in ("checkpoint", "setting", "repeat")]
    spread = f" The spread over repeats is {study.spread}." if repeats > 1 else ""
    return f"{study.path}: {_counted(len(cells), 'measurement')} ({', '.join(counts)}).{spread}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _panel(study: Study, setting: str, key: str) -> Panel:
    """All figures and tables of one setting; the first series is shown, the others unfold."""
    series = study.series(setting)
    lines, boxes = [], []
    for number, names in enumerate(series):
        own = [row for row in study.lines if agrees(row, names)]
        points = [row for row in study.changes if agrees(row, names)]
        each = [row for row in study.rows if agrees(row, names)]
        lines.append(line_figure(own, points, study.labels, study.spread, f"line-{number}"))
        boxes.append(difference_figure(each, study.labels, study.spread, f"difference-{number}"))
    return Panel(
        key=key,
        title=f"Setting {setting}",
        sentences=study_sentences(study, setting),
        sections=[
            Section(
                "change",
                "Change against learning rate",
                figures=lines[:1],
                tables=[lines_table(study, setting)],
                more_title=_more_title(lines),
                more_figures=lines[1:],
            ),
            Section(
                "difference",
                "How far first order is off",
                figures=boxes[:1],
                more_title=_more_title(boxes) or "Numbers",
                more_figures=boxes[1:],
                more_tables=[changes_table(study, setting)],
            ),
            *_criteria_sections(study, setting),
        ],
    )


def _criteria_sections(study: Study, setting: str) -> list[Section]:
    """The leaderboard where the measurements have one; the primary truth is drawn, the others unfold."""
    board = study_board(study, setting)
    if board is None:
        return []
    figures = standings_figures(study, setting)
    return [
        Section(
            "criteria",
            "Which cheap criteria find the tokens",
            intro=standings_sentence(study, setting),
            figures=figures[:1],
            board=board,
            more_title="Other truths" if len(figures) > 1 else "",
            more_figures=figures[1:],
        )
    ]


def _more_title(figures: Sequence[object]) -> str:
    return "Other normalisations, versions and quantities" if len(figures) > 1 else ""


def study_sentences(study: Study, setting: str) -> list[str]:
    """Slopes and R^2 over all checkpoints; first order against truth at the own learning rate."""
    names = study.series(setting)[0]
    sentences = []
    fits = [
        row["fit"]
        for row in study.fits
        if agrees(row, names) and row["fit"] is not None and row["fit"]["slope"] is not None
    ]
    if fits:
        slopes = [fit["slope"] for fit in fits]
        r2 = [fit["r2"] for fit in fits if fit["r2"] is not None]
        least = f", R² at least {text.number(min(r2), 6)}" if r2 else ""
        sentences.append(
            f"Slope of log |true change| on log learning rate: {text.number(min(slopes), 5)} to "
            f"{text.number(max(slopes), 5)} over {_counted(len(fits), 'measurement')} (1 = linear){least}."
        )
    for row in study.changes:
        spread = row["relative_difference"]
        if not agrees(row, names) or not at_own_lr(row) or not spread["n"]:
            continue
        quartiles = f"{text.percent(spread['q25'])} to {text.percent(spread['q75'])}"
        around = f" (quartiles {quartiles} of {spread['n']} repeats)" if spread["n"] > 1 else ""
        sentences.append(
            f"{study.labels[row['checkpoint']]} at its own learning rate {text.lr_text(row['lr'])}: true "
            f"change {text.estimate(row['true'])}; first order is off by {text.percent(spread['median'])}"
            f"{around}."
        )
    return sentences[:6]
