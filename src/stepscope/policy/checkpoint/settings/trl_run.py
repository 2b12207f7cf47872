"""What the arguments of a TRL run say about its next step, and what in them no measurement can follow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError, ConfigError
from stepscope.policy.checkpoint.settings.training_args import (
    TRAINING_ARGS_FILE,
    TrainingArguments,
    read_training_args,
)
from stepscope.policy.loss.registry import LOSSES, known_loss
from stepscope.policy.numerics.precision import HALF_TYPES

_CARD = re.compile(r"This model was trained with ([^\s,.]+)")
_TRL = "It has been trained using [TRL]"

CONTROLLER_FILE = "entropy_ctrl_state.json"
"""What TRL keeps of an entropy bonus that adapts."""


@dataclass(frozen=True)
class Obstacle:
    """Something of a run that changes its steps and that a measurement cannot follow.

    Attributes:
        name: TRL's argument, or ``trainer``; what ``loss.without`` takes.
        reason: what the run did, and why that is not measured.
    """

    name: str
    reason: str


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

    The arguments decide by their class and fields: those of GRPO and of subclasses give the settings, those
    of other trainers (supervised, DPO) only what all trainers share.

    Raises:
        CheckpointError: the file cannot be read safely, or holds values of the wrong type.
    """
    path = folder / TRAINING_ARGS_FILE
    if not path.is_file():
        return None
    found = read_training_args(path)
    shared = {
        "max_grad_norm": found.values.get("max_grad_norm") or 0.0,
        "seed": found.values.get("seed", 0),
        "disable_dropout": found.values.get("disable_dropout", False),
    }
    if not {"loss_type", "num_generations", "max_completion_length"} <= set(found.values):
        return TrlRun(shared)
    args = _Arguments(found, path)
    controller = _controller(folder)
    return TrlRun(
        values=shared | _settings(args) | {"objective": _objective(args, controller)},
        obstacles=(*_trainer(found, folder), *_loss(args, controller), *_sampling(args), *_logged(folder)),
        notes=tuple(_notes(found, args)),
    )


def run_notes(folder: Path) -> tuple[str, ...]:
    """What a user should know of the run of a checkpoint; nothing where its arguments cannot be read."""
    try:
        run = read_trl_run(folder)
    except CheckpointError:
        return (f"{TRAINING_ARGS_FILE} cannot be read; the settings are the given ones alone",)
    return () if run is None else run.notes


class _Arguments:
    """Typed access: a value of another type is named instead of failing further on."""

    def __init__(self, found: TrainingArguments, path: Path) -> None:
        self.values = found.values
        self.path = path

    def __call__(self, name: str, default: Any) -> Any:
        """The argument; None counts as absent where the default is not None."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int) -> int:
        """An argument that counts something.

        Raises:
            CheckpointError: it is no positive integer.
        """
        value = self(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.path}: {name} is {_said(value)}, expected a positive number; copy the file again"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """An argument that is a number.

        Raises:
            CheckpointError: it is none.
        """
        value = self(name, default)
        if not isinstance(value, (int, float)):
            raise CheckpointError(
                f"{self.path}: {name} is {_said(value)}, expected a number; copy the file again"
            )
        return float(value)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.count("gradient_accumulation_steps", 1)

    @property
    def processes(self) -> int:
        """Processes, each with a micro-batch of its own."""
        counts = (getattr(self.values.get("distributed_state"), "num_processes", 1), self("_n_gpu", 1))
        return max(1, *(count for count in counts if isinstance(count, int)))

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch over all processes."""
        return self.count("per_device_train_batch_size", 1) * self.processes

    @property
    def cuts(self) -> str:
        """How a step's batch is cut; empty where it is one piece."""
        parts = [f"gradient_accumulation_steps={self.accumulation}"] * (self.accumulation > 1)
        parts += [f"{self.processes} processes"] * (self.processes > 1)
        return " and ".join(parts)


def _settings(args: _Arguments) -> dict[str, Any]:
    scale = args("scale_rewards", "group")
    group_size = args.count("num_generations", 1)
    low = args("epsilon", 0.2)
    return {
        "loss_type": args("loss_type", ""),
        "scale_rewards": {True: "group", False: "none"}[scale] if isinstance(scale, bool) else scale,
        "group_size": group_size,
        "prompts_per_step": max(1, args.micro_batch * args.accumulation // group_size),
        "temperature": args("temperature", 1.0),
        "max_response_tokens": args("max_completion_length", 0),
        "max_prompt_tokens": args.values.get("max_prompt_length"),
        "epsilon_low": low,
        "epsilon_high": args("epsilon_high", low),
        "beta": args("beta", 0.0),
        "top_p": args("top_p", 1.0),
        "bias_correction_kl": args("use_bias_correction_kl", False),
        "mask_truncated": args("mask_truncated_completions", False),
        "chat_template_kwargs": args.values.get("chat_template_kwargs"),
        "router_loss": args.values.get("router_aux_loss_coef", 0.0),
        "micro_batch_size": args.count("per_device_train_batch_size", 1),
        "loss_parameters": _loss_parameters(args),
        "num_iterations": args.count("num_iterations", 1),
    }


def _loss_parameters(args: _Arguments) -> dict[str, Any]:
    """The arguments that are parameters of the run's loss, under TRL's own names."""
    name = args("loss_type", "")
    if not known_loss(name):
        return {}
    known = LOSSES[name].parameters.model_fields
    found = {key: args.values[key] for key in known if key in args.values}
    if not (args("use_vllm", False) and args("vllm_importance_sampling_correction", True)):
        found["vllm_importance_sampling_mode"] = None
    try:
        return LOSSES[name].read(found).model_dump(exclude_defaults=True)
    except ConfigError as error:
        raise CheckpointError(f"{args.path}: {error}; copy the file again") from error


def _objective(args: _Arguments, controller: Mapping[str, float] | None) -> dict[str, Any] | None:
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


def _trainer(found: TrainingArguments, folder: Path) -> Iterator[Obstacle]:
    name = found.origin.rpartition(".")[2]
    if found.origin.startswith("trl.") and name != "GRPOConfig":
        yield Obstacle(
            "trainer", f"its arguments are TRL's {name}, whose trainer has another loss than GRPO's"
        )
        return
    for card in (folder / "README.md", folder.parent / "README.md"):
        if not card.is_file():
            continue
        text = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        said = _CARD.search(text) if _TRL in text else None
        if said is not None and said[1] != "GRPO":
            yield Obstacle("trainer", f"{card.name} says that it was trained with {said[1][:40]}, not GRPO")
            return


def _loss(args: _Arguments, controller: Mapping[str, float] | None) -> Iterator[Obstacle]:
    loss = args("loss_type", "")
    kept, bonus = args.number("top_entropy_quantile", 1.0), args.number("entropy_coef", 0.0)
    adaptive = args("use_adaptive_entropy", False)
    if not known_loss(loss):
        yield Obstacle("loss_type", f"the loss {_said(loss)} is not known here")
    generated, accumulated = args.count("steps_per_generation", args.accumulation), args.accumulation
    if generated < accumulated and loss in ("dapo", "cispo", "vespo"):
        yield Obstacle(
            "steps_per_generation",
            f"a step has responses of {accumulated / generated:g} generations, and {loss} averages over the "
            "tokens of each",
        )
    if kept < 1.0 and (bonus != 0.0 or adaptive):
        yield Obstacle("entropy_coef", "the entropy bonus is a mean over the tokens of highest entropy")
    elif adaptive and controller is None:
        yield Obstacle(
            "use_adaptive_entropy",
            f"the weight of the entropy bonus moves during the run, and {CONTROLLER_FILE} is not there",
        )
    if args("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        yield Obstacle("multi_objective_aggregation", "advantages come from each reward on its own")
    if args("neftune_noise_alpha", 0.0):
        yield Obstacle("neftune_noise_alpha", "training added noise to the embeddings")
    if args.number("beta", 0.0) != 0.0 and args("sync_ref_model", False):
        yield Obstacle("sync_ref_model", "the reference of the KL penalty moved with the run and is not kept")
    if args.values.get("max_tool_calling_iterations") is not None:
        yield Obstacle(
            "max_tool_calling_iterations",
            "tokens that tools or an environment write are not in the loss, and they cannot be told from the "
            "policy's own",
        )


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


def _sampling(args: _Arguments) -> Iterator[Obstacle]:
    """Ways to sample that make other batches than the policy itself."""
    plain: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "generation_kwargs": {}}
    for name, neutral in plain.items():
        value = args(name, neutral)
        if value != neutral:
            yield Obstacle(
                name, f"responses were sampled with {_said(value)}, not from the policy itself as here"
            )


def _logged(folder: Path) -> Iterator[Obstacle]:
    """What the run's log tells and its arguments do not: tools and environments, which the trainer is given.

    Raises:
        CheckpointError: the log cannot be read.
    """
    path = folder / "trainer_state.json"
    if not path.is_file():
        return
    try:
        history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
        metrics = {name for entry in history for name in entry}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0][:120]
        raise CheckpointError(f"{path}: cannot be read ({reason}); copy it again") from error
    if "tools/call_frequency" in metrics:
        yield Obstacle(
            "tools",
            "the run logged tool calls, and the tokens that tools or an environment write are not in the "
            "loss and cannot be told from the policy's own",
        )


def _notes(found: TrainingArguments, args: _Arguments) -> Iterator[str]:
    if not found.origin.startswith("trl."):
        yield (
            f"the arguments are of a class of the run's own, {_said(found.origin)}; if its trainer "
            "changes the loss, the step measured is GRPO's all the same"
        )
    updates = args.count("num_iterations", 1) * args.count("steps_per_generation", args.accumulation)
    if updates > args.accumulation:
        yield (
            f"each batch made {updates / args.accumulation:g} steps; on a batch sampled here the step is the "
            "first, on policy, and averaged over its own tokens"
        )
    if args("use_vllm", False):
        yield (
            "responses came from vLLM; its own log-probs, and the weights that correct for them, have a part "
            "in the step only where a batch brings them"
        )
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if args(name, False) is True:
            yield f"training computed in {dtype} (autocast); a step in float32 differs by about a percent"
    if (dtype := _loaded_type(args)) in HALF_TYPES:
        yield f"the model was loaded in {dtype} for training; a step in float32 differs by about a percent"


def _loaded_type(args: _Arguments) -> str:
    """The type in which TRL was told to load the model (``model_init_kwargs``); empty where it was not."""
    told = args.values.get("model_init_kwargs")
    dtype = told.get("dtype", told.get("torch_dtype")) if isinstance(told, Mapping) else None
    return dtype.__name__ if isinstance(dtype, type) else str(dtype or "")


def _said(value: Any) -> str:
    """An untrusted value, short enough for a line."""
    if isinstance(value, str):
        return json.dumps(value[:60])
    small = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return str(value) if small else f"a {type(value).__name__[:40]}"
