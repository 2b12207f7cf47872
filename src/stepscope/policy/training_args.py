"""Reading ``training_args.bin`` of a TRL run without running it.

The file is a pickle. Here every global it names becomes an inert stand-in that only records what it was
given,
globals outside the libraries that write such files are refused, and nothing of them is imported.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError
from stepscope.policy.settings import StepSettings

TRAINING_ARGS_FILE = "training_args.bin"
"""Name of the file inside a checkpoint folder."""

_LIBRARIES = ("transformers", "trl", "accelerate")
_TORCH = frozenset({"device", "dtype", "float64", "float32", "float16", "bfloat16", "uint8", "int8"})
_PLAIN: dict[tuple[str, str], type] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
}

_MEASURABLE: dict[str, Callable[[Any], bool]] = {
    "num_iterations": lambda v: v == 1,
    "importance_sampling_level": lambda v: v == "token",
    "delta": lambda v: v is None,
    "entropy_coef": lambda v: v == 0.0,
    "use_adaptive_entropy": lambda v: not v,
    "off_policy_mask_threshold": lambda v: v is None,
    "multi_objective_aggregation": lambda v: v == "sum_then_normalize",
    "top_k": lambda v: not v,
    "min_p": lambda v: not v,
    "repetition_penalty": lambda v: v == 1.0,
    "generation_kwargs": lambda v: not v,
}
"""Arguments of TRL that change a step in a way StepSettings cannot say, and the values that do not."""


class Record:
    """An inert stand-in: whatever the pickle builds becomes one of these, with its attributes."""

    def __new__(cls, *args: Any) -> Record:
        """Keep the arguments, call nothing."""
        record = object.__new__(cls)
        record.__dict__["arguments"] = args
        return record

    def __init__(self, *args: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Take over attributes that are plain names."""
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"state of type {type(state).__name__}")
        self.__dict__.update(state)


class _RecordingUnpickler(pickle.Unpickler):
    """Resolves every allowed global to a fresh subclass of :class:`Record`, and refuses the others."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for ``module.name``; the module is not imported."""
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module.split(".")[0] in _LIBRARIES or (module == "torch" and name in _TORCH):
            return type(name, (Record,), {})
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Tensors have no place in training arguments."""
        raise pickle.UnpicklingError("it refers to stored tensors")


def read_training_args(path: Path) -> dict[str, Any]:
    """The attributes of the pickled training arguments; objects in it are inert :class:`Record` stand-ins.

    Raises:
        CheckpointError: the file is damaged, or refers to anything but plain data and classes of
        transformers,
            TRL and accelerate.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            if member is None:
                raise pickle.UnpicklingError("no data.pkl inside")
            data = archive.read(member)
        root = _RecordingUnpickler(io.BytesIO(data)).load()
    except (
        OSError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
    ) as error:
        raise CheckpointError(
            f"{path}: the training arguments are not read "
            f"({str(error).splitlines()[0][:120] or 'damaged'}); pass the loss settings yourself "
            "(loss_type, scale_rewards, temperature, max_response_tokens, max_grad_norm)"
        ) from error
    if not isinstance(root, Record):
        raise CheckpointError(
            f"{path}: got {type(root).__name__}, expected training arguments; copy the file again"
        )
    return {name: value for name, value in vars(root).items() if name != "arguments"}


def base_revision(path: Path) -> str | None:
    """The revision of the base model that TRL was told to load (``model_init_kwargs``), if the file is there.

    Raises:
        CheckpointError: the file is damaged, or TRL was told to quantize the base: on the full-precision base
            the adapter is another policy.
    """
    if not path.is_file():
        return None
    try:
        told = read_training_args(path).get("model_init_kwargs")
    except CheckpointError as error:
        reason = str(error).rpartition("; ")[0]
        raise CheckpointError(
            f"{reason}: so it is not known which base the adapter was trained on; if it is the one that "
            "adapter_config.json names, not quantized, remove this file and give the loss settings yourself"
        ) from error
    if isinstance(told, str):
        try:
            told = json.loads(told)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: model_init_kwargs is no JSON object ({error}); copy the file again"
            ) from error
    if not isinstance(told, Mapping):
        return None
    packed = [
        n for n in ("quantization_config", "load_in_4bit", "load_in_8bit") if told.get(n) not in (None, False)
    ]
    if packed:
        raise CheckpointError(
            f"{path}: the base was quantized in training ({packed[0]}), and on the full-precision base the "
            "adapter is another policy; dequantize that base, save it, name it in adapter_config.json, and "
            "remove this file (then give the loss settings yourself)"
        )
    revision = told.get("revision")
    return revision if isinstance(revision, str) else None


def settings_from_training_args(path: Path) -> StepSettings:
    """Loss settings of a TRL GRPO run from its ``training_args.bin``.

    Raises:
        CheckpointError: the file cannot be read safely, is not of a GRPO run, or the run used something that
            changes its step and that a StepSettings cannot express.
    """
    args = read_training_args(path)
    if not {"loss_type", "num_generations", "max_completion_length"} <= set(args):
        raise CheckpointError(
            f"{path}: these are not the arguments of a TRL GRPO run (no loss_type, num_generations); "
            "pass the loss settings yourself (loss_type, scale_rewards, temperature, "
            "max_response_tokens, max_grad_norm)"
        )
    odd = [
        f"{name}={args[name]!r}"
        for name, fine in _MEASURABLE.items()
        if name in args and not fine(args[name])
    ]
    accumulation = args.get("gradient_accumulation_steps", 1)
    if args.get("steps_per_generation", accumulation) != accumulation:
        odd.append(f"steps_per_generation={args['steps_per_generation']!r}")
    if args["loss_type"] == "bnpo" and accumulation != 1:
        odd.append(f"loss_type='bnpo' with gradient_accumulation_steps={accumulation}")
    if odd:
        raise CheckpointError(
            f"{path}: the run used {', '.join(odd)}, so its steps are not those of an on-policy batch; "
            "to measure an on-policy step all the same, pass the loss settings yourself (loss_type, "
            "scale_rewards, temperature, max_response_tokens, max_grad_norm)"
        )
    return StepSettings.from_dict(_plain_settings(args), where=str(path))


def _plain_settings(args: Mapping[str, Any]) -> dict[str, Any]:
    scale = args.get("scale_rewards", "group")
    world = getattr(args.get("distributed_state"), "num_processes", 1)
    micro_batch = args.get("per_device_train_batch_size", 1) * world
    sequences = micro_batch * args.get("gradient_accumulation_steps", 1)
    kept = args.get("top_entropy_quantile", 1.0)
    objective = {"name": "top_entropy", "fraction": kept, "micro_batch_size": micro_batch}
    low = args.get("epsilon", 0.2)
    high = args.get("epsilon_high")
    return {
        "loss_type": args["loss_type"],
        "scale_rewards": {True: "group", False: "none"}[scale] if isinstance(scale, bool) else scale,
        "group_size": args["num_generations"],
        "prompts_per_step": max(1, sequences // args["num_generations"]),
        "temperature": args.get("temperature", 1.0),
        "max_response_tokens": args["max_completion_length"],
        "max_prompt_tokens": args.get("max_prompt_length"),
        "max_grad_norm": args.get("max_grad_norm") or 0.0,
        "epsilon_low": low,
        "epsilon_high": low if high is None else high,
        "beta": args.get("beta", 0.0),
        "top_p": args.get("top_p", 1.0),
        "seed": args.get("seed", 0),
        "chat_template_kwargs": args.get("chat_template_kwargs"),
        "bias_correction_kl": args.get("use_bias_correction_kl", False),
        "mask_truncated": args.get("mask_truncated_completions", False),
        "objective": objective if kept < 1.0 else None,
        "router_loss": args.get("router_aux_loss_coef", 0.0),
        "micro_batch_size": args.get("per_device_train_batch_size"),
    }
