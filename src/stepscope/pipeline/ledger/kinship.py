"""Kinship of a ledger: the steps that are looked at, one after another from the last, then the account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from stepscope.measure.influence.probe_gradient import (
    ProbeGradient,
    fitting_groups,
    probe_gradient,
    prompt_groups,
)
from stepscope.measure.ledger.kin_account import kin_account, kin_rows, looked_at
from stepscope.measure.ledger.kinship import KinOptions, kin_step, pushes, split_by_kin
from stepscope.measure.ledger.path import displacement
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.pipeline.ledger.shared import MAX_GROUPS, Accounting
from stepscope.pipeline.together import main_only
from stepscope.policy.group import current
from stepscope.policy.passes import track
from stepscope.policy.rollouts import sample_responses
from stepscope.policy.vectors import ParameterVector, placed
from stepscope.results import FloatArray
from stepscope.results.files import Stored
from stepscope.results.kinship import BATCH, FRESH, KIN_ROWS, KINSHIP, OWN_STEP, WHOLE, KinStep
from stepscope.results.ledger import LedgerFolds, fold_sums
from stepscope.runs import RunFolder, read_record

FRESH_SEED = 2**31
"""Added to a step's number for fresh responses to its prompts."""

ENTROPY = "entropy"


def kin_file(number: int) -> str:
    """Name of the file with the kinship of a step."""
    return f"kinship-{number:06d}.json"


def _chosen(work: Accounting) -> dict[int, int]:
    """Place of each step that is looked at, to the number of steps that it stands for."""
    asked = work.config.kinship
    return {} if asked is None else dict(looked_at(len(work.path), asked.every))


def settle_kinship(work: Accounting, run: RunFolder) -> None:
    """Look at the steps, from the last: what a step's push does later is handed on from the steps after it.

    Nothing, where kinship was not asked for.
    """
    chosen = _chosen(work)
    numbers = {place: work.path.start + place + 1 for place in chosen}
    left = current().from_main(
        lambda: [place for place, number in numbers.items() if not run.is_done(f"kinship-{number:06d}")]
    )
    if not left:
        return
    going = pushes(work.path, min(left))
    for _ in track(range(len(work.path) - min(left)), "kinship", work.budget):
        place, own, whole = next(going)
        if place not in left:
            continue
        number = numbers[place]
        with main_only(partial(run.stage, f"kinship-{number:06d}", [kin_file(number)])):
            found = _step(work, place, {WHOLE: whole, OWN_STEP: own})
            found.write(run.file(kin_file(number)))


def _step(work: Accounting, place: int, metrics: Mapping[str, ParameterVector]) -> KinStep:
    path, policy = work.path, work.policy
    step, asked = path.step(place), work.config.kinship
    assert asked is not None
    with placed(policy.parameters, path.parameters(place)):
        fresh = sample_responses(
            policy, step.update.prompt_token_ids, seed=FRESH_SEED + step.number, budget=work.budget
        )
        split = split_by_kin(
            policy,
            step,
            {BATCH: step.update, FRESH: fresh},
            metrics,
            held_out=_held_out(work, place, displacement(path, place)),
            options=KinOptions(tokens=asked.tokens, seed=step.number),
            budget=work.budget,
        )
    return kin_step(split, step.update, step.number)


def _held_out(
    work: Accounting, place: int, direction: ParameterVector
) -> tuple[ProbeGradient, ProbeGradient]:
    """The entropy's gradient on the probe of a place, at fixed prefixes and on policy, in the same groups."""
    policy, probe = work.policy, work.sampled(place)
    budget = replace(work.budget, memory_bytes=work.budget.memory_bytes // 4)
    groups = prompt_groups(probe.prompt_index, min(MAX_GROUPS, fitting_groups(policy, budget)))
    found = []
    for version in ("fixed_prefix", "on_policy"):
        quantity = make_quantity(ENTROPY, probe, policy=policy, version=version)
        bound = bind_quantity(
            policy, probe, quantity, direction=direction, baseline=work.config.baseline, budget=work.budget
        )
        found.append(probe_gradient(policy, probe, bound, groups=groups, budget=work.budget))
    return found[0], found[1]


def kinship_artifacts(work: Accounting, run: RunFolder, folds: LedgerFolds) -> dict[str, Stored]:
    """The account of kinship and its table, by the names of their files; none where it was not asked for.

    Args:
        work: the account.
        run: the folder of its parts.
        folds: of the ledger.
    """
    chosen, asked = _chosen(work), work.config.kinship
    if asked is None:
        return {}
    found = [read_record(KinStep, run.file(kin_file(work.path.start + place + 1))) for place in chosen]
    own = folds.where((folds.quantity == ENTROPY) & (folds.through == "fixed"))
    weights = {step.number: weight for step, weight in zip(found, chosen.values(), strict=True)}
    stands = np.array([weights.get(number, 0) for number in own.step.tolist()])
    by_fold: FloatArray = np.zeros(int(own.fold.max()) + 1)
    np.add.at(by_fold, own.fold, stands * own.tokens)
    kept = fold_sums(own.share[: len(by_fold)], by_fold)
    account = kin_account(
        found,
        list(chosen.values()),
        first_step=work.path.start + 1,
        last_step=work.path.stop,
        every=asked.every,
        num_probe_prompts=work.at_start.num_prompts,
        ledger_tokens=kept.estimate("nats/token", f"entries of the ledger, from {len(by_fold)} folds"),
    )
    return {KINSHIP: account, KIN_ROWS: kin_rows(found, list(chosen.values()))}
