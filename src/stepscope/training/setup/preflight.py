"""What can be known to fail is found before any work starts."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.pytorch_utils import Conv1D

from stepscope.config import LoraConfig, RlConfig, TrainConfig
from stepscope.errors import ConfigError
from stepscope.tasks.problem import Task
from stepscope.training.setup.prompts import prompt_rows

PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""Packages of trackers that are not called like them."""

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
"""Modules that PEFT has a low-rank adapter for."""


def require_trackers(names: Sequence[str], section: str = "rl") -> None:
    """Refuse trackers that transformers does not know or that are not installed.

    Args:
        names: as the configuration has them.
        section: of the configuration.

    Raises:
        ConfigError: names the tracker and what to install.
    """
    if list(names) in (["none"], ["all"]):
        return
    installed = {*get_available_reporting_integrations()}
    if importlib.util.find_spec("flytekit") is not None:
        installed.add("flyte")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            close = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{section}.report_to: {name!r} is none of the trackers "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}; give some of them, or [] for none{hint}"
            )
        if name not in installed:
            package = PACKAGES.get(name, name)
            raise ConfigError(
                f"{section}.report_to: {name} is not installed; install it (pip install {package}), or "
                "take it out"
            )


def require_fit(config: TrainConfig, model: nn.Module, tokenizer: Any, task: Task) -> None:
    """Refuse a model that cannot be trained as configured: adapter, room for prompts.

    Args:
        config: what to train and how.
        model: the starting model, without adapter.
        tokenizer: its tokenizer.
        task: asks the prompts.

    Raises:
        ConfigError: names what does not fit.
    """
    if config.model.lora is not None:
        require_targets(model, config.model.lora)
    rl, name = config.after_warm_up or RlConfig(), "hypo" if config.hypo is not None else "rl"
    rows = prompt_rows(task, task.problems("train"), tokenizer, longest=rl.max_prompt_tokens, section=name)
    lengths = [len(ids) for ids in rows["prompt_token_ids"]]
    room = room_of(model)
    longest = max(lengths)
    if room is not None and longest + rl.max_response_tokens > room:
        problem = task.problems("train")[rows["index"][lengths.index(longest)]]
        fitting = room - rl.max_response_tokens
        over = sum(length > fitting for length in lengths)
        some = (
            f"set {name}.max_prompt_tokens to {fitting}, which leaves out {over} of {len(lengths)} prompts, "
            "or "
        )
        raise ConfigError(
            f"{name}.max_response_tokens: {rl.max_response_tokens} and the longest prompt "
            f"({problem.prompt_id}, "
            f"{longest} tokens) exceed the model's {room} positions; {some if over < len(lengths) else ''}"
            f"lower {name}.max_response_tokens"
        )


def require_targets(model: nn.Module, lora: LoraConfig) -> None:
    """Refuse adapter targets that name no module, or one that cannot have an adapter.

    Raises:
        ConfigError: names the target and the modules there are.
    """
    if lora.targets == "all-linear":
        return
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()  # type: ignore[operator]
    for target in lora.targets:
        named = [m for name, m in modules.items() if name == target or name.endswith(f".{target}")]
        if not named or not all(isinstance(m, ADAPTABLE) for m in named) or any(m is head for m in named):
            possible = {
                name.rpartition(".")[2]
                for name, m in modules.items()
                if isinstance(m, ADAPTABLE) and m is not head
            }
            fault = "names no module of the model" if not named else "cannot have an adapter"
            raise ConfigError(
                f"model.lora.targets: {target!r} {fault}; give some of {', '.join(sorted(possible))}, or "
                "all-linear"
            )


def require_room(rows: Sequence[Sequence[int]], model: nn.Module, what: str) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        ConfigError: gives the longest and the room.
    """
    room, longest = room_of(model), max(map(len, rows))
    if room is not None and longest > room:
        over = sum(len(row) > room for row in rows)
        raise ConfigError(
            f"{what}: the longest has {longest} tokens and the model {room} positions ({over} of {len(rows)} "
            "are too long); take them out of the data, or use a model with more"
        )


def room_of(model: Any) -> int | None:
    """The positions a model has, or None where its configuration sets no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)
