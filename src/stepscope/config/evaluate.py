"""Configuration of ``stepscope eval``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stepscope.config.measure import Asking, Precision
from stepscope.config.sampler import SamplerConfig

TrackerName = Literal["tensorboard", "wandb", "trackio"]
"""A tracker that shows histograms and coloured responses."""


def _one_and_eight() -> list[int]:
    return [1, 8]


class EvalSettings(Asking):
    """How checkpoints are evaluated.

    Attributes:
        num_prompts: prompts.
        samples_per_prompt: responses per prompt.
        seed: of prompts and sampling.
        split: split of the task.
        ks: numbers of samples k for pass@k; 1 is always among them. By default 1 and 8, or as
            many as there are.
        temperatures: further sampling temperatures, for profiles; every one with every ``top_ps``.
        top_ps: nuclei for profiles: only the smallest set of tokens that holds this much probability.
        sampler: who draws the responses; a server has one checkpoint, and the others are refused.
        bootstrap: resamples of the prompts for intervals of the entropy law; 0 leaves its errors to the
            delta method.
        precision: floating-point type.
        batch_size: most sequences per forward pass, fewer where the memory at hand does not hold them, or
            ``auto``: as many as it holds (at most 64 on a CPU). The responses do not depend on it.
        device: torch device, or null for a GPU where there is one.
        report_to: trackers that the figures, histograms and coloured responses go to, under
            ``stepscope/eval/...``; null for TensorBoard where there is a folder ``tensorboard`` beside the
            table, ``[]`` for none.
    """

    num_prompts: int = Field(default=128, ge=2)
    samples_per_prompt: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)
    split: Literal["train", "test"] = "test"
    ks: list[int] = Field(default_factory=_one_and_eight, min_length=1)
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    top_ps: list[Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=list)
    sampler: SamplerConfig = SamplerConfig()
    bootstrap: int = Field(default=0, ge=0)
    precision: Precision = "float32"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    device: str | None = None
    report_to: list[TrackerName] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_more_than_samples(cls, given: Any) -> Any:
        """Unless asked for, no k is above the number of samples."""
        samples = given.get("samples_per_prompt") if isinstance(given, dict) else None
        if not isinstance(samples, int) or "ks" in given or not 1 <= samples < max(_one_and_eight()):
            return given
        return {**given, "ks": sorted({1, samples})}

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSettings:
        if max(self.ks) > self.samples_per_prompt or min(self.ks) < 1:
            raise ValueError(
                f"ks must lie between 1 and samples_per_prompt = {self.samples_per_prompt}, got {self.ks}"
            )
        own = SamplerConfig(engine="transformers")
        if any(
            getattr(self.sampler, k) != getattr(own, k) for k in ("temperature", "top_p", "top_k", "min_p")
        ):
            raise ValueError(
                "an evaluation samples from the policy itself; for other ways give temperatures and top_ps, "
                "not sampler.temperature, top_p, top_k or min_p"
            )
        return self


class EvalConfig(EvalSettings):
    """Configuration of ``stepscope eval``.

    Attributes:
        source: a checkpoint, or a run folder whose checkpoints are all evaluated.
        out: parquet file written, or null for ``eval.parquet`` in the run folder (or in a lone checkpoint).
    """

    source: str
    out: str | None = None
