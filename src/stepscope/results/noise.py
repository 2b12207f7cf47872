"""``noise.json``: how many prompt groups a batch needs before its gradient is more signal than noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.frames import flat, frame
from stepscope.results.records import Record
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class NoiseScale(Record):
    """Signal and noise of one gradient metric, or of one quantity's response to the step.

    Attributes:
        signal: squared norm of the true gradient (squared effect, for a quantity).
        noise: variance that one prompt group has around it.
        within_prompts: part of ``noise`` from drawing this group's responses; its bias is of order 1/group
            size, because a group's responses share a baseline.
        between_prompts: the rest, from drawing the prompt.
        prompts: noise / signal: the batch, in prompt groups, at which the two are equal, with the limits of
            :mod:`stepscope.measure.noise.limits`; no number where the signal is not resolved.
        sequences: the same in sequences, at this group size.
        at_least: lower 95 % limit of ``prompts``; finite even where the signal is not resolved.
        share_of_noise: expected share of noise in the squared norm of this batch's gradient.
    """

    signal: Estimate
    noise: Estimate
    within_prompts: Estimate
    between_prompts: Estimate
    prompts: Estimate
    sequences: Estimate
    at_least: Number
    share_of_noise: Number


@dataclass(frozen=True)
class BatchSize(Record):
    """Noise and signal at one batch size.

    Attributes:
        prompts: prompt groups m.
        sequences: the same in sequences.
        batches: disjoint batches of that size that the update batch holds.
        noise: variance of the gradient between them; None with fewer than two.
        over_law: ``noise`` over tr S/m: 1 where the noise falls like 1/m; None with fewer than two.
        noise_to_signal: noise scale over m, by the law.
        lr_sgd: learning rate admitted relative to the run's batch size, SGD.
        lr_adam: the same for Adam: the square root.
    """

    prompts: int
    sequences: float
    batches: int
    noise: Estimate | None
    over_law: Estimate | None
    noise_to_signal: Estimate
    lr_sgd: Estimate
    lr_adam: Estimate


@dataclass(frozen=True)
class BatchSizes(Record):
    """Noise and signal at several batch sizes.

    Attributes:
        run_prompts: prompt groups per step of the run, which learning rates are relative to.
        slope: of log noise on log m over the batch sizes up to an eighth of the update batch; -1 where the
            noise falls like 1/m.
        rows: one per batch size.
    """

    run_prompts: int
    slope: Estimate
    rows: tuple[BatchSize, ...]

    def to_pandas(self) -> pd.DataFrame:
        """A row per batch size."""
        return frame(self.rows)


@dataclass(frozen=True, repr=False)
class NoiseScales(Plotted, Record):
    """Noise scales of one update batch.

    Attributes:
        noise_scale: the headline: prompts, Euclidean metric.
        sgd: of the loss gradient in the Euclidean metric.
        preconditioned: in the metric of the optimizer's P; None without P.
        effects: quantity name to noise scale of the batch's effect on it: how many prompts until the sign and
            size of that effect are resolved.
        batch_sizes: metric to noise-to-signal at other batch sizes, and the learning rates they admit.
    """

    noise_scale: Estimate
    sgd: NoiseScale
    preconditioned: NoiseScale | None
    effects: Mapping[str, NoiseScale]
    batch_sizes: Mapping[str, BatchSizes]

    def to_pandas(self) -> pd.DataFrame:
        """A row per signal: the loss gradient in either metric, and the effect on each quantity."""
        named = {"loss gradient": self.sgd, "loss gradient, preconditioned": self.preconditioned}
        named |= {f"effect on {name}": scale for name, scale in self.effects.items()}
        return frame({"signal": name, **flat(scale)} for name, scale in named.items() if scale is not None)

    def _viewed(self) -> Parts:
        return Parts("Gradient noise scale", {"noise": self})

    @property
    def advice(self) -> str:
        """What the noise scale says of batch size and learning rate, in words.

        It takes the curvature for the same along every direction (McCandlish et al. 2018, eq. 2.6).
        """
        found = self.batch_sizes.get("sgd")
        if found is None:
            return ""
        B, scale = found.run_prompts, self.noise_scale
        if not scale.reliable:
            return (
                f"By the noise scale alone nothing is known of batch size and learning rate: {scale.reason}."
            )
        admits = [(1 + n / B) / (1 + n / (2 * B)) for n in (scale.value, scale.low, scale.high)]
        enough = [19 * n for n in (scale.value, scale.low, scale.high)]
        return (
            "By the noise scale alone, the curvature taken for the same along every direction, doubling the "
            f"batch of {B} prompts admits {admits[0]:.2f} times the learning rate of SGD "
            f"({admits[1]:.2f} to {admits[2]:.2f}); beyond {enough[0]:.0f} prompts ({enough[1]:.0f} to "
            f"{enough[2]:.0f}) less than 5 % is left to win."
        )
