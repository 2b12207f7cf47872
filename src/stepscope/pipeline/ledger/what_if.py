"""``stepscope ledger RUN --without RULE``: the curves without some tokens, predicted and trained again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from stepscope.config import LedgerConfig, WhatIfConfig, build_config
from stepscope.config.ledger import FIXED
from stepscope.console import say, say_result
from stepscope.errors import RunFolderError
from stepscope.measure.ledger.path import PathStep
from stepscope.measure.ledger.slopes import group_sums
from stepscope.measure.ledger.without import Scores, apart, held_paths, reweighted_path
from stepscope.measure.quantity.estimators import value
from stepscope.measure.quantity.probe import probe_values
from stepscope.measure.quantity.values import values_at
from stepscope.pipeline.early import need_ledger
from stepscope.pipeline.ledger.retrain import dose_folder, folder_of, retrained, same_start
from stepscope.pipeline.ledger.shared import Accounting
from stepscope.policy.passes import track
from stepscope.policy.recorded import RecordedTraining
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts
from stepscope.policy.vectors import ParameterVector, placed
from stepscope.processes import is_main_process
from stepscope.reading.ledger import LedgerFolder
from stepscope.report import write_ledger_report
from stepscope.results import BoolArray
from stepscope.results.ledger import PARTS, GroupSums
from stepscope.results.recording import FOLDER, RECORD
from stepscope.results.what_if import (
    AGAIN,
    CURVES,
    HELD,
    RECORDED,
    RETRAINED,
    REWEIGHTED,
    SUMMARY,
    WHAT_IF,
    Outcome,
    WhatIf,
    WhatIfCurves,
    horizon,
    trusted,
)
from stepscope.rules import TokenRule, Without
from stepscope.runs import RunFolder, locked
from stepscope.stats import Estimate

ALWAYS = ("entropy", "reward")
"""Quantities that are followed whether or not the ledger has an account of them."""

MAY_CHANGE = (
    "run",
    "out",
    "doses",
    "every",
    "samples",
    "retrain",
    "state_every",
    "device",
    "batch_size",
    "memory",
)
"""All but the rule: a folder has the last what-if of its rule."""


def run_what_if(config: WhatIfConfig) -> Path:
    """Predict the curves of a recorded training without some tokens, and hold them against one without them.

    Leaves ``what_if/RULE/`` beside the ledger (``what_if.json``, ``what_if.parquet``), with
    ``retrained/RULE/dose-D/``, the run folders of trainings without the tokens: those that ``retrain`` asks
    for, or that are there from an earlier call.

    Args:
        config: of which tokens, and where.

    Returns:
        ``what_if.json``.

    Raises:
        RunFolderError: there is no finished ledger, or a training that cannot be made again.
        MeasurementError: no token of the training is of the rule.
        ConfigError: a training cannot leave these tokens out.
    """
    out = Path(config.out or config.run)
    folder = out / WHAT_IF / folder_of(config.rule)
    if not is_main_process():
        return folder / SUMMARY
    work = _Work(config, out)
    inside = work.rule.present(work.found.recorded)
    again = work.trainings()
    with locked(folder):
        plain = config.model_dump(mode="json")
        run = RunFolder.open(folder, plain, verb="what_if", resume=True, ignore=MAY_CHANGE)
        run.renew_config(plain)
        with run.stage("what_if", [SUMMARY, CURVES]):
            curves = work.curves(again)
            result = work.result(curves, inside, again)
            curves.write(folder / CURVES)
            result.write(folder / SUMMARY)
    page = write_ledger_report(out)
    say_result("ledger", sentences(result), folder / SUMMARY, page)
    return folder / SUMMARY


@dataclass
class _Work:
    """One what-if at work.

    Attributes:
        config: what was asked for.
        out: folder of the ledger.
    """

    config: WhatIfConfig
    out: Path
    _levels: dict[tuple[str, float, str, int], GroupSums] = field(default_factory=dict)

    @cached_property
    def rule(self) -> TokenRule:
        """Which tokens."""
        return TokenRule.parse(self.config.rule)

    @cached_property
    def found(self) -> LedgerFolder:
        """The ledger."""
        need_ledger(self.out, self.config.run)
        return LedgerFolder(self.out)

    @cached_property
    def work(self) -> Accounting:
        """Path, model, task and probe of the ledger, with the quantities whose curves are followed."""
        stored = build_config(LedgerConfig, RunFolder(self.out / PARTS).config())
        plain = [name for name in stored.quantities if not name.endswith(FIXED)]
        here = {name: getattr(self.config, name) for name in ("device", "batch_size", "memory")}
        made = Accounting(
            stored.model_copy(
                update={"run": self.config.run, "quantities": list(dict.fromkeys([*plain, *ALWAYS])), **here}
            )
        )
        made.hold_model()
        return made

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where the curves are looked at: the start, every so many steps, and the end."""
        count = len(self.work.path)
        return tuple(sorted({*range(0, count, self.config.every), count}))

    def number(self, place: int) -> int:
        """Number of the step that a place is after."""
        return self.work.path.start + place

    def trainings(self) -> dict[float, RecordedTraining]:
        """Those without the tokens, by dose: made where that is asked for, else those that are there."""
        run, stop, found = Path(self.config.run), self.work.path.stop, {}
        for dose in self.config.doses:
            folder = self.out / RETRAINED / folder_of(self.config.rule) / dose_folder(dose)
            if self.config.retrain:
                if self.work.path.start != 0:
                    raise RunFolderError(
                        f"{self.out}: the ledger begins after step {self.work.path.start}, and a training "
                        "again begins with the first; make a ledger from the start, or leave --retrain out"
                    )
                objective = Without(rule=str(self.rule.for_training()), dose=dose)
                say(f"training again without {self.config.rule}, dose {dose:g}: {folder}")
                retrained(run, folder, objective, stop=stop, state_every=self.config.state_every)
            elif not (folder / FOLDER / RECORD).is_file():
                continue
            training = RecordedTraining.load(folder, device=self.work.training.device)
            if training.steps[-1] >= stop:
                same_start(run, folder)
                found[dose] = training
        return found

    def chosen(self, step: PathStep, scores: Scores | None) -> Sequence[BoolArray]:
        """The rule's tokens in a step's batch, by its rows of the ledger's table."""
        table = self._tables[step.number]
        if scores is not None:
            logprob, entropy = (step.update.flat(rows) for rows in scores)
            table = table.assign(logprob=logprob, entropy=entropy, probability=np.exp(logprob))
        return step.update.rows(self.rule.inside(table))

    @cached_property
    def _tables(self) -> Mapping[int, pd.DataFrame]:
        return {int(step): own for step, own in self.found.recorded.groupby("step")}

    def curves(self, again: Mapping[float, RecordedTraining]) -> WhatIfCurves:
        """Sample every path at every place, and set them against each other."""
        rows: list[dict[str, object]] = []
        for place, paths in zip(
            track(self.places, "what if", self.work.budget), self._paths(again), strict=True
        ):
            recorded = paths[0.0, RECORDED][0]
            away = {key: apart(theta, recorded) for key, (theta, _) in paths.items()}
            was = self._level(recorded)
            levels = {k: self._level(theta) if away[k] else was for k, (theta, _) in paths.items()}
            for (dose, name), (theta, effective) in paths.items():
                other = paths.get((dose, AGAIN)) if name in (HELD, REWEIGHTED) else None
                for k, label in enumerate(self.work.config.quantities):
                    unit = self._units[label]
                    level = levels[dose, name][k]
                    from_recorded = level.plus(was[k], -1.0)
                    self._levels[label, dose, name, place] = from_recorded
                    difference = from_recorded.estimate(unit, "")
                    gap = None
                    if other is not None:
                        gap = levels[dose, AGAIN][k].plus(level, -1.0).estimate(unit, "")
                    whole = level.estimate(unit, "")
                    rows.append(
                        {
                            "quantity": label,
                            "dose": dose,
                            "path": name,
                            "step": self.number(place),
                            "level": level.value,
                            "level_stderr": whole.stderr,
                            "difference": difference.value,
                            "difference_stderr": difference.stderr,
                            "difference_low": difference.low,
                            "difference_high": difference.high,
                            "gap": np.nan if gap is None else gap.value,
                            "gap_low": np.nan if gap is None else gap.low,
                            "gap_high": np.nan if gap is None else gap.high,
                            "distance": away[dose, name],
                            "apart": np.nan if other is None else apart(other[0], theta),
                            "effective": effective,
                        }
                    )
        columns = pd.DataFrame(rows)
        return WhatIfCurves(**{name: columns[name].to_numpy() for name in columns})

    def _paths(
        self, again: Mapping[float, RecordedTraining]
    ) -> Iterator[dict[tuple[float, str], tuple[ParameterVector, float]]]:
        """Parameters of all paths at every place, by dose and name, with the effective share of the batch."""
        path, policy, budget = self.work.path, self.work.policy, self.work.budget
        start, doses = path.start_state(), self.config.doses
        held = held_paths(policy, path, start, self.chosen, doses, budget=budget)
        others = [reweighted_path(policy, path, start, self.chosen, dose, budget=budget) for dose in doses]
        now = {(dose, name): (start.parameters, 1.0) for dose in doses for name in (HELD, REWEIGHTED)}
        for place in range(len(path) + 1):
            if place:
                for dose, shifted in zip(doses, next(held), strict=True):
                    now[dose, HELD] = shifted.state.parameters, shifted.effective
                for dose, other in zip(doses, others, strict=True):
                    shifted = next(other)
                    now[dose, REWEIGHTED] = shifted.state.parameters, shifted.effective
            if place in self.places:
                real = {
                    (dose, AGAIN): (training.state(self.number(place)).parameters, 1.0)
                    for dose, training in again.items()
                }
                yield {(0.0, RECORDED): (path.parameters(place), 1.0)} | now | real

    def _level(self, theta: ParameterVector) -> list[GroupSums]:
        """The quantities at some parameters: the probe's prompts and uniform numbers, the same everywhere."""
        work, probe = self.work, self.work.config.probe
        with placed(work.policy.parameters, theta):
            batch = sample_rollouts(
                work.policy,
                work.task,
                num_prompts=probe.num_prompts,
                group_size=self.config.samples,
                seed=probe.seed,
                split=probe.split,
                options=SamplingOptions(exclude=work.asked),
                budget=work.budget,
            )
            found = []
            for each in work.looked(batch):
                values = values_at(work.policy, each.probe, [each.quantity], budget=work.budget)
                at = probe_values(each.quantity, values.quantity(0), each.probe)
                found.append(group_sums(value(at), work.groups(each.probe)))
        return found

    @cached_property
    def _units(self) -> Mapping[str, str]:
        return {each.label: each.quantity.unit for each in self.work.looked(self.work.at_start)}

    def result(
        self, curves: WhatIfCurves, inside: BoolArray, again: Mapping[float, RecordedTraining]
    ) -> WhatIf:
        """What it comes to at the last step."""
        weights = self.found.recorded.token_weight.abs()
        probe, end = self.work.config.probe, self.places[-1]
        outcomes = []
        for label in self.work.config.quantities:
            for dose in self.config.doses:

                def at_end(name: str, method: str, label: str = label, dose: float = dose) -> Estimate:
                    sums = self._levels[label, dose, name, end]
                    return sums.estimate(self._units[label], f"{method}, paired by probe prompt")

                real = curves.of(label, dose, AGAIN)
                reach = trusted(curves.of(label, dose, REWEIGHTED))
                reweighted = at_end(REWEIGHTED, "steps taken again on reweighted responses")
                if reach < self.number(end):
                    reweighted = reweighted.doubted(
                        f"after step {reach} less than half of a recorded batch speaks for the shifted policy"
                    )
                outcomes.append(
                    Outcome(
                        quantity=label,
                        unit=self._units[label],
                        dose=dose,
                        first_order=self._entries(label, dose),
                        through_optimizer=self._through_optimizer(label, inside, dose),
                        held=at_end(HELD, "steps taken again on gradients held as recorded"),
                        reweighted=reweighted,
                        trusted=reach,
                        retrained=at_end(AGAIN, "trained again") if dose in again else None,
                        horizons={
                            name: horizon(curves.of(label, dose, name), real) for name in (HELD, REWEIGHTED)
                        }
                        if dose in again
                        else {},
                    )
                )
        return WhatIf(
            rule=self.config.rule,
            first_step=self.work.path.start + 1,
            last_step=self.work.path.stop,
            tokens=int(inside.sum()),
            all_tokens=len(inside),
            weight=float(weights[inside].sum() / weights.sum()),
            num_prompts=probe.num_prompts,
            samples=self.config.samples,
            outcomes=tuple(outcomes),
        )

    def _entries(self, label: str, dose: float) -> Estimate | None:
        if label not in {account.quantity for account in self.found.ledger.accounts}:
            return None
        return self.found.without(self.config.rule, dose, label)

    def _through_optimizer(self, label: str, inside: BoolArray, dose: float) -> float:
        tokens = self.found.tokens
        own = tokens.where((tokens.quantity == label) & (tokens.through == "optimizer"))
        return float(-dose * own.influence[inside].sum()) if len(own) else float("nan")


def sentences(found: WhatIf) -> list[str]:
    """A what-if in words."""
    share = found.tokens / found.all_tokens
    lines = [
        f"without {found.rule}, {found.tokens:,} of {found.all_tokens:,} tokens ({share:.1%}, "
        f"{found.weight:.1%} of the weight), steps {found.first_step} to {found.last_step}:"
    ]
    for each in found.outcomes:
        parts = [
            f"{name} {estimate.value:+.3g} +- {estimate.stderr:.2g}"
            for name, estimate in (
                ("by entries", each.first_order),
                ("held", each.held),
                ("reweighted", each.reweighted),
                ("trained again", each.retrained),
            )
            if estimate is not None
        ]
        if each.trusted < found.last_step:
            parts.append(f"reweighted to be read to step {each.trusted}")
        ends = ", ".join(f"{name} to step {step}" for name, step in each.horizons.items())
        agrees = f"; agrees: {ends}" if ends else ""
        lines.append(f"  {each.quantity}, dose {each.dose:g}: {', '.join(parts)} {each.unit}{agrees}")
    return lines
