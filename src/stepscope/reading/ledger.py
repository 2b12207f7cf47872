"""A ledger read back: what ``stepscope ledger`` left in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.reading.folder import Folder
from stepscope.results.ledger import LEDGER, STEPS, TOKENS, Account, Ledger, LedgerSteps, LedgerTokens


@dataclass(frozen=True)
class LedgerFolder(Folder):
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
