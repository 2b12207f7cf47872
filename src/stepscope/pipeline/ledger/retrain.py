"""A recorded training once more, from the same start and seeds, without the tokens of a rule."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from stepscope.config import TrainConfig, build_config
from stepscope.errors import ConfigError, RunFolderError
from stepscope.pipeline.train import run_train
from stepscope.reading.recording import find_record
from stepscope.rules import Without
from stepscope.runs import CONFIG, RunFolder

CONSTANT = ("constant", "constant_with_warmup")
"""Schedules whose rates do not depend on how long a training is to be."""


def retraining(run: Path, out: Path, objective: Without, *, stop: int, state_every: int) -> TrainConfig:
    """The configuration of a run with some tokens left out, from the policy that its warm-up left.

    The training ends after step ``stop`` where the learning rates allow; it is recorded.

    Args:
        run: folder of ``stepscope train``.
        out: folder of the new training.
        objective: the tokens and their dose.
        stop: last step that is wanted.
        state_every: steps from one whole state in its record to the next.

    Raises:
        RunFolderError: the folder is not one of ``stepscope train``.
        ConfigError: its training has another objective, or leaving tokens out means nothing in it.
    """
    verb = RunFolder(run).provenance()["verb"] if (run / CONFIG).is_file() else ""
    if verb not in ("train", "demo"):
        raise RunFolderError(
            f"{run}: training again needs the run folder of `stepscope train`, and this is none; train with "
            f"the objective {objective.to_record()} yourself, or leave --retrain out"
        )
    plain = RunFolder(run).config()
    plain = plain["train"] if verb == "demo" else plain
    if plain.get("rl") is None or plain["rl"].get("objective") is not None:
        raise ConfigError(
            f"{run / CONFIG}: rl.objective is there already (or there is no rl), and a training takes one "
            "objective; leave --retrain out"
        )
    rl = dict(plain["rl"])
    steps = stop if rl["optimizer"]["scheduler"] in CONSTANT else rl["steps"]
    rl |= {
        "steps": steps,
        "save_every": steps,
        "objective": objective.model_dump(),
        "record": {"state_every": state_every},
        "probe": None,
        "report_to": [],
    }
    model = dict(plain["model"])
    if (run / "base").is_dir():
        model["source"] = str((run / "base").resolve())
    return build_config(TrainConfig, plain | {"model": model, "sft": None, "rl": rl, "out": str(out)})


def retrained(run: Path, out: Path, objective: Without, *, stop: int, state_every: int) -> Path:
    """Train so, or go on with it, and return its folder.

    Raises:
        RunFolderError: see :func:`retraining`; or the new training did not begin as the run did.
        ConfigError: see :func:`retraining`.
    """
    config = retraining(run, out, objective, stop=stop, state_every=state_every)
    run_train(config, resume=True)
    same_start(run, out)
    return out


def same_start(run: Path, other: Path) -> None:
    """Refuse two trainings that did not begin with the same batch: then they differ by more than the rule.

    Raises:
        RunFolderError: they did not.
    """
    first, second = (find_record(folder).batch(1).rollouts for folder in (run, other))
    if first.prompt_token_ids != second.prompt_token_ids or (
        first.response_token_ids != second.response_token_ids
    ):
        raise RunFolderError(
            f"{other}: its first batch is not the first batch of {run}, though both begin with the same "
            "policy and seed; train both on one kind of device, with one number of threads and one version "
            "of torch"
        )


def folder_of(rule: str) -> str:
    """Name of the folder of a rule: what can be read of it, and a digest."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", rule).strip("-")[:60]
    return f"{words}-{hashlib.sha256(rule.encode()).hexdigest()[:6]}"


def dose_folder(dose: float) -> str:
    """Name of the folder of a training with a dose."""
    return f"dose-{dose:g}"
