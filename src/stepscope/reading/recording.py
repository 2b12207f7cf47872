"""The record of a training read back without torch: its settings, its batches, and where its vectors lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stepscope.errors import RunFolderError
from stepscope.results import FloatArray, Rollouts, RolloutTokens
from stepscope.results.recording import (
    FIGURES,
    FOLDER,
    GRADIENT,
    RECORD,
    SEQUENCES,
    START,
    STATE,
    STEPS,
    TOKENS,
    RunRecord,
    StepFigures,
    step_folder,
)


@dataclass(frozen=True)
class RecordedBatch:
    """The batch of one optimizer step, as its loss saw it.

    Attributes:
        figures: of the step.
        rollouts: the sequences in the loss: log-probs and entropies of the policy before the step; rewards
            are nan where the training did not tell them.
        token_weights: per sequence (tok,) w = -dLoss/dl, over all micro-batches.
        entropy_weights: per sequence (tok,) -dLoss/dH, of an entropy bonus; None where the loss has none.
        texts: what each response token adds to the text.
    """

    figures: StepFigures
    rollouts: Rollouts
    token_weights: tuple[FloatArray, ...]
    entropy_weights: tuple[FloatArray, ...] | None
    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class RecordFolder:
    """A record on disk; every part is read when it is asked for.

    Attributes:
        path: the folder with ``record.json``.
    """

    path: Path

    @cached_property
    def record(self) -> RunRecord:
        """What holds for all steps.

        Raises:
            RunFolderError: it is missing, damaged or of another version.
        """
        return RunRecord.read(self.path / RECORD)

    @cached_property
    def steps(self) -> range:
        """Numbers of the steps recorded, without a gap.

        Raises:
            RunFolderError: there are none, or one between others is missing.
        """
        there = recorded_steps(self.path)
        first = self.record.first_step
        expected = range(first, first + len(there))
        if not there:
            raise RunFolderError(f"{self.path}: no step is recorded; train with the recorder again")
        if list(expected) != there:
            lacking = next(i for i in expected if i not in there)
            raise RunFolderError(
                f"{self.path / STEPS}: step {lacking} is missing, and {there[-1]} is there; restore the "
                "folder from a copy, or record the training again"
            )
        return expected

    def figures(self, index: int) -> StepFigures:
        """Figures of a step.

        Raises:
            RunFolderError: it is not recorded, or its file is damaged.
        """
        return StepFigures.read(self.folder(index) / FIGURES)

    def batch(self, index: int) -> RecordedBatch:
        """The batch of a step.

        Raises:
            RunFolderError: it is not recorded, or a file of it is damaged.
        """
        folder = self.folder(index)
        rollouts = Rollouts.from_parquet(folder / SEQUENCES, folder / TOKENS, graded=False)
        tokens = RolloutTokens.read(folder / TOKENS)
        if tokens.token_weight is None:
            raise RunFolderError(
                f"{folder / TOKENS}: column token_weight is missing; record the training again"
            )
        cuts = np.cumsum(rollouts.num_tokens)[:-1]
        weights = tokens.entropy_weight
        return RecordedBatch(
            figures=self.figures(index),
            rollouts=rollouts,
            token_weights=tuple(np.split(tokens.token_weight, cuts)),
            entropy_weights=None if weights is None else tuple(np.split(weights, cuts)),
            texts=tuple(tuple(row) for row in np.split(tokens.token, cuts)),
        )

    def folder(self, index: int) -> Path:
        """Where the files of a step lie.

        Raises:
            RunFolderError: it is not recorded.
        """
        if index not in self.steps:
            raise RunFolderError(
                f"{self.path}: step {index} is not recorded, steps {self.steps[0]} to {self.steps[-1]} are"
            )
        return step_folder(self.path, index)

    def gradient(self, index: int) -> Path:
        """The gradient that the optimizer took in a step, after clipping, by parameter."""
        return self.folder(index) / GRADIENT

    def state(self, index: int) -> Path | None:
        """Parameters and moments after a step, and of the start before the first; None where not kept."""
        if index == self.record.first_step - 1:
            return self.path / START
        path = self.folder(index) / STATE
        return path if path.is_file() else None


def recorded_steps(record: Path) -> Sequence[int]:
    """Numbers of the steps whose folders are whole, in order."""
    return sorted(int(p.name) for p in (record / STEPS).glob("*") if p.name.isdigit() and p.is_dir())


def find_record(run: Path) -> RecordFolder:
    """The record of a run, given its folder or the record's own.

    Raises:
        RunFolderError: there is none.
    """
    for folder in (run, run / FOLDER):
        if (folder / RECORD).is_file():
            return RecordFolder(folder)
    raise RunFolderError(
        f"{run}: no {FOLDER}/{RECORD}, so this training was not recorded; train with `rl.record`, or with "
        "callbacks=[stepscope.StepRecorder(OUT)]"
    )
