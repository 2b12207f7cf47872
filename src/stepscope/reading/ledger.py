"""A ledger read back: what ``stepscope ledger`` left in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stepscope import runs
from stepscope.errors import MeasurementError, RunFolderError
from stepscope.reading import rollups
from stepscope.reading.folder import Folder
from stepscope.reading.recording import RecordFolder, find_record
from stepscope.reading.rollups import Entries, Way
from stepscope.results.kinship import KIN_ROWS, KINSHIP, KinRows, Kinship
from stepscope.results.ledger import (
    FOLDS,
    LEDGER,
    PARTS,
    ROLLUPS,
    STEPS,
    TOKEN_FOLDS,
    TOKENS,
    Account,
    Ledger,
    LedgerFolds,
    LedgerSteps,
    LedgerTokenFolds,
    LedgerTokens,
    fold_sums,
)
from stepscope.results.rollups import LedgerRollups
from stepscope.results.views import Plotted, Readable
from stepscope.results.what_if import CURVES, SUMMARY, WHAT_IF, WhatIf, WhatIfCurves
from stepscope.rules import TokenRule
from stepscope.rules.token_classes import Labels
from stepscope.runs import RunFolder
from stepscope.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class WhatIfFolder(Plotted, Folder):
    """A what-if of one rule.

    Attributes:
        path: the folder.
    """

    path: Path

    @cached_property
    def result(self) -> WhatIf:
        """What it comes to at the last step."""
        return runs.read_record(WhatIf, self.path / SUMMARY)

    @cached_property
    def curves(self) -> WhatIfCurves:
        """A row per quantity, dose, path and place."""
        return runs.read_record(WhatIfCurves, self.path / CURVES)

    def to_pandas(self) -> pd.DataFrame:
        """The curves: a row per quantity, dose, path and place."""
        return self.curves.to_pandas()


@dataclass(frozen=True)
class LedgerFolder(Plotted, Readable, Folder):
    """The artifacts of an account, each read when it is first asked for; see :class:`Folder`.

    Attributes:
        path: the folder.
    """

    path: Path

    @cached_property
    def ledger(self) -> Ledger:
        """The account of every quantity."""
        return runs.read_record(Ledger, self.path / LEDGER)

    @cached_property
    def tokens(self) -> LedgerTokens:
        """A row per token of every batch, quantity and way."""
        return runs.read_record(LedgerTokens, self.path / TOKENS)

    @cached_property
    def steps(self) -> LedgerSteps:
        """A row per step and quantity."""
        return runs.read_record(LedgerSteps, self.path / STEPS)

    @cached_property
    def token_folds(self) -> LedgerTokenFolds:
        """What each fold of the probe says of a token."""
        return runs.read_record(LedgerTokenFolds, self.path / TOKEN_FOLDS)

    @cached_property
    def folds(self) -> LedgerFolds:
        """What each fold of the probe says of the batch of a step."""
        return runs.read_record(LedgerFolds, self.path / FOLDS)

    @cached_property
    def rollups(self) -> LedgerRollups:
        """The entries added up by class of token, for every quantity and named way."""
        return runs.read_record(LedgerRollups, self.path / ROLLUPS)

    @cached_property
    def kinship(self) -> Kinship | None:
        """What the tokens acted on, or None where that was not asked for."""
        return self.stored(Kinship, KINSHIP)

    @cached_property
    def kin_rows(self) -> KinRows | None:
        """The same by step and prompt."""
        return self.stored(KinRows, KIN_ROWS)

    @cached_property
    def run(self) -> Path:
        """The folder of the training."""
        parts = self.path / PARTS
        return Path(RunFolder(parts).config()["run"]) if (parts / runs.CONFIG).is_file() else self.path

    @property
    def name(self) -> str:
        """Of the training."""
        return self.run.resolve().name

    @cached_property
    def record(self) -> RecordFolder:
        """The record of the training.

        Raises:
            RunFolderError: it is no longer where it was.
        """
        return find_record(self.run)

    @cached_property
    def recorded(self) -> pd.DataFrame:
        """The tokens of all batches in the account; see :func:`stepscope.reading.rollups.recorded_tokens`."""
        return rollups.recorded_tokens(self.record, self.ledger.first_step, self.ledger.last_step)

    def entries(self, quantity: str | None = None) -> Entries:
        """The tokens with their entries for a quantity, the first by default, whole and by fold."""
        name = self.account(quantity or self.ledger.quantity).quantity
        return Entries.of(self.recorded, self.tokens, self.token_folds, self.folds, name)

    def table(self, quantity: str | None = None) -> pd.DataFrame:
        """A row per token with what the record knows of it, and its entry for a quantity."""
        return self.entries(quantity).table

    def to_pandas(self, quantity: str | None = None) -> pd.DataFrame:
        """A row per token; the same as :meth:`table`."""
        return self.table(quantity)

    def by(self, way: Way, quantity: str | None = None) -> LedgerRollups:
        """Sums of the entries by class, with intervals.

        Args:
            way: ``quadrant``, ``kind``, ``rarity``, ``position``, ``pass_rate``, ``token``, ``prompt``,
                ``step``, or a function from the data frame of :meth:`table` to a label for each row.
            quantity: the first by default.
        """
        return self.entries(quantity).by(way)

    def top(self, count: int = 20, quantity: str | None = None) -> pd.DataFrame:
        """Tokens with the largest |influence|; see :meth:`stepscope.reading.rollups.Entries.top`."""
        return self.entries(quantity).top(count)

    def without(
        self, rule: str | Callable[[pd.DataFrame], Labels], dose: float = 1.0, quantity: str | None = None
    ) -> Estimate:
        """What leaving out some tokens would have done to a quantity by the last step, to first order.

        -dose times the sum of their entries, with clipping and second moments as they were: no token changes
        where later gradients are taken, or what is sampled. ``stepscope ledger RUN --without RULE`` follows
        the curve, further.

        Args:
            rule: as :meth:`stepscope.rules.TokenRule.parse` reads it, or a function from the data frame of
                :meth:`table` to True for each token that is left out.
            dose: share of their weight that is taken away.
            quantity: the first by default.

        Raises:
            ConfigError: no such rule.
            MeasurementError: no token is of it.
        """
        entries = self.entries(quantity)
        if isinstance(rule, str):
            inside = TokenRule.parse(rule).present(entries.table)
        else:
            inside = np.asarray(rule(entries.table), dtype=np.bool_)
            if inside.shape != (len(entries.table),) or not inside.any():
                raise MeasurementError(
                    f"the function gave {inside.size} values with {inside.sum()} tokens in them, of "
                    f"{len(entries.table)} tokens; it must give True or False for each row of the table, "
                    "True for at least one"
                )
        sums = fold_sums(entries.shares, -dose * entries.folds[:, inside].sum(1))
        unit = self.account(entries.quantity).unit
        method = (
            f"-{dose:g} times the entries of {int(inside.sum()):,} tokens, from {len(entries.shares)} folds"
        )
        return sums.estimate(unit, method)

    @cached_property
    def what_if(self) -> Mapping[str, WhatIfFolder]:
        """What ``stepscope ledger RUN --without RULE`` left, by rule."""
        folders = sorted(path.parent for path in (self.path / WHAT_IF).glob(f"*/{SUMMARY}"))
        found = [WhatIfFolder(folder) for folder in folders]
        return {each.result.rule: each for each in found}

    def account(self, quantity: str) -> Account:
        """The account of a quantity.

        Raises:
            RunFolderError: the ledger has none of it.
        """
        found = {account.quantity: account for account in self.ledger.accounts}
        if quantity not in found:
            raise RunFolderError(
                f"{self.path / LEDGER}: no account of {quantity!r}, it has {', '.join(found)}; make one with "
                "`stepscope ledger RUN --quantity`"
            )
        return found[quantity]


def load_ledger(path: Path | str) -> LedgerFolder:
    """Read back what ``stepscope ledger`` left in a folder.

    Raises:
        RunFolderError: the ledger is not finished, or a file is damaged or of another version.
    """
    found = LedgerFolder(Path(path))
    assert found.ledger.accounts
    return found
