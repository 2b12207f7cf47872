"""What a command found, in the sentences that its page begins with."""

from __future__ import annotations

from pathlib import Path

from stepscope.report.load import load_evaluation, read_change, reads_artifacts
from stepscope.report.sections import own_change
from stepscope.report.study import study_sentences
from stepscope.report.study_load import load_study
from stepscope.report.training import training_sentences


@reads_artifacts
def measured(folder: Path) -> list[str]:
    """The change of a measurement at its own learning rate; nothing before the stage ``change``."""
    series = read_change(folder / "change.json")
    return [] if series is None else [own_change(series)]


@reads_artifacts
def evaluated(table: Path) -> list[str]:
    """pass@k and entropy of the evaluated checkpoints, by way of sampling."""
    return training_sentences(load_evaluation(table))


@reads_artifacts
def studied(folder: Path) -> list[str]:
    """Slopes and changes of a study, by setting."""
    study = load_study(folder)
    return [line for setting in study.distinct("setting") for line in study_sentences(study, setting)]
