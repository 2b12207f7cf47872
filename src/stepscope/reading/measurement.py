"""A measurement read back: what ``stepscope measure`` left in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.reading.folder import Folder, S
from stepscope.results import Rollouts, RolloutTokens, read_arrays
from stepscope.results.change import Changes
from stepscope.results.criteria import Criteria, CriteriaTokens, Pareto
from stepscope.results.curvature import CurvatureReport
from stepscope.results.frames import flat, frame, labelled
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
from stepscope.results.views import Plotted, Readable
from stepscope.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

SUMMARY, KERNELS = "summary.json", "kernel.safetensors"


@dataclass(frozen=True)
class Measurement(Plotted, Readable, Folder):
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

    @property
    def quantity(self) -> str:
        """Whose change it is: of the sweep, or else of the influences."""
        if self.change is not None:
            return self.change.quantity
        known = self.influence_sequences
        return "entropy" if known is None or not len(known) else str(known.quantity[0])

    @cached_property
    def influence_unit(self) -> tuple[float, str] | None:
        """Learning rate and unit that influences have without a sweep: known in memory alone."""
        return None

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
        return self._arrays(KERNELS, names)

    def kernel_frame(self, name: str = "") -> pd.DataFrame | None:
        """One kernel of sequences with prompts and sequence ids on both axes; None where no stage made one.

        Args:
            name: as in ``kernel.json``; by default the last one of the update batch in cosine form.

        Raises:
            RunFolderError: no kernel of sequences has that name.
        """
        kernel = self.kernel
        if kernel is None:
            return None
        known = [n for n in kernel.matrices if not n.startswith("tokens_")]
        cosine = [n for n in known if n.startswith("update_") and n.endswith("_cosine")]
        name = name or (cosine[-1] if cosine else "")
        if name not in known:
            raise RunFolderError(f"{self.path}: no kernel {name!r}, it has {', '.join(known)}")
        matrix = (self.kernel_matrices(name) or {})[name]
        of = "probe" if name.startswith("probe_") else "update"
        rows = kernel.probe_prompt_ids if of == "probe" else kernel.update_prompt_ids
        return labelled(matrix, rows, kernel.update_prompt_ids, of=(of, "update"))

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

    def to_pandas(self) -> pd.DataFrame:
        """The headline figures, a row each by name."""
        rows = [{"figure": n, **flat(value), "method": value.method} for n, value in self.summary.items()]
        return frame(rows).set_index("figure")


class InMemory(Measurement):
    """A measurement of which some artifacts are in memory, and none in files.

    Args:
        found: artifacts by the names of a measurement's; ``matrices`` are the kernels.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        super().__init__(Path())
        self.__dict__.update({"summary": {}, **found})  # where a cached property looks first

    def stored(self, kind: type[S], name: str) -> S | None:
        """None: what is not given is not there."""
        return None

    @property
    def config(self) -> None:
        """None."""

    @property
    def provenance(self) -> None:
        """None."""

    def _rollouts(self, name: str) -> Rollouts | None:
        return None

    def _arrays(self, name: str, wanted: tuple[str, ...]) -> dict[str, npt.NDArray[Any]] | None:
        known: Mapping[str, npt.NDArray[Any]] = self.__dict__.get("matrices", {})
        return {n: known[n] for n in wanted or known if n in known} if name == KERNELS else None


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
