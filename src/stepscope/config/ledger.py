"""Configuration of ``stepscope ledger``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from stepscope.config.base import Section
from stepscope.config.evaluate import TrackerName
from stepscope.config.measure import Asking, Precision, ProbeConfig, known_quantity

FIXED = "_fixed_prefix"
"""End of the name of a quantity that is taken at the prefixes of the start."""


def _known(name: str) -> str:
    known_quantity(name.removesuffix(FIXED))
    return name


LedgerQuantity = Annotated[str, AfterValidator(_known)]
"""A quantity, on policy, or with ``_fixed_prefix`` at the prefixes of the start."""


def _entropy() -> list[LedgerQuantity]:
    return ["entropy"]


def _fixed_only() -> list[Literal["fixed", "optimizer"]]:
    return ["fixed"]


class KinshipConfig(Section):
    """What the tokens acted on: their own position, response, prompt, or other prompts.

    Attributes:
        every: one step in so many is looked at, and stands for its neighbours. The entropy must be among the
            quantities.
        tokens: most distinct tokens of a step that are looked at for their own position, drawn at random;
            each costs two gradients.
    """

    every: int = Field(default=4, ge=1)
    tokens: int = Field(default=512, ge=32, le=4096)


class LedgerConfig(Asking):
    """Configuration of ``stepscope ledger``.

    Attributes:
        run: folder of a recorded training.
        out: folder that the ledger goes to, or null for the run's own.
        start: the account begins after this optimizer step; null for the first that is recorded.
        stop: it ends after this one; null for the last.
        every: the gradients of the quantities are taken at every so many steps, and interpolated between.
        quantities: of the policy; the first is the headline. ``entropy_fixed_prefix`` is the entropy at the
            prefixes of the start.
        through: what entries go through: ``fixed`` holds clip coefficients and second moments, and adds up;
            ``optimizer`` holds nothing, and says what a little more or less weight would do.
        probe: prompts that the gradients are taken on, the same at all steps.
        draws: of the responses to them: ``own`` draws at every place anew, so that what chance does to the
            gradients averages out along the path; ``common`` by the same uniform numbers at all places, which
            makes a smoother curve of levels and a larger error of their sum.
        end_samples: responses to each of them at either end, for the realised change.
        num_folds: parts of the probe prompts that the errors of tokens come from; each costs a forward-mode
            pass over every batch. 1 leaves them out.
        baseline: of the gradient estimator, a rung of the ladder or ``best``.
        kinship: split what the tokens did to the entropy by what they acted on, or null for not.
        checkpoint: of the training, for the model and its tokenizer; null for the first in the run.
        precision: floating-point type of the measurement.
        batch_size: sequences per forward pass.
        device: torch device, or null for a GPU where there is one.
        memory: budget for gradients that are kept, in GiB; activations of a micro-batch come on top.
        report_to: trackers that the account goes to, under ``stepscope/ledger/...``; null for TensorBoard
            where there is a folder ``tensorboard`` beside the ledger, ``[]`` for none.
    """

    run: str
    out: str | None = None
    start: int | None = Field(default=None, ge=0)
    stop: int | None = Field(default=None, ge=1)
    every: int = Field(default=1, ge=1)
    quantities: list[LedgerQuantity] = Field(default_factory=_entropy, min_length=1)
    through: list[Literal["fixed", "optimizer"]] = Field(default_factory=_fixed_only, min_length=1)
    probe: ProbeConfig = ProbeConfig()
    draws: Literal["own", "common"] = "own"
    end_samples: int = Field(default=8, ge=1)
    num_folds: int = Field(default=8, ge=1)
    baseline: Literal["best", "none", "current", "position", "ridge"] = "position"
    kinship: KinshipConfig | None = None
    checkpoint: str | None = None
    precision: Precision = "float32"
    batch_size: int = Field(default=64, ge=1)
    device: str | None = None
    memory: float = Field(default=4.0, gt=0)
    report_to: list[TrackerName] | None = None

    @field_validator("quantities", "through")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("each may be named once")
        return value

    @model_validator(mode="after")
    def _adds_up(self) -> LedgerConfig:
        if "fixed" not in self.through:
            raise ValueError(
                "through: optimizer alone adds up to nothing that can be held against the training; name "
                "fixed, optimizer"
            )
        if self.kinship is not None and "entropy" not in self.quantities:
            raise ValueError(
                f"kinship is of the entropy, which is not among the quantities "
                f"({', '.join(self.quantities)}); name it, too"
            )
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise ValueError(f"start = {self.start} must lie before stop = {self.stop}")
        return self

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes."""
        return int(self.memory * 2**30)
