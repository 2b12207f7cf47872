"""Whether the entropy of sampled responses is that of the training: held against what the trainer logged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from stepscope.policy.check.health.log import series
from stepscope.policy.checkpoint.trainer_log import read_log
from stepscope.results import Record
from stepscope.stats import Estimate, Number

DOUBT_ERRORS = 4.0
"""Standard errors between two entropies from which they are held to differ ..."""

DOUBT_RATIO = 1.5
"""... and the ratio from which the difference is doubted: other prompts of the same kind, replaced groups
and updates on an older batch make tens of percent; a wrong template makes multiples."""

NEAR = 5
"""Logged values up to a checkpoint's step that it is held against."""

CAUSES = (
    "likely causes are the prompt or chat template, the temperature, tokens that the run does not count "
    "(truncated responses, output of tools), or other prompts than the run's"
)


@dataclass(frozen=True)
class LoggedEntropy(Record):
    """What a trainer logged up to a checkpoint.

    Attributes:
        value: mean of the last ``count`` logged values, nats per token.
        scatter: their standard deviation, trend included; nan of one.
        count: how many there are, at most ``NEAR``.
        first_step: of these.
        last_step: of these.
    """

    value: float
    scatter: Number
    count: int
    first_step: int
    last_step: int

    def doubt(self, entropy: Estimate) -> str:
        """How an entropy differs from the logged one; empty where it does not, beyond error and scatter.

        Args:
            entropy: of responses that the checkpoint wrote, nats per token.
        """
        scatter = 0.0 if math.isnan(self.scatter) else self.scatter
        if not far_apart(entropy.value, self.value, math.hypot(entropy.stderr, scatter)):
            return ""
        spread = "" if math.isnan(self.scatter) else f" +- {self.scatter:.2g} from value to value"
        where = f"step {self.last_step}"
        if self.count > 1:
            where = f"{self.count} values of steps {self.first_step} to {self.last_step}"
        return (
            f"the entropy is {entropy.value:.3g} +- {entropy.stderr:.2g} nats per token, and the trainer "
            f"logged {self.value:.3g}{spread} ({where}); {CAUSES}"
        )


def logged_entropy(folder: Path, step: int) -> LoggedEntropy | None:
    """What the trainer logged of the entropy up to a step; None where it logged none.

    Entries without a reward are passed over: a training on given responses logs the entropy along these.

    Args:
        folder: checkpoint, with the ``trainer_state.json`` of the Trainer.
        step: optimizer steps that the checkpoint has taken.

    Raises:
        CheckpointError: the log is damaged.
    """
    log = [entry for entry in read_log(folder) or () if "reward" in entry]
    values = [(at, value) for at, value in series(log, "entropy") if at <= step]
    near = [(at, value) for at, value in values if math.isfinite(value)][-NEAR:]
    if not near:
        return None
    numbers = [value for _, value in near]
    scatter = stdev(numbers) if len(numbers) > 1 else float("nan")
    return LoggedEntropy(fmean(numbers), scatter, len(near), near[0][0], near[-1][0])


def far_apart(a: float, b: float, error: float) -> bool:
    """Whether two entropies differ beyond their error, and by more than other prompts of a kind explain."""
    low, high = sorted((a, b))
    return high - low > DOUBT_ERRORS * error and high > DOUBT_RATIO * low
