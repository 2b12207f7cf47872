"""The settings a step is rebuilt with: what the checkpoint says, and what the user adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.settings.training_args import TRAINING_ARGS_FILE
from stepscope.policy.checkpoint.settings.trl_obstacles import Obstacle
from stepscope.policy.checkpoint.settings.trl_run import TrlRun, read_trl_run
from stepscope.policy.loss.own import names_own_loss, use_own_loss
from stepscope.policy.loss.settings import SETTINGS_FILE, StepSettings
from stepscope.policy.loss.surrogate import understood

REQUIRED_SETTINGS = ("loss_type", "scale_rewards", "temperature", "max_response_tokens", "max_grad_norm")
"""What must be known to rebuild a step."""

SAMPLING_SETTINGS = ("temperature", "max_response_tokens")
"""What must be known to sample."""

ENTROPY_TERMS = frozenset({"top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"})
"""Arguments of TRL that are an objective here."""

OF_LOSS = frozenset({"loss_type", "loss_parameters", "aggregation", "kl_penalty"})
"""What says which loss it is."""


def run_settings(
    folder: Path, overrides: Mapping[str, Any] | None = None, *, for_step: bool = True
) -> StepSettings:
    """The settings of a checkpoint with the user's in their place, the rest as the checkpoint has it.

    The checkpoint's are those of ``stepscope.json``, or else those of TRL's ``training_args.bin``. Where a
    file cannot be read, the user's alone must be enough.

    Args:
        folder: the checkpoint.
        overrides: settings by name; ``without`` names obstacles that are to be left out of the step.
        for_step: whether a step is to be rebuilt; to sample, less must be known.

    Raises:
        CheckpointError: a file cannot be read and the user's settings are not enough, a setting is known from
            nowhere, or the run did what no measurement follows.
        ConfigError: the user gives a loss that is not known.
    """
    given = dict(overrides or {})
    needed = REQUIRED_SETTINGS if for_step else SAMPLING_SETTINGS
    missing = [name for name in needed if name not in given]
    if (folder / SETTINGS_FILE).is_file():
        known = vars(StepSettings.load(folder / SETTINGS_FILE))
        settings = StepSettings.from_plain(_changed(known, given), where=str(folder / SETTINGS_FILE))
        return _understood(settings, given)
    file = folder / TRAINING_ARGS_FILE
    try:
        run = read_trl_run(folder)
    except CheckpointError as error:
        if missing:
            raise CheckpointError(f"{error}: {_flags(missing)}") from error
        run = None
    known = {} if run is None else run.values
    if missing := [name for name in missing if name not in known]:
        reason = (
            f"neither {SETTINGS_FILE} nor {TRAINING_ARGS_FILE} is there to say what the loss was"
            if run is None
            else f"{TRAINING_ARGS_FILE} is not that of a GRPO run and does not say what the loss was"
        )
        raise CheckpointError(f"{folder}: {reason}; give {_flags(missing)}")
    settings = StepSettings.from_plain(_changed(known, given), where=str(file))
    _understood(settings, given)
    if run is None or not for_step:
        return settings
    return _without(settings, run, given, file)


def _understood(settings: StepSettings, given: Mapping[str, Any]) -> StepSettings:
    """The settings; a function that the user names as the loss is imported, an unknown loss refused at once.

    Raises:
        ConfigError: see :func:`understood` and :func:`use_own_loss`.
    """
    if names_own_loss(given.get("loss_type", "")):
        use_own_loss(given["loss_type"])
    if OF_LOSS.intersection(given):
        understood(settings)
    return settings


def _changed(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the user's in their place; parameters of a loss one by one, unless it is another."""
    changed = {**known, **given}
    if given.get("loss_type", known.get("loss_type")) == known.get("loss_type"):
        changed["loss_parameters"] = {**known.get("loss_parameters", {}), **given.get("loss_parameters", {})}
    elif "loss_parameters" not in given:
        changed["loss_parameters"] = {}
    return changed


def _without(settings: StepSettings, run: TrlRun, given: Mapping[str, Any], file: Path) -> StepSettings:
    """Refuse what stands against a measurement, unless the user gives that setting or says to leave it out.

    Raises:
        CheckpointError: an obstacle is left, or one is named that is not there.
    """
    named = {obstacle.name for obstacle in run.obstacles}
    if unknown := [name for name in settings.without if name not in named]:
        raise CheckpointError(
            f"{file}: loss.without names {unknown[0]}, and nothing of that name stands against a measurement "
            f"({', '.join(sorted(named)) or 'nothing does'}); take it out"
        )
    left = [o for o in run.obstacles if o.name not in (*settings.without, *given)]
    if left:
        raise CheckpointError(
            f"{file}: the run's next step cannot be measured: {'. '.join(map(_line, left))}; to measure the "
            f"step it would take without, give loss.without=[{','.join(dict.fromkeys(o.name for o in left))}]"
        )
    left_out = ENTROPY_TERMS.intersection(settings.without)
    return replace(settings, objective=None) if left_out else settings


def _line(obstacle: Obstacle) -> str:
    return f"{obstacle.name}: {obstacle.reason}"


def _flags(names: list[str]) -> str:
    return ", ".join(f"loss.{name}=..." for name in names)
