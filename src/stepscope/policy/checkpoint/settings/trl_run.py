"""What the arguments of a TRL run say about its next step: GRPO's, RLOO's, DPO's and CPO's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError, ConfigError
from stepscope.policy.checkpoint.settings.training_args import TRAINING_ARGS_FILE, read_training_args
from stepscope.policy.checkpoint.settings.trl_arguments import TrlArguments
from stepscope.policy.checkpoint.settings.trl_obstacles import (
    Obstacle,
    common_obstacles,
    grpo_obstacles,
    notes,
    online_obstacles,
    preference_obstacles,
    rloo_obstacles,
    trainer_obstacles,
)
from stepscope.policy.checkpoint.trainer_log import read_log
from stepscope.policy.loss.registry import LOSSES, known_loss

CONTROLLER_FILE = "entropy_ctrl_state.json"
"""What TRL keeps of an entropy bonus that adapts."""

_REWARD = re.compile(r"rewards/.+/mean")


@dataclass(frozen=True)
class TrlRun:
    """What is known of a run from its arguments.

    Attributes:
        values: settings by their name in :class:`~stepscope.policy.loss.settings.StepSettings`.
        obstacles: what stands against measuring its next step.
        notes: what a user should know and that stands against nothing.
    """

    values: dict[str, Any]
    obstacles: tuple[Obstacle, ...] = ()
    notes: tuple[str, ...] = ()


def read_trl_run(folder: Path) -> TrlRun | None:
    """What ``training_args.bin`` of a checkpoint says; None where there is none.

    The arguments decide by their fields: those of GRPO, RLOO, DPO and CPO, subclasses among them, give the
    settings, those of other trainers only what all trainers share.

    Raises:
        CheckpointError: the file cannot be read safely, or holds values of the wrong type.
    """
    path = folder / TRAINING_ARGS_FILE
    if not path.is_file():
        return None
    args = TrlArguments(read_training_args(path), path)
    shared = {
        "max_grad_norm": args.values.get("max_grad_norm") or 0.0,
        "seed": args.values.get("seed", 0),
        "disable_dropout": args.values.get("disable_dropout", False),
    }
    reader = next((read for fields, read in _READERS if fields <= set(args.values)), None)
    if reader is None:
        return TrlRun(shared)
    trainer, values, obstacles = reader(args, folder)
    return TrlRun(
        values=shared | values,
        obstacles=(*trainer_obstacles(args, trainer, folder), *obstacles, *common_obstacles(args)),
        notes=tuple(notes(args, trainer)),
    )


def run_notes(folder: Path) -> tuple[str, ...]:
    """What a user should know of the run of a checkpoint; nothing where its arguments cannot be read."""
    try:
        run = read_trl_run(folder)
    except CheckpointError:
        return (f"{TRAINING_ARGS_FILE} cannot be read; the settings are the given ones alone",)
    return () if run is None else run.notes


_Read = tuple[str, dict[str, Any], tuple[Obstacle, ...]]


def _online(args: TrlArguments) -> dict[str, Any]:
    """What trainers that sample their batches share."""
    group_size = args.count("num_generations", 1)
    low = args("epsilon", 0.2)
    return {
        "group_size": group_size,
        "prompts_per_step": max(1, args.micro_batch * args.accumulation // group_size),
        "temperature": args("temperature", 1.0),
        "max_response_tokens": args("max_completion_length", 0),
        "max_prompt_tokens": args.values.get("max_prompt_length"),
        "epsilon_low": low,
        "epsilon_high": args("epsilon_high", low),
        "top_p": args("top_p", 1.0),
        "mask_truncated": args("mask_truncated_completions", False),
        "chat_template_kwargs": args.values.get("chat_template_kwargs"),
        "router_loss": args.values.get("router_aux_loss_coef", 0.0),
        "micro_batch_size": args.count("per_device_train_batch_size", 1),
        "num_iterations": args.count("num_iterations", 1),
    }


def _grpo(args: TrlArguments, folder: Path) -> _Read:
    scale = args("scale_rewards", "group")
    controller, metrics = _controller(folder), _metrics(folder)
    rewards = sum(_REWARD.fullmatch(name) is not None for name in metrics)
    each = args("multi_objective_aggregation", "sum_then_normalize") == "normalize_then_sum"
    values = _online(args) | {
        "loss_type": args("loss_type", ""),
        "scale_rewards": {True: "group", False: "none"}[scale] if isinstance(scale, bool) else scale,
        "advantage_estimator": "normalize_then_sum" if each else "",
        "beta": args("beta", 0.0),
        "bias_correction_kl": args("use_bias_correction_kl", False),
        "loss_parameters": _parameters(args, args("loss_type", "")),
        "objective": _objective(args, controller),
    }
    return "GRPO", values, (*grpo_obstacles(args, controller, rewards), *online_obstacles(args, metrics))


def _rloo(args: TrlArguments, folder: Path) -> _Read:
    normalised = args("normalize_advantages", False)
    values = _online(args) | {
        "loss_type": "rloo",
        "scale_rewards": "none",
        "advantage_estimator": "rloo",
        "advantage_parameters": {"normalize_advantages": True} if normalised else {},
        "beta": 0.0,
        "kl_in_reward": args("beta", 0.05),
    }
    return "RLOO", values, (*rloo_obstacles(args), *online_obstacles(args, _metrics(folder)))


def _pairs(args: TrlArguments) -> dict[str, Any]:
    """What trainers on pairs share; a response is at most as long as a whole sequence."""
    longest = args.values.get("max_length")
    return {
        "scale_rewards": "none",
        "temperature": 1.0,
        "group_size": 2,
        "prompts_per_step": args.micro_batch * args.accumulation,
        "beta": args("beta", 0.1),
        "router_loss": args.values.get("router_aux_loss_coef", 0.0),
        "micro_batch_size": 2 * args.count("per_device_train_batch_size", 1),
    } | ({} if longest is None else {"max_response_tokens": longest})


def _dpo(args: TrlArguments, folder: Path) -> _Read:
    kinds = args("loss_type", ["sigmoid"])
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    own = {"dpo_loss_type": kinds} if kinds != ("sigmoid",) else {}
    values = _pairs(args) | {"loss_type": "dpo", "loss_parameters": _parameters(args, "dpo", own)}
    return "DPO", values, tuple(preference_obstacles(args, kinds))


def _cpo(args: TrlArguments, folder: Path) -> _Read:
    own = {"cpo_loss_type": args("loss_type", "sigmoid")}
    values = _pairs(args) | {"loss_type": "cpo", "loss_parameters": _parameters(args, "cpo", own)}
    return "CPO", values, tuple(preference_obstacles(args, ("cpo",) if args("cpo_alpha", 1.0) else ()))


_READERS: tuple[tuple[frozenset[str], Callable[[TrlArguments, Path], _Read]], ...] = (
    (frozenset({"loss_type", "num_generations", "max_completion_length"}), _grpo),
    (frozenset({"normalize_advantages", "num_generations", "max_completion_length"}), _rloo),
    (frozenset({"loss_type", "f_divergence_type", "label_smoothing"}), _dpo),
    (frozenset({"loss_type", "cpo_alpha", "simpo_gamma"}), _cpo),
)


def _parameters(args: TrlArguments, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments that are parameters of the run's loss, under TRL's own names, where they are not usual.

    Raises:
        CheckpointError: one has a value that it cannot have.
    """
    if not known_loss(name):
        return {}
    known = LOSSES[name].parameters.model_fields
    found = {key: args.values[key] for key in known if key in args.values} | dict(given or {})
    if not (args("use_vllm", False) and args("vllm_importance_sampling_correction", True)):
        found.pop("vllm_importance_sampling_mode", None)
    try:
        return LOSSES[name].read(found).model_dump(exclude_defaults=True)
    except ConfigError as error:
        raise CheckpointError(f"{args.path}: {error}; copy the file again") from error


def _objective(args: TrlArguments, controller: Mapping[str, float] | None) -> dict[str, Any] | None:
    """TRL's own entropy terms as the objectives that they are."""
    if (kept := args.number("top_entropy_quantile", 1.0)) < 1.0:
        return {"name": "top_entropy", "fraction": kept, "micro_batch_size": args.micro_batch}
    coefficient = args.number("entropy_coef", 0.0)
    if args("use_adaptive_entropy", False):
        if controller is None:
            return None
        target = args.number("entropy_target", 0.0)
        rests = controller["last_world_entropy"] > target
        coefficient = 0.0 if rests else controller["entropy_coef"]
    if coefficient == 0.0:
        return None
    cut = args.count("per_device_train_batch_size", 1) if args.cuts else None
    return {"name": "entropy_bonus", "coefficient": coefficient, "micro_batch_size": cut}


def _controller(folder: Path) -> dict[str, float] | None:
    """State of TRL's adaptive entropy bonus; None where the checkpoint has none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / CONTROLLER_FILE
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(state[name]) for name in ("entropy_coef", "last_world_entropy")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0][:120]
        raise CheckpointError(f"{path}: cannot be read ({reason}); copy it again") from error


def _metrics(folder: Path) -> frozenset[str]:
    """Names of what the run logged; nothing where it has no log.

    Raises:
        CheckpointError: the log cannot be read.
    """
    return frozenset(name for entry in read_log(folder) or () for name in entry)
