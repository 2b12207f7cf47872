"""A measurement read back: what ``stepscope measure`` left in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.reading.folder import Folder
from stepscope.results import Rollouts, RolloutTokens, read_arrays
from stepscope.results.brief import html_figures
from stepscope.results.change import Changes
from stepscope.results.criteria import Criteria, CriteriaTokens, Pareto
from stepscope.results.curvature import CurvatureReport
from stepscope.results.frontier import Frontier
from stepscope.results.influence import (
    InfluenceSequences,
    InfluenceTokenFolds,
    InfluenceTokens,
    Reliabilities,
)
from stepscope.results.kernel import KernelReport
from stepscope.results.kinship import STEP_KINSHIP, StepKinship
from stepscope.results.mismatch import SamplerReport
from stepscope.results.models import ModelsReport
from stepscope.results.noise import NoiseScales
from stepscope.results.records import CURE
from stepscope.results.step import StepReport
from stepscope.results.summary import Summary
from stepscope.results.validation import Validation, Validations
from stepscope.stats import Estimate

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Measurement(Folder):
    """The artifacts of one measurement, each read when it is first asked for; see :class:`Folder`.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoint_step(self) -> int | None:
        """Optimizer step of the checkpoint, where the folder's name (``step-10``) gives it."""
        number = re.fullmatch(r"step-(\d+)", self.path.name)
        return int(number.group(1)) if number else None

    @cached_property
    def summary(self) -> Mapping[str, Estimate]:
        """The headline figures by name."""
        return runs.read_record(Summary, self.path / SUMMARY).figures

    @cached_property
    def update(self) -> Rollouts | None:
        """The batch that makes the step."""
        return self._rollouts("update")

    @cached_property
    def probe(self) -> Rollouts | None:
        """The batch on which changes are measured."""
        return self._rollouts("probe")

    @cached_property
    def update_tokens(self) -> RolloutTokens | None:
        """The update batch's response tokens."""
        return self.stored(RolloutTokens, "update_tokens.parquet")

    @cached_property
    def probe_tokens(self) -> RolloutTokens | None:
        """The probe batch's response tokens."""
        return self.stored(RolloutTokens, "probe_tokens.parquet")

    @cached_property
    def sampler(self) -> SamplerReport | None:
        """Sampler against policy, for the batches that the policy itself did not draw."""
        return self.stored(SamplerReport, "sampler.json")

    @cached_property
    def step(self) -> StepReport | None:
        """The figures of the optimizer step."""
        return self.stored(StepReport, "step.json")

    def direction(self, *names: str) -> dict[str, npt.NDArray[Any]] | None:
        """The step's direction by parameter; only those named, where names are given."""
        return self._arrays("direction.safetensors", names)

    @cached_property
    def change(self) -> Changes | None:
        """The change of each quantity over the learning rates."""
        return self.stored(Changes, "change.json")

    @cached_property
    def influence_sequences(self) -> InfluenceSequences | None:
        """Influence of the update batch's sequences and of the other parts of the step."""
        return self.stored(InfluenceSequences, "influence_sequences.parquet")

    @cached_property
    def influence_tokens(self) -> InfluenceTokens | None:
        """Influence of the update batch's tokens."""
        return self.stored(InfluenceTokens, "influence_tokens.parquet")

    @cached_property
    def influence_token_folds(self) -> InfluenceTokenFolds | None:
        """What each fold of the probe says of the influence of the update batch's tokens."""
        return self.stored(InfluenceTokenFolds, "influence_token_folds.parquet")

    @cached_property
    def reliability(self) -> Reliabilities | None:
        """How sure the rankings by influence are."""
        return self.stored(Reliabilities, "reliability.json")

    @cached_property
    def validation(self) -> Mapping[str, Validation] | None:
        """Influence against steps made again, by way of leaving out."""
        found = self.stored(Validations, "validation.json")
        return None if found is None else found.by_way

    @cached_property
    def kernel(self) -> KernelReport | None:
        """Structure of the kernels between sequences."""
        return self.stored(KernelReport, "kernel.json")

    def kernel_matrices(self, *names: str) -> dict[str, npt.NDArray[Any]] | None:
        """The kernels by name; only those named, where names are given."""
        return self._arrays("kernel.safetensors", names)

    @cached_property
    def models(self) -> ModelsReport | None:
        """Models of the kernel, and the test of its spectrum."""
        return self.stored(ModelsReport, "models.json")

    @cached_property
    def curvature(self) -> CurvatureReport | None:
        """Sums, noise and spectrum of the second-order kernels."""
        return self.stored(CurvatureReport, "curvature.json")

    def curvature_matrices(self, *names: str) -> dict[str, npt.NDArray[Any]] | None:
        """The second-order kernels by name; only those named, where names are given."""
        return self._arrays("curvature.safetensors", names)

    @cached_property
    def kinship(self) -> StepKinship | None:
        """What the tokens of the step act on."""
        return self.stored(StepKinship, STEP_KINSHIP)

    @cached_property
    def noise(self) -> NoiseScales | None:
        """The gradient noise scales."""
        return self.stored(NoiseScales, "noise.json")

    @cached_property
    def criteria(self) -> Criteria | None:
        """The leaderboard, and what influence goes with."""
        return self.stored(Criteria, "criteria.json")

    @cached_property
    def criteria_tokens(self) -> CriteriaTokens | None:
        """Scores and truths of the update batch's tokens."""
        return self.stored(CriteriaTokens, "criteria_tokens.parquet")

    @cached_property
    def pareto(self) -> Pareto | None:
        """Steps made without the tokens that a criterion would drop."""
        return self.stored(Pareto, "pareto.json")

    @cached_property
    def frontier(self) -> Frontier | None:
        """The most reward that other weights of the batch buy at a change of the entropy."""
        return self.stored(Frontier, "frontier.json")

    def _rollouts(self, name: str) -> Rollouts | None:
        sequences, tokens = self.path / f"{name}.parquet", self.path / f"{name}_tokens.parquet"
        if not sequences.is_file():
            return None
        return Rollouts.from_parquet(runs.verified(sequences), runs.verified(tokens))

    def _arrays(self, name: str, wanted: tuple[str, ...]) -> dict[str, npt.NDArray[Any]] | None:
        path = self.path / name
        return read_arrays(runs.verified(path), wanted or None) if path.is_file() else None

    def _repr_html_(self) -> str:
        return html_figures(f"Measurement {self.path}", self.summary)


def load_measurement(path: Path | str) -> Measurement:
    """Read back what ``stepscope measure`` left in a folder.

    Raises:
        RunFolderError: there is no ``summary.json`` in it, or a damaged one, or it is of another version.
    """
    found = Measurement(Path(path))
    if not (found.path / SUMMARY).is_file():
        raise RunFolderError(
            f"{found.path}: no {SUMMARY}, so this is not a finished measurement; run `stepscope measure`"
        )
    runs.check_version(found.path)
    if not found.summary:
        raise RunFolderError(f"{found.path / SUMMARY}: holds no figures; {CURE}")
    return found
