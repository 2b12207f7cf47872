"""Kinship over the steps of a training: sums, shares and how far tabular theory goes, with intervals.

A step that was looked at stands for its neighbours, with weight q_s. The figure of a kin is X = sum_s q_s
X_s, and its error is over the training's prompts g as a sample, by what each takes part in (the projection of
a sum over pairs, Hoeffding 1948; for pairs of clusters Fafchamps & Gubert 2007),

    r_g = sum_s q_s (done by its tokens + received at its positions from others - X_s N_gs/N_s), less the mean

with N_gs of the N_s positions in answers to g, since X_s is a mean over positions that come with the prompts;
so that the draw of tokens is in it; with the error over held-out prompts added to the variance. A share X/T
has the errors of (r_X - X/T r_T)/T (delta method). Correlations are about 0, with the jackknife over training
prompts (tokens) or steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stepscope.measure.ledger.kin_sums import KinSteps, about_zero
from stepscope.results.kinship import (
    FORMULAS,
    HELD_OUT,
    OWN_STEP,
    WHOLE,
    KinRows,
    KinShare,
    Kinship,
    KinStep,
    KinTheory,
    KinTotal,
)
from stepscope.stats import Estimate

ALL, EARLY, LATE = "all", "first third", "last third"

UNIT = "nats/token"

FEWEST_STEPS = 3
"""Steps in a third below which nothing is said of it."""


def looked_at(count: int, every: int) -> list[tuple[int, int]]:
    """Steps that are looked at, and how many each stands for: the middle of every ``every`` in turn."""
    starts = range(0, count, every)
    windows = [(start, min(start + every, count)) for start in starts]
    return [((start + stop - 1) // 2, stop - start) for start, stop in windows]


def kin_account(
    steps: Sequence[KinStep],
    weights: Sequence[int],
    *,
    first_step: int,
    last_step: int,
    every: int,
    num_probe_prompts: int,
    ledger_tokens: Estimate,
) -> Kinship:
    """Add up the steps.

    Args:
        steps: those that were looked at.
        weights: how many steps each stands for.
        first_step: number of the first step in the account.
        last_step: of the last.
        every: one in so many was looked at.
        num_probe_prompts: held out.
        ledger_tokens: what the ledger's entries of the same tokens add up to, with the same weights.
    """
    stand = np.asarray(weights, dtype=np.float64)
    numbers = np.array([step.number for step in steps], dtype=np.int64)
    place = (numbers - first_step) / (last_step - first_step + 1)
    windows = {ALL: np.full(len(steps), True), EARLY: place < 1 / 3, LATE: place >= 2 / 3}
    shares: list[KinShare] = []
    totals: list[KinTotal] = []
    for name, chosen in windows.items():
        if name != ALL and chosen.sum() < FEWEST_STEPS:
            continue
        some = [step for step, own in zip(steps, chosen, strict=True) if own]
        more = _window(name, KinSteps.of(some, stand[chosen]))
        shares, totals = shares + more[0], totals + more[1]
    everything = KinSteps.of(steps, stand)
    return Kinship(
        first_step=first_step,
        last_step=last_step,
        every=every,
        steps=numbers,
        num_prompts=everything.num_prompts,
        num_probe_prompts=num_probe_prompts,
        tokens=sum(step.tokens for step in steps),
        drawn=sum(step.drawn for step in steps),
        shares=tuple(shares),
        totals=tuple(totals),
        theory=tuple(_theory(name, everything) for name in FORMULAS),
        ledger_tokens=ledger_tokens,
    )


def _window(name: str, chosen: KinSteps) -> tuple[list[KinShare], list[KinTotal]]:
    looks = list(dict.fromkeys(part.look for part in chosen.steps[0].parts))
    along = f"first order from where each of {len(chosen.steps)} steps starts"
    whole, own = f"{along}, over the rest of the path", f"{along}, own step"
    held_out = chosen.total(HELD_OUT, WHOLE)
    shares, totals = [], []
    for look in looks:
        everything = chosen.total(look, WHOLE)
        totals.append(
            KinTotal(
                steps=name,
                look=look,
                influence=everything.estimate(UNIT, whole),
                own_step=chosen.total(look, OWN_STEP).estimate(UNIT, own),
            )
        )
        for kin in chosen.kins(look):
            figure = chosen.figure(look, kin, WHOLE)
            shares.append(
                KinShare(
                    steps=name,
                    look=look,
                    kin=kin,
                    influence=figure.estimate(UNIT, whole),
                    own_step=chosen.figure(look, kin, OWN_STEP).estimate(UNIT, own),
                    share=figure.over(everything).estimate("", f"of the whole look, {whole}"),
                    against_held_out=figure.over(held_out).estimate(
                        "", f"over all on held-out prompts, {whole}"
                    ),
                    draw_stderr=math.sqrt(figure.draw),
                    pairs=sum(step.pairs[look].get(kin, 0) for step in chosen.steps),
                )
            )
    return shares, totals


def _theory(name: str, chosen: KinSteps) -> KinTheory:
    """The correlations of a formula."""
    said = np.array([float(f.sums.sum()) for step in chosen.steps for f in step.formulas if f.name == name])
    at_steps = {}
    for look in dict.fromkeys(part.look for part in chosen.steps[0].parts):
        moved = np.array(
            [
                sum(float(step.part(look, kin, WHOLE).done.sum()) for kin in chosen.kins(look))
                for step in chosen.steps
            ]
        )
        at_steps[look] = about_zero(said * moved, said**2, moved**2, f"over steps, {look}")
    return KinTheory(name, chosen.at_tokens(name), at_steps)


def kin_rows(steps: Sequence[KinStep], weights: Sequence[int]) -> KinRows:
    """The table of all steps that were looked at."""
    tables = []
    for step, weight in zip(steps, weights, strict=True):
        count = len(step.prompts)
        for part in step.parts:
            if part.through != WHOLE:
                continue
            tables.append(
                KinRows(
                    step=np.full(count, step.number, dtype=np.int64),
                    stands_for=np.full(count, weight, dtype=np.int64),
                    prompt=np.array(step.prompts, dtype=np.object_),
                    sequence_id=step.sequence_ids,
                    look=np.full(count, part.look, dtype=np.object_),
                    kin=np.full(count, part.kin, dtype=np.object_),
                    influence=part.done,
                    own_step=step.part(part.look, part.kin, OWN_STEP).done,
                    received=part.received,
                )
            )
    return KinRows.joined(tables)
