"""The places of an account, from the end of the path to its start, each with the steps behind it.

A place leaves files of its own in the folder of the parts, and the *carry*: its gradients, and the
derivatives with respect to the moments at it, which is all that the places before it need. A call that was
stopped goes on from the last carry and leaves the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from stepscope.measure.ledger.account import ALL, EARLIER, LATER
from stepscope.measure.ledger.adjoint import Adjoint
from stepscope.measure.ledger.entries import step_entries
from stepscope.measure.ledger.path import displacement_parts, parts_along
from stepscope.measure.ledger.slopes import place_figures, place_slopes
from stepscope.pipeline.ledger.shared import Accounting
from stepscope.pipeline.ledger.tables import fold_rows, step_rows, token_fold_rows, token_rows
from stepscope.pipeline.together import main_only
from stepscope.policy import vectors
from stepscope.policy.group import current
from stepscope.policy.vectors import ParameterVector, placed
from stepscope.results import FloatArray
from stepscope.results.ledger import (
    LedgerFolds,
    LedgerPlace,
    LedgerSteps,
    LedgerTokenFolds,
    LedgerTokens,
)
from stepscope.runs import RunFolder

BEHIND: Mapping[str, type[LedgerTokens | LedgerFolds | LedgerSteps | LedgerTokenFolds]] = {
    "tokens": LedgerTokens,
    "folds": LedgerFolds,
    "steps": LedgerSteps,
    "token_folds": LedgerTokenFolds,
}
"""Tables of the steps behind a place."""

ROWS = "rows"


def figures_file(number: int) -> str:
    """Name of the file with the figures of the place after a step."""
    return f"{number:06d}.json"


def table_file(number: int, name: str) -> str:
    """Name of a table of the steps behind the place after a step."""
    return f"{number:06d}_{name}.parquet"


def settle(work: Accounting, run: RunFolder, index: int) -> None:
    """Take the gradients at a place, and the entries of the steps between it and the place behind it."""
    number, last = work.number(index), index == len(work.places) - 1
    stage = f"place-{number:06d}"
    behind = None if last else _carry_file(run, work.number(index + 1))
    files = [figures_file(number), *([] if last else [table_file(number, name) for name in BEHIND])]
    if not current().from_main(lambda: run.is_done(stage)):
        with main_only(lambda: run.stage(stage, files)):
            _settle(work, run, index, behind)
    if behind is not None and current().is_main:
        behind.unlink(missing_ok=True)


def _carry_file(run: RunFolder, number: int) -> Path:
    return run.file(f"carry-{number:06d}.safetensors")


def _settle(work: Accounting, run: RunFolder, index: int, behind: Path | None) -> None:
    path, place, policy, number = work.path, work.places[index], work.policy, work.number(index)
    theta = path.parameters(place)
    neighbours: dict[str, ParameterVector] = {}
    if index > 0:
        neighbours[EARLIER] = path.parameters(work.places[index - 1])
    if behind is not None:
        neighbours[LATER] = path.parameters(work.places[index + 1])
    near = next(iter(neighbours.values()))
    probe = work.at_start if index == 0 else work.sampled(place)
    looked = work.looked(probe)
    chosen = [{j: float(w) for j, w in enumerate(rows[index]) if w} for rows in work.weights.values()]
    sums = dict(zip(work.weights, parts_along(path, chosen), strict=True))
    with placed(policy.parameters, theta):
        slopes = place_slopes(
            policy,
            looked,
            groups=work.groups(probe),
            num_folds=work.config.num_folds,
            baseline=work.config.baseline,
            direction={name: near[name] - theta[name] for name in theta},
            budget=work.budget,
        )
        figures = place_figures(policy, slopes, looked, sums, neighbours, budget=work.budget)
    after: dict[str, Adjoint] = {through: Adjoint() for through in work.config.through}
    if behind is not None:
        rows, after = _read_carry(behind, work.config.through, policy.device)
        tables = _steps_behind(work, index, slopes.rows, rows, slopes.shares, after)
        for name, table in zip(BEHIND, tables, strict=True):
            table.write(run.file(table_file(number, name)))
    _write_carry(_carry_file(run, number), slopes.rows, after)
    baselines = tuple(slope.probe.baseline.kind for slope in slopes.parts)
    LedgerPlace(figures, baselines).write(run.file(figures_file(number)))


def _steps_behind(
    work: Accounting,
    index: int,
    rows: Mapping[str, Tensor],
    rows_behind: Mapping[str, Tensor],
    shares: FloatArray,
    after: dict[str, Adjoint],
) -> tuple[LedgerTokens, LedgerFolds, LedgerSteps, LedgerTokenFolds]:
    """The steps from a place to the one behind it, taken from the last; ``after`` goes along."""
    path, labels, weights = work.path, work.config.quantities, work.weights[ALL]
    before = path.first_moment()
    tokens: list[LedgerTokens] = []
    folds: list[LedgerFolds] = []
    steps: list[LedgerSteps] = []
    token_folds: list[LedgerTokenFolds] = []
    for j in reversed(range(work.places[index], work.places[index + 1])):
        here, there = float(weights[index, j]), float(weights[index + 1, j])
        gains = {name: here * rows[name] + there * rows_behind[name] for name in rows}
        moved = displacement_parts(path, j, before)
        for through in work.config.through:
            entries, after[through] = step_entries(
                work.policy,
                path,
                j,
                gains,
                after[through],
                shares=shares,
                through=through,
                budget=work.budget,
            )
            tokens.append(token_rows(entries, labels, shares))
            folds.append(fold_rows(entries, labels, shares))
            if through == "fixed":
                own = {name: shares @ vectors.stack_dots(gains, v) for name, v in moved.items()}
                steps.append(step_rows(entries, labels, shares, own))
                token_folds.append(token_fold_rows(entries, labels, shares))
    return (
        LedgerTokens.joined(tokens[::-1]),
        LedgerFolds.joined(folds[::-1]),
        LedgerSteps.joined(steps[::-1]),
        LedgerTokenFolds.joined(token_folds[::-1]),
    )


def _write_carry(path: Path, rows: Mapping[str, Tensor], after: Mapping[str, Adjoint]) -> None:
    found = {f"{ROWS}/{name}": tensor for name, tensor in rows.items()}
    for through, adjoint in after.items():
        for field in fields(adjoint):
            found |= {f"{through}.{field.name}/{n}": t for n, t in getattr(adjoint, field.name).items()}
    vectors.save(found, path)


def _read_carry(
    path: Path, throughs: Sequence[str], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Adjoint]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in current().from_main(lambda: vectors.load(path)).items():
        kind, _, own = name.partition("/")
        parts.setdefault(kind, {})[own] = tensor.to(device)
    after = {
        through: Adjoint(*(parts.get(f"{through}.{field.name}", {}) for field in fields(Adjoint)))
        for through in throughs
    }
    return parts[ROWS], after
