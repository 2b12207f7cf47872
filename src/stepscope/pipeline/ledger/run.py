"""``stepscope ledger``: settle the places one after another, then add up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from stepscope.config import LedgerConfig
from stepscope.console import say_result
from stepscope.errors import RunFolderError
from stepscope.measure.ledger.account import Batches, Looks, make_account
from stepscope.measure.ledger.slopes import group_sums
from stepscope.measure.quantity.base import Quantity
from stepscope.measure.quantity.estimators import value
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import values_at
from stepscope.pipeline.early import refuse_to_write_over
from stepscope.pipeline.inputs.tasks import hold_data
from stepscope.pipeline.ledger.kinship import kinship_artifacts, settle_kinship
from stepscope.pipeline.ledger.places import figures_file, settle, table_file
from stepscope.pipeline.ledger.shared import Accounting
from stepscope.pipeline.ledger.tables import summed, with_levels
from stepscope.pipeline.together import main_only, together
from stepscope.pipeline.tracked import track_ledger
from stepscope.policy.group import current
from stepscope.policy.passes import track
from stepscope.policy.vectors import placed
from stepscope.reading.ledger import load_ledger
from stepscope.reading.rollups import Entries, recorded_tokens
from stepscope.report import write_ledger_report
from stepscope.report.sections.ledger_kinship import headline
from stepscope.results.files import Stored
from stepscope.results.ledger import (
    FOLDS,
    LEDGER,
    PARTS,
    ROLLUPS,
    STEPS,
    TOKEN_FOLDS,
    TOKENS,
    Account,
    GroupSums,
    Ledger,
    LedgerEnds,
    LedgerFolds,
    LedgerPlace,
    LedgerSteps,
    LedgerTokenFolds,
    LedgerTokens,
)
from stepscope.results.rollups import LedgerRollups
from stepscope.rules.token_classes import WAYS
from stepscope.runs import RunFolder, locked, read_record
from stepscope.trackers import require_installed

ENDS = "ends.json"

T = TypeVar("T", LedgerTokens, LedgerFolds, LedgerSteps, LedgerTokenFolds)

HERE_ONLY = ("run", "out", "device", "batch_size", "memory", "report_to")
"""Keys of the configuration that may change between two calls on one ledger; the record has a digest."""


def run_ledger(config: LedgerConfig, *, resume: bool = False) -> Path:
    """Make the account of a recorded training; leaves the files that ``results.ledger`` describes.

    ``ledger_parts/`` beside them holds what is finished of it. Several processes that were started together
    (torchrun) make it together, and the first one keeps the files.

    Args:
        config: of what, how, and where to.
        resume: go on where an earlier call was stopped.

    Returns:
        ``ledger.json``.

    Raises:
        RunFolderError: the training was not recorded, or the folder holds another ledger.
        CheckpointError: there is no checkpoint of the training, or it is of another model.
        MeasurementError: the steps asked for are not recorded.
        ConfigError: a tracker is not installed.
    """
    out = Path(config.out or config.run)
    require_installed(config.report_to)
    with together(config.device, out):
        return _ledger(config, out, resume)


def _ledger(config: LedgerConfig, out: Path, resume: bool) -> Path:
    """:func:`run_ledger` in the group that was entered."""
    current().from_main(lambda: refuse_to_write_over(out, resume))
    work, run = Accounting(config), RunFolder(out / PARTS)
    if len(set(current().gather(work.digest))) > 1:
        raise RunFolderError(
            f"{config.run}: the processes see different records there; give all the same one"
        )
    _ = work.task
    work.hold_model()
    with main_only(lambda: locked(run.path)):
        current().from_main(lambda: _begin(work, run, resume))
        try:
            _ends(work, run)
            order = list(reversed(range(len(work.places))))
            for index in track(order, "ledger", work.budget):
                settle(work, run, index)
            settle_kinship(work, run)
        finally:
            if current().is_main:
                run.clean_up()
        quantities = [each.quantity for each in work.looked(work.at_start)]
        if not current().is_main:
            return out / LEDGER
        artifacts = _gathered(work, run, quantities)
        run.seal_beside([])
        written = [out / name for name in artifacts]
        for path, artifact in zip(written, artifacts.values(), strict=True):
            artifact.write(path)
        run.seal_beside(written)
    track_ledger(config.report_to, out, run)
    page = write_ledger_report(out)
    ledger = artifacts[LEDGER]
    assert isinstance(ledger, Ledger)
    kin = load_ledger(out).kinship
    said = [] if kin is None else headline(kin)
    say_result("ledger", [*sentences(ledger), *said], out / LEDGER, page)
    return out / LEDGER


def _begin(work: Accounting, run: RunFolder, resume: bool) -> None:
    """Make the folder of the parts, or see whether the one that is there is still of this record and task."""
    RunFolder.open(
        run.path,
        work.config.model_dump(mode="json"),
        verb="ledger",
        resume=resume,
        ignore=HERE_ONLY,
        extra={"record": work.digest},
    )
    if run.provenance()["record"] != work.digest:
        raise RunFolderError(
            f"{run.path}: the record has changed since this ledger was begun; choose another folder with "
            "--out"
        )
    hold_data(run, [work.task], work.config)


def _ends(work: Accounting, run: RunFolder) -> None:
    """The quantities before the first step and after the last, from more samples than the places have."""
    if current().from_main(lambda: run.is_done("ends")):
        return
    with main_only(lambda: run.stage("ends", [ENDS])):
        found = []
        for place in (0, len(work.path)):
            batch = work.sampled(place, end=True)
            looked = work.looked(batch)
            with placed(work.policy.parameters, work.path.parameters(place)):
                levels = []
                for each in looked:
                    values = values_at(work.policy, each.probe, [each.quantity], budget=work.budget)
                    at = probe_values(each.quantity, values.quantity(0), each.probe)
                    levels.append(group_sums(value(at), work.groups(each.probe)))
            found.append(tuple(levels))
        LedgerEnds(*found).write(run.file(ENDS))


def _gathered(work: Accounting, run: RunFolder, quantities: Sequence[Quantity]) -> dict[str, Stored]:
    """The tables of all steps, the roll-ups and the accounts, by the names of their files."""
    numbers = [work.number(index) for index in range(len(work.places))]
    places = [read_record(LedgerPlace, run.file(figures_file(number))) for number in numbers]
    ends = read_record(LedgerEnds, run.file(ENDS))
    tokens = _joined(run, numbers, "tokens", LedgerTokens)
    folds = _joined(run, numbers, "folds", LedgerFolds)
    steps = _joined(run, numbers, "steps", LedgerSteps)
    labels = work.config.quantities
    levels = {}
    for number, place in zip(numbers, places, strict=True):
        for label, figures in zip(labels, place.figures, strict=True):
            level = figures.level.estimate("", "")
            levels[number, label] = (level.value, level.stderr)
    accounts = tuple(
        _account(work, i, quantity, places, folds, (ends.before[i], ends.after[i]))
        for i, quantity in enumerate(quantities)
    )
    first = accounts[0]
    ledger = Ledger(
        first_step=work.path.start + 1,
        last_step=work.path.stop,
        every=work.config.every,
        num_prompts=work.at_start.num_prompts,
        num_folds=int(folds.fold.max()) + 1,
        quantity=first.quantity,
        predicted=first.predicted,
        realised=first.realised,
        closing_error=first.closing_error,
        momentum_before=first.momentum_before,
        decay=first.decay,
        accounts=accounts,
    )
    token_folds = _joined(run, numbers, "token_folds", LedgerTokenFolds)
    recorded = recorded_tokens(work.training.folder, ledger.first_step, ledger.last_step)
    rolled = [
        Entries.of(recorded, tokens, token_folds, folds, label).by(way) for label in labels for way in WAYS
    ]
    return {
        TOKENS: tokens,
        TOKEN_FOLDS: token_folds,
        FOLDS: folds,
        STEPS: with_levels(steps, levels),
        ROLLUPS: LedgerRollups.joined(rolled),
        **kinship_artifacts(work, run, folds),
        LEDGER: ledger,
    }


def _joined(run: RunFolder, numbers: Sequence[int], name: str, kind: type[T]) -> T:
    """A table of all steps."""
    return kind.joined([read_record(kind, run.file(table_file(number, name))) for number in numbers[:-1]])


def _account(
    work: Accounting,
    index: int,
    quantity: Quantity,
    places: list[LedgerPlace],
    folds: LedgerFolds,
    ends: tuple[GroupSums, GroupSums],
) -> Account:
    label = work.config.quantities[index]
    groups = len(ends[0].groups)
    fixed = summed(folds, label, "fixed")
    free = summed(folds, label, "optimizer")["tokens"] if "optimizer" in work.config.through else None
    return make_account(
        Looks(
            label=label,
            normalisation=quantity.normalisation,
            version=quantity.version,
            unit=quantity.unit,
            baseline="/".join(dict.fromkeys(place.baselines[index] for place in places)),
            pooled=groups < work.at_start.num_prompts,
            every=work.config.every,
        ),
        [place.figures[index] for place in places],
        Batches(fixed["shares"], fixed["tokens"], fixed["bonus"], fixed["decay"], free),
        ends,
    )


def sentences(ledger: Ledger) -> list[str]:
    """The account in words, a line for each quantity."""
    found = []
    for account in ledger.accounts:
        whole, closing = account.predicted, account.closing_error
        shares = {
            name.replace("_", " "): getattr(account, name).value / whole.value if whole.value else np.nan
            for name in ("tokens", "bonus", "momentum_before", "decay")
        }
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
        found.append(
            f"{account.quantity}, steps {ledger.first_step} to {ledger.last_step}: "
            f"{account.before.value:.4g} to {account.after.value:.4g} {account.unit}; predicted change "
            f"{whole.value:.3g} +- {whole.stderr:.2g} ({parts}), realised {account.realised.value:.3g} +- "
            f"{account.realised.stderr:.2g}; closing error {closing.value:.2g}, 95 % interval "
            f"{closing.low:.2g} to {closing.high:.2g} (on the probe's own samples "
            f"{account.curvature.value:.2g} +- {account.curvature.stderr:.2g})"
            f"{f'; in doubt: {whole.reason}' if whole.reason else ''}"
        )
    return found
