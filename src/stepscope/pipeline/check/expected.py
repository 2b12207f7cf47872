"""What a measurement will take in time and memory, told from a few responses and the model's sizes."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from stepscope.config import MeasureConfig, Stage
from stepscope.console import in_words
from stepscope.pipeline.check.trial import MAX_TOKENS, Trial
from stepscope.pipeline.speed import FLOORS
from stepscope.policy.memory import available_bytes, cost
from stepscope.policy.state import Policy

VECTORS = 6
"""Vectors of the size of the trained parameters that a measurement holds at a time: parts of the step, its
direction, the preconditioner, a gradient, and products with them."""


@dataclass(frozen=True)
class Expected:
    """What ``measure`` will take with its settings, as far as it is known.

    Attributes:
        seconds: of the stages in ``FLOORS``.
        unknown: stages that were asked for besides.
        at_least: responses were cut short here, so that theirs are longer.
        memory: bytes at the most, of the device; of the machine without a GPU.
        free: bytes that can be taken, with those that the policy has already.
    """

    seconds: float
    unknown: tuple[Stage, ...]
    at_least: bool
    memory: int
    free: int

    def __str__(self) -> str:
        more = f", and {' and '.join(self.unknown)} besides" if self.unknown else ""
        least = "at least " if self.at_least else ""
        return (
            f"{least}about {in_words(self.seconds)}{more}; {self.memory / 2**30:.2g} GiB of memory, of "
            f"{self.free / 2**30:.3g} GiB that can be had"
        )


def expected(policy: Policy, config: MeasureConfig, trial: Trial) -> Expected | None:
    """What the measurement of a configuration takes, from a trial; None where nothing was sampled."""
    if trial.sampled is None:
        return None
    sizes = (config.update, config.probe)
    count = sum(batch.num_prompts * batch.group_size for batch in sizes)
    floors = sum(FLOORS.get(stage, 0.0) for stage in config.stages)
    seconds = count * (trial.sampling_seconds * ("rollouts" in config.stages) + floors * trial.pass_seconds)
    trained = sum(p.nbytes for p in policy.parameters.values())
    held = _held(policy.device)
    free = available_bytes(policy.device) + held
    widths = [
        len(a) + len(b)
        for a, b in zip(trial.sampled.prompt_token_ids, trial.sampled.response_token_ids, strict=True)
    ]
    widest = max(widths)
    each = cost(policy.model, "passes").per_token(min(widths), widest)
    batch = min(each * config.batch_size * widest, (free - held) / 2)
    kept = min(config.memory_bytes, config.update.num_prompts * config.update.group_size * trained)
    cut = policy.settings.max_response_tokens > MAX_TOKENS and bool(trial.sampled.truncated.any())
    return Expected(
        seconds=seconds,
        unknown=tuple(stage for stage in config.stages if stage not in FLOORS),
        at_least=cut,
        memory=int(held + VECTORS * trained + kept + batch),
        free=free,
    )


def _held(device: torch.device) -> int:
    """Bytes that are taken now, by the policy mostly."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
