"""What can be refused before torch is imported, which takes seconds: missing paths, a folder in use.

Each verb refuses the same by itself, with the rest; here it is only sooner.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path

from stepscope.config import (
    Asking,
    EvalConfig,
    LedgerConfig,
    MeasureConfig,
    Section,
    StudyConfig,
    TrainConfig,
    WhatIfConfig,
)
from stepscope.errors import BatchError, ConfigError, RunFolderError, TaskError
from stepscope.pipeline.paths import alone, need_checkpoint, need_path, need_run, need_source
from stepscope.reading.recording import find_record
from stepscope.results.evaluation import companion
from stepscope.results.ledger import LEDGER, PARTS
from stepscope.runs import RunFolder
from stepscope.tasks.load import source_of


def refuse_early(config: Section, *, resume: bool = False, dry: bool = False) -> None:
    """Refuse what a verb would refuse later, as far as the paths in its configuration show it.

    Of several processes none looks: one that alone misses a file must fail where the others notice.

    Args:
        config: of the verb.
        resume: as the verb takes it.
        dry: nothing is to be written, so that a place that is taken is no matter.

    Raises:
        StepscopeError: as the verb itself.
    """
    if alone():
        _look(config)
        if not dry:
            _refuse_taken(config, resume)


def refuse_present(out: Path, resume: bool) -> None:
    """Refuse to evaluate into a table that is there, unless its evaluation goes on."""
    if out.exists() and not resume:
        raise RunFolderError(
            f"{out}: exists already; remove it, choose another file with --out, or add --resume to evaluate "
            "only what is missing"
        )
    if out.exists() and not companion(out, "parts").is_dir():
        raise RunFolderError(f"{out}: no {companion(out, 'parts').name} beside it to go on from; remove it")


def refuse_to_write_over(out: Path, resume: bool) -> None:
    """Refuse to write over a ledger, unless it goes on."""
    if (out / LEDGER).exists() and not resume:
        raise RunFolderError(
            f"{out / LEDGER}: exists already; remove it and {PARTS}, choose another folder with --out, or "
            "add --resume to go on with it"
        )


def refuse_other_training(config: TrainConfig, resume: bool) -> None:
    """Refuse a folder that holds anything but this training, to go on with."""
    plain = config.model_dump(mode="json")
    RunFolder(Path(config.out)).holds_this_run(plain, verb="train", resume=resume, ignore=("out",))


def need_ledger(out: Path, run: str) -> None:
    """Refuse a what-if without a ledger."""
    if not (out / LEDGER).is_file():
        raise RunFolderError(
            f"{out}: no {LEDGER}, and what a rule's tokens did is read off the ledger; make it "
            f"first: stepscope ledger {run}"
        )


def table_of(config: EvalConfig) -> Path:
    """The table that an evaluation writes: ``out``, or ``eval.parquet`` in it where that is a folder.

    A folder is one that is there, or a name without a suffix.
    """
    out = Path(config.source if config.out is None else config.out)
    return out / "eval.parquet" if config.out is None or out.is_dir() or not out.suffix else out


@singledispatch
def _look(config: Section) -> None:
    """Refuse what is not there."""
    raise TypeError(type(config).__name__)


@_look.register
def _(config: MeasureConfig) -> None:
    need_checkpoint(config.checkpoint)
    if config.update.file is not None:
        need_path(
            config.update.file,
            BatchError,
            "no such file; give the dump of a training (docs/FORMATS.md, Batches)",
        )
    if config.probe.file is not None:
        need_path(config.probe.file, BatchError, "no such file; give a stored batch, or leave probe.file out")
    if config.scratch is not None:
        need_path(config.scratch, ConfigError, "scratch is no folder; make it, or leave scratch out")
    refuse_asked(config)


@_look.register
def _(config: EvalConfig) -> None:
    need_source(config.source)
    refuse_asked(config)


@_look.register
def _(config: TrainConfig) -> None:
    _task(config.task)


@_look.register
def _(config: StudyConfig) -> None:
    for source in config.checkpoints:
        need_source(source)
    refuse_asked(config.measure)


@_look.register
def _(config: LedgerConfig) -> None:
    need_run(config.run)
    find_record(Path(config.run))
    refuse_asked(config)


@_look.register
def _(config: WhatIfConfig) -> None:
    need_run(config.run)
    find_record(Path(config.run))
    need_ledger(Path(config.out or config.run), config.run)


@singledispatch
def _refuse_taken(config: Section, resume: bool) -> None:
    """Refuse a place that something else stands in; the others go on with whatever they find."""


@_refuse_taken.register
def _(config: MeasureConfig, resume: bool) -> None:
    if not resume:
        plain = config.model_dump(mode="json")
        RunFolder(Path(config.out)).holds_this_run(plain, verb="measure", resume=False)


@_refuse_taken.register
def _(config: EvalConfig, resume: bool) -> None:
    refuse_present(table_of(config), resume)


@_refuse_taken.register
def _(config: TrainConfig, resume: bool) -> None:
    refuse_other_training(config, resume)


@_refuse_taken.register
def _(config: LedgerConfig, resume: bool) -> None:
    refuse_to_write_over(Path(config.out or config.run), resume)


def refuse_asked(config: Asking) -> None:
    """Refuse prompts and tasks that are not there."""
    if config.prompts is not None:
        what = "no such file; give JSON lines, parquet or CSV with a column prompt"
        need_path(config.prompts, TaskError, what, "prompts ")
    _task(config.task)


def _task(spec: str | None) -> None:
    """Refuse a task of an unknown kind, or of a file that is not there."""
    if spec is None:
        return
    name, rest = source_of(spec)
    if rest and name in ("jsonl", "gsm8k"):
        kind = "a .jsonl file with prompt and answer" if name == "jsonl" else "the folder with train.jsonl"
        need_path(rest, TaskError, f"no such file or folder; give {kind}", f"task {name}:")
