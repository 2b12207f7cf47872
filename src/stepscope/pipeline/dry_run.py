"""``--dry-run``: the resolved settings and what a verb would do; nothing is computed, and nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path

from stepscope.config import (
    EvalConfig,
    LedgerConfig,
    MeasureConfig,
    Section,
    Stage,
    StudyConfig,
    TrainConfig,
    WhatIfConfig,
    dump_config,
)
from stepscope.errors import RunFolderError
from stepscope.pipeline.early import (
    need_ledger,
    refuse_other_training,
    refuse_present,
    refuse_to_write_over,
    table_of,
)
from stepscope.processes import is_main_process
from stepscope.reading.recording import find_record
from stepscope.results.evaluation import companion
from stepscope.results.ledger import LEDGER, LEDGER_PAGE, PARTS
from stepscope.results.what_if import RETRAINED, WHAT_IF
from stepscope.runs import PROVENANCE, RunFolder

MOST = 12
"""Stages, checkpoints or cells that are named one by one."""

TO_DO, FINISHED = "to do", "finished"
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Dry:
    """What would be done.

    Attributes:
        stages: name, and whether it is to do or finished.
        reads: files and folders.
        writes: likewise.
        sizes: how much of what, as far as it is known without computing.
    """

    stages: Sequence[tuple[str, str]]
    reads: Sequence[str]
    writes: Sequence[str]
    sizes: Sequence[str] = ()


def run_dry(config: Section, *, resume: bool = False, minutes: float | None = None) -> None:
    """Print the resolved settings as YAML, and as comments below them what a verb would do with them.

    What is printed is a configuration file again. Refused is what the verb would refuse before it begins, as
    far as that is known without the model. Of a place that is taken a note tells, since nothing is written:
    what follows is then what the verb would do in an empty one.

    Args:
        config: of the verb.
        resume: as the verb takes it.
        minutes: of a measurement whose batches are sized for a time; None for any other.

    Raises:
        StepscopeError: as the verb.
    """
    if not is_main_process():
        return
    notes = []
    try:
        sized, dry = _sized_and_dry(config, resume, minutes, empty=False)
    except RunFolderError as error:
        sized, dry = _sized_and_dry(config, resume, minutes, empty=True)
        notes = [f"refused as things stand: {error}", "below: what would be done in an empty place"]
    print(dump_config(sized), end="")
    print("# dry run: nothing is computed or written")
    for title, lines in (
        ("note", notes),
        ("stages", _shortened([f"{name}: {state}" for name, state in dry.stages])),
        ("reads", dry.reads),
        ("writes", dry.writes),
        ("sizes", dry.sizes),
    ):
        if lines:
            print(f"# {title}")
        for line in lines:
            print(f"#   {line}")


def _sized_and_dry(
    config: Section, resume: bool, minutes: float | None, *, empty: bool
) -> tuple[Section, Dry]:
    """The settings with the batches that the verb would take, and what it would do.

    Args:
        config: of the verb.
        resume: as the verb takes it.
        minutes: that batches are sized for, or None.
        empty: as if what is written had an empty place.
    """
    if not isinstance(config, MeasureConfig) or minutes is None:
        return config, _dry(config, resume, empty)
    from stepscope.pipeline.explain import as_before, explaining

    config = explaining(config)
    before = None if empty else as_before(config, RunFolder(Path(config.out)), frozenset())
    if before is not None:
        return before, _dry(before, resume, empty)
    dry = _dry(config, resume, empty)
    fitted = f"these batches at most: a trial makes them smaller where {minutes:g} minutes do not do"
    return config, replace(dry, sizes=[*dry.sizes, fitted])


def _shortened(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - MOST
    return [*lines[:MOST], *([f"and {more} more"] if more > 0 else [])]


@singledispatch
def _dry(config: Section, resume: bool, empty: bool) -> Dry:
    raise TypeError(type(config).__name__)


@_dry.register
def _(config: MeasureConfig, resume: bool, empty: bool) -> Dry:
    from stepscope.pipeline.measure import first_look, refuse_missing, stages_of
    from stepscope.pipeline.stages import PLANS

    run, plain = RunFolder(Path(config.out)), config.model_dump(mode="json")
    wanted, due = stages_of(config)
    if empty:
        refuse_missing(run, wanted, held=False)
        reasons: Mapping[Stage, str] = dict.fromkeys(due, "not done")
    else:
        reasons = first_look(run, plain, resume, wanted, due).reasons
    again = {stage: f"again, {reasons[stage]}" for stage in reasons if reasons[stage] != "not done"}
    stages = [(s, again.get(s, TO_DO) if s in reasons else FINISHED) for s in due]
    given = [file for file in (config.update.file, config.probe.file, config.prompts) if file is not None]
    writes = dict.fromkeys(name for stage in reasons for name in PLANS[stage].writes)
    return Dry(
        stages,
        [config.checkpoint, *given],
        [f"{run.path}/", *([", ".join(writes)] if writes else [])],
        _sizes_of_measurement(config) if reasons else (),
    )


def _sizes_of_measurement(config: MeasureConfig) -> list[str]:
    from stepscope.pipeline.sizing import batches_in_words, update_file
    from stepscope.policy.checkpoint.load import read_settings

    settings = read_settings(Path(config.checkpoint), overrides=config.loss.given())
    update, longest = config.update, settings.max_response_tokens
    words = batches_in_words(config, update_file(config, settings))
    found = [f"{words}: at most {config.num_responses * longest:,} tokens of {longest} each"]
    if trained := _numbers_in(Path(config.checkpoint)):
        vector = trained * BYTES[config.precision]
        found.append(f"{trained:,} trained parameters: a direction of {_size(vector)}")
        if "kernel" in config.stages and config.projection is None:
            rows = update.num_prompts * update.group_size
            found.append(
                f"kernel: {_size(vector * rows)} of gradients, {config.memory:g} GiB of them at a time"
            )
    return found


@_dry.register
def _(config: EvalConfig, resume: bool, empty: bool) -> Dry:
    from stepscope.pipeline.evaluate import part_keys
    from stepscope.pipeline.inputs.policies import checkpoints_in
    from stepscope.policy.checkpoint.load import read_settings

    out, checkpoints = table_of(config), checkpoints_in(Path(config.source))
    if not empty:
        refuse_present(out, resume)
    parts = RunFolder(companion(out, "parts"))
    begun = not empty and parts.file(PROVENANCE).is_file()
    stages = []
    for checkpoint in checkpoints:
        own = read_settings(checkpoint, overrides=config.loss.given(), for_step=False).temperature
        for key in part_keys(config, checkpoint, own):
            stages.append((key, FINISHED if begun and parts.is_done(key) else TO_DO))
    left = sum(state == TO_DO for _, state in stages)
    each = config.num_prompts * config.samples_per_prompt
    names = [f"{parts.path}/", out, companion(out, "prompts.parquet"), out.with_suffix(".html")]
    return Dry(
        stages,
        [str(checkpoint) for checkpoint in checkpoints[:MOST]],
        list(map(str, names)),
        [f"{left} x {config.num_prompts} x {config.samples_per_prompt} = {left * each:,} responses"],
    )


@_dry.register
def _(config: TrainConfig, resume: bool, empty: bool) -> Dry:
    out, there = Path(config.out), [] if empty else [Path(config.out)]
    if not empty:
        refuse_other_training(config, resume)
    numbers = [p.name[5:] for folder in there for p in (folder / "checkpoints").glob("step-*")]
    steps = [int(number) for number in numbers if number.isdigit()]
    stages, writes, sizes = [], [], []
    if config.sft is not None:
        stages.append(("sft", FINISHED if steps or any((p / "base").is_dir() for p in there) else TO_DO))
        writes += [f"{out / 'base'}/", f"{out / 'warmup'}/"]
        sizes.append(f"sft: at most {config.sft.epochs} x {config.sft.examples} demonstrations")
    name = "rl" if config.hypo is None else "hypo"
    if (section := config.after_warm_up) is not None:
        taken, last = max(steps, default=0), section.steps
        going = f"to do, from step {taken} of {last}" if taken else TO_DO
        stages.append((name, FINISHED if taken >= last else going))
        saved = [*range(0, last, section.save_every), last]
        writes += [f"{out / 'checkpoints'}/step-N, {len(saved)} of them", f"{out / 'tensorboard'}/"]
    if (hypo := config.hypo) is not None:
        sizes.append(f"hypo: {hypo.steps} steps of {hypo.pairs_per_step} pairs")
    elif (rl := config.rl) is not None:
        if rl.record is not None:
            most = _size(rl.record.max_bytes)
            writes.append(f"{out / 'record'}/, a gradient for each step (at most {most})")
        each = rl.prompts_per_step * rl.group_size
        sizes.append(
            f"rl: {rl.steps} steps of {rl.prompts_per_step} x {rl.group_size} responses of up to "
            f"{rl.max_response_tokens} tokens: {rl.steps * each:,} responses"
        )
    return Dry(stages, [f"model {config.model.source}", f"task {config.task}"], writes, sizes)


@_dry.register
def _(config: StudyConfig, resume: bool, empty: bool) -> Dry:
    from stepscope.pipeline.study.cells import study_cells

    cells, out = study_cells(config), Path(config.out)
    stages = [(c.key, FINISHED if (out / "cells" / c.key).is_dir() else TO_DO) for c in cells]
    todo = [cell for cell, (_, state) in zip(cells, stages, strict=True) if state == TO_DO]
    return Dry(
        stages,
        list(dict.fromkeys(str(cell.checkpoint) for cell in cells))[:MOST],
        [f"{out / 'cells'}/", *(str(out / name) for name in ("study.parquet", "study.json", "study.html"))],
        [
            f"{len(todo)} of {len(cells)} measurements of {', '.join(config.stages)}, "
            f"{sum(cell.config.num_responses for cell in todo):,} responses; {config.executor} measures"
        ],
    )


@_dry.register
def _(config: LedgerConfig, resume: bool, empty: bool) -> Dry:
    from stepscope.measure.ledger.path import knots

    out, record = Path(config.out or config.run), find_record(Path(config.run))
    if not empty:
        refuse_to_write_over(out, resume)
    first, last = record.steps[0] - 1, record.steps[-1]
    start, stop = (first if config.start is None else config.start), (config.stop or last)
    places = [start + place for place in knots(stop - start, config.every)]
    done = set() if empty else _done(out / PARTS)
    stages = [(name, FINISHED if name in done else TO_DO) for name in _places(places)]
    responses = config.probe.num_prompts * (len(places) * config.probe.group_size + 2 * config.end_samples)
    return Dry(
        stages,
        [str(record.path), f"steps {start + 1} to {stop} of {record.steps[0]} to {last}"],
        [f"{out / PARTS}/", str(out / LEDGER), str(out / LEDGER_PAGE)],
        [f"{len(places)} places, {responses:,} responses to {config.probe.num_prompts} prompts"],
    )


@_dry.register
def _(config: WhatIfConfig, resume: bool, empty: bool) -> Dry:
    from stepscope.pipeline.ledger.retrain import dose_folder, folder_of

    out, record = Path(config.out or config.run), find_record(Path(config.run))
    need_ledger(out, config.run)
    rule = folder_of(config.rule)
    stages = [("what_if", TO_DO)]
    if config.retrain:
        for dose in config.doses:
            folder = out / RETRAINED / rule / dose_folder(dose)
            stages.insert(
                -1, (f"training with dose {dose:g}", FINISHED if "train" in _done(folder) else TO_DO)
            )
    return Dry(
        stages,
        [str(record.path), str(out / LEDGER)],
        [f"{out / WHAT_IF / rule}/", *([f"{out / RETRAINED / rule}/"] if config.retrain else [])],
        [f"{len(config.doses)} doses; the curves at every {config.every} steps of {len(record.steps)}"],
    )


def _places(numbers: Iterable[int]) -> list[str]:
    """Stages of a ledger, in the order they are done."""
    return ["ends", *(f"place-{number:06d}" for number in sorted(numbers, reverse=True))]


def _done(folder: Path) -> set[str]:
    """Finished stages of a run folder, where there is one."""
    run = RunFolder(folder)
    known = run.provenance()["stages"] if run.file(PROVENANCE).is_file() else {}
    return {name for name in known if run.is_done(name)}


def _numbers_in(checkpoint: Path) -> int:
    """Numbers in the trained tensors of a checkpoint in Hugging Face's layout; 0 for any other."""
    from safetensors import SafetensorError, safe_open

    files = sorted(checkpoint.glob("adapter_model*.safetensors")) or sorted(
        checkpoint.glob("model*.safetensors")
    )
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    numbers = 1
                    for length in tensors.get_slice(name).get_shape():
                        numbers *= length
                    count += numbers
        except SafetensorError:
            return 0  # the verb itself says what is wrong with it
    return count


def _size(count: float) -> str:
    """Bytes as people say them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
