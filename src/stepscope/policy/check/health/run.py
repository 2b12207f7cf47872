"""Is a run healthy? All of its checkpoints, in order, and the log of the last."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError
from stepscope.policy.check.findings import Finding
from stepscope.policy.check.health.agreement import (
    length_findings,
    log_agreement,
    rate_findings,
    settings_findings,
)
from stepscope.policy.check.health.log import log_findings
from stepscope.policy.check.health.moments import (
    Moments,
    first_finding,
    pair_findings,
    read_moments,
    state_finding,
)
from stepscope.policy.checkpoint.formats.registry import checkpoints_in, format_of, step_in_name
from stepscope.policy.checkpoint.load import read_settings, refuse_altered
from stepscope.policy.checkpoint.trainer_log import TRAINER_STATE, read_log
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget, track


@dataclass(frozen=True)
class _Looked:
    """One checkpoint, as far as it could be read.

    Attributes:
        folder: where it is.
        step: the trainer's, or that of its name.
        moments: the optimizer's state; None where it has none, or it cannot be read.
        settings: of its loss; None where they cannot be read.
        log: the trainer's; None where there is none.
        findings: on it alone: its state, or why a part cannot be read.
        misfit: why no step can be measured; "" where one can.
        unknown: why settings cannot be read; "" where they can.
    """

    folder: Path
    step: int
    moments: Moments | None = None
    settings: StepSettings | None = None
    log: tuple[dict[str, Any], ...] | None = None
    findings: tuple[Finding, ...] = ()
    misfit: str = ""
    unknown: str = ""


def is_run(path: Path) -> bool:
    """Whether a folder has checkpoints inside and is none with an optimizer's state itself.

    A final model that was saved beside its checkpoints leaves the folder a run.
    """
    return bool(checkpoints_in(path)) and "optimizer" not in format_of(path, "optimizer").holds(path)


def examine_run(
    run: Path, *, overrides: Mapping[str, Any] | None = None, progress: bool = False
) -> list[Finding]:
    """Findings about a run's moments, settings and log; the last names the checkpoint to measure.

    States are read one at a time, and only their norms are kept.

    Args:
        run: folder with checkpoints inside.
        overrides: loss settings that are changed, by name.
        progress: show a progress bar.
    """
    folders = checkpoints_in(run)
    bar = track(folders, "reading optimizer states", Budget(progress=progress))
    looked = sorted((_look(folder, overrides) for folder in bar), key=lambda seen: seen.step)
    findings: list[Finding] = []
    before: _Looked | None = None
    for seen in looked:
        name = seen.folder.name
        findings += seen.findings
        if seen.moments is None:
            continue
        if before is None:
            findings += first_finding(name, seen.step, seen.moments)
        else:
            assert before.moments is not None
            names, steps = (before.folder.name, name), (before.step, seen.step)
            findings += pair_findings(names, steps, (before.moments, seen.moments))
        before = seen
    return [*findings, *_settings(looked), *_log(looked), _latest(looked)]


def _look(folder: Path, overrides: Mapping[str, Any] | None) -> _Looked:
    found: list[Finding] = []
    step = step_in_name(folder) or 0
    moments = settings = log = None
    misfit, unknown, read = "", "", False
    try:
        said = format_of(folder, "weights").steps(folder)
        if said is not None and said != step:
            what = f"{folder}: its name says step {step}, and {TRAINER_STATE} {said}"
            found.append(Finding("warn", what, "make sure that its files belong together"))
            step = said
        log = read_log(folder)
    except CheckpointError as error:
        found.append(Finding.from_error(error))
        misfit = str(error)
    try:
        refuse_altered(folder)
        moments, read = read_moments(folder), True
        misfit = misfit or ("" if moments else "no optimizer's state")
    except CheckpointError as error:
        found.append(Finding.from_error(error))
        misfit = str(error)
    try:
        settings = read_settings(folder, overrides=overrides, for_step=False)
        read_settings(folder, overrides=overrides)
    except CheckpointError as error:
        misfit = misfit or str(error)
        unknown = "" if settings else str(error)
    if read:
        state = state_finding(folder.name, step, moments)
        misfit = misfit or (state.what if state.level == "fail" else "")
        found.append(state)
    return _Looked(folder, step, moments, settings, log, tuple(found), misfit, unknown)


def _settings(looked: list[_Looked]) -> list[Finding]:
    found = settings_findings([(s.folder.name, s.settings) for s in looked if s.settings is not None])
    if unread := [seen for seen in looked if seen.unknown]:
        what, _, cure = unread[-1].unknown.rpartition("; ")
        names = ", ".join(seen.folder.name for seen in unread)
        found.append(Finding("warn", f"loss settings of {names} are not known: {what}", cure))
    return found


def _log(looked: list[_Looked]) -> list[Finding]:
    logs = [(seen.folder.name, seen.log) for seen in looked if seen.log is not None]
    if not logs:
        what = f"no checkpoint has a {TRAINER_STATE} that can be read, so nothing of the log is looked at"
        return [Finding("warn", what, "copy it if there is one")]
    last = logs[-1][1]
    rates = [
        (seen.folder.name, seen.step, seen.moments.rates[0])
        for seen in looked
        if seen.moments is not None and seen.moments.rates
    ]
    known = [seen.settings for seen in looked if seen.settings is not None]
    lengths = length_findings(known[-1], last) if known else []
    return [*log_agreement(logs), *rate_findings(rates, last), *lengths, *log_findings(last)]


def _latest(looked: list[_Looked]) -> Finding:
    """The last checkpoint against whose measurement nothing stands that can be seen without its model."""
    fit = next((seen for seen in reversed(looked) if not seen.misfit), None)
    if fit is None:
        reason = looked[-1].misfit
        return Finding("fail", f"no checkpoint can be measured; of the latest, {reason}", "see above")
    later = [seen for seen in looked if seen.step > fit.step]
    skipped = f" ({len(later)} later: {later[-1].misfit})" if later else ""
    task = "" if fit.settings and fit.settings.task else " --task TASK"
    command = f"stepscope measure {shlex.quote(str(fit.folder))}{task} --out DIR"
    return Finding("ok", f"the latest that can be measured is {fit.folder.name}{skipped}", command)
