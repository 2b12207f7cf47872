"""How far what a dump gives is from what this policy says of the same tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stepscope.errors import RunFolderError
from stepscope.policy.checkpoint.settings.training_args import (
    TRAINING_ARGS_FILE,
    Record,
    read_training_args,
)
from stepscope.policy.sampling.drawn_by import DRIFT_LIMIT
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.runs import read_json
from stepscope.stats import Estimate

FAR = 0.1
"""Nats from which a token's logged log-prob counts as another one."""


def logprob_figures(batch: Rollouts, given: Sequence[FloatArray | None], name: str) -> dict[str, Estimate]:
    """Mean distance of logged log-probs from this policy's, and the share of tokens that are far off.

    Args:
        batch: with this policy's log-probs.
        given: per sequence (tok,) the logged ones, None where there are none.
        name: ``logprob`` for those of the sampler, ``old_logprob`` for those that the loss divides by.

    Returns:
        Figures by name; nothing where some sequence has none.
    """
    rows = [row for row in given if row is not None]
    if len(rows) < len(batch):
        return {}
    away = [np.abs(now - then) for now, then in zip(batch.logprobs, rows, strict=True)]
    own = batch.flat(away)
    own = own[np.isfinite(own)]
    if not len(own):
        return {}

    def figure(value: float, unit: str, method: str) -> Estimate:
        return Estimate(value, math.nan, len(own), unit, f"{method}, exact for this update batch")

    mean = figure(float(own.mean()), "nats/token", "mean over tokens of |logged log-prob - this policy's|")
    far = figure(float((own > FAR).mean()), "share of tokens", f"tokens whose two log-probs are {FAR} apart")
    doubt = ""
    if name == "logprob" and not mean.value <= DRIFT_LIMIT:
        doubt = "the responses were sampled by another policy, or in other tokens"
    return {f"update_{name}_difference": mean.doubted(doubt), f"update_{name}_far": far.doubted(doubt)}


def length_figure(policy: Policy, batch: Rollouts, step: int | None) -> Estimate | None:
    """Mean length of the responses minus the one that the run logged for the step; None where it logged none.

    Looks into ``trainer_state.json`` of the checkpoints beside this one: a later one has the step's log.
    """
    logged = None if step is None else _logged_lengths(policy, step)
    if logged is None:
        return None
    found = float(batch.num_policy_tokens.mean()) - logged
    same = math.isclose(found, 0.0, abs_tol=1e-3)
    return Estimate(
        found,
        float("nan"),
        len(batch),
        "tokens",
        "mean length of the responses tokenized back minus the mean length that the run logged for the step",
        reliable=same,
        reason="" if same else "the responses were sampled in other tokens than those of their text",
    )


def _logged_lengths(policy: Policy, step: int) -> float | None:
    for state in _states(policy):
        for entry in state["log_history"] if state.get("logging_steps") == 1 else ():
            value = entry.get("completions/mean_length")
            if entry.get("step") == step and isinstance(value, int | float):
                return float(value)
    return None


def evaluated(policy: Policy, step: int) -> bool:
    """Whether the run evaluated after a step, as far as its arguments or the states beside it tell."""
    for state in _states(policy):
        for entry in state["log_history"]:
            if entry.get("step") == step and any(str(key).startswith("eval_") for key in entry):
                return True
    values = _arguments(policy)
    strategy, every = values.get("eval_strategy"), values.get("eval_steps")
    named = strategy.__dict__.get("arguments", ()) if isinstance(strategy, Record) else (strategy,)
    late = values.get("eval_delay")
    if "steps" not in named or type(every) is not int or every < 1:
        return False
    return step % every == 0 and not (isinstance(late, int | float) and step < late)


def reward_weights(policy: Policy) -> tuple[float, ...] | None:
    """What TRL multiplied the reward functions by, in their order; None for 1 each."""
    given = _arguments(policy).get("reward_weights")
    if not isinstance(given, list) or not all(type(weight) in (int, float) for weight in given):
        return None
    return tuple(float(weight) for weight in given)


def steps_on_a_generation(policy: Policy) -> int:
    """Optimizer steps that the run takes on what it samples together, of which the first is on policy."""
    values = _arguments(policy)
    sampled, accumulated = values.get("steps_per_generation"), values.get("gradient_accumulation_steps")
    parts = 1
    if type(sampled) is int and type(accumulated) is int and accumulated >= 1:
        parts = max(1, sampled // accumulated)
    return policy.settings.num_iterations * parts


def _arguments(policy: Policy) -> dict[str, Any]:
    """The run's arguments; nothing where the checkpoint has none."""
    path = None if policy.path is None else policy.path / TRAINING_ARGS_FILE
    return {} if path is None or not path.is_file() else read_training_args(path).values


def reward_functions(policy: Policy) -> frozenset[str]:
    """Names of the reward functions that TRL logged; none where it logged nothing."""
    keys = {key for state in _states(policy) for entry in state["log_history"] for key in entry}
    return frozenset(found[1] for key in keys if (found := re.fullmatch(r"rewards/(.+)/mean", str(key))))


def _states(policy: Policy) -> Iterator[dict[str, Any]]:
    """The trainer's states beside a checkpoint, its own among them, that can be read."""
    folders = [] if policy.path is None else sorted(policy.path.parent.glob("checkpoint-*"))
    for folder in folders:
        try:
            state: Any = read_json(folder / "trainer_state.json")
        except RunFolderError:
            continue
        history = state.get("log_history") if isinstance(state, dict) else None
        if isinstance(history, list) and all(isinstance(entry, dict) for entry in history):
            yield state
