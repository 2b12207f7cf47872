"""A verb that several processes run together: the first one keeps the folder and speaks, and all end as one.

Every process runs the verb. Files are written, and lines, warnings and progress bars shown, by the first one
alone (:func:`main_only`; what the others would write or say goes nowhere). The process that fails first says
why, in the one line or the traceback that it would have alone; the others end with it and are silent. Who
waits for a process that has gone learns of it from the connection.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from stepscope.errors import PeerError
from stepscope.policy.group import Group, current, entered, launched
from stepscope.processes import FAREWELL
from stepscope.results.files import kept_by_another

_FAILED = "failed"
_entries = 0  # so far, the same on all processes


@contextmanager
def together(device: str | None, folder: Path, *, lockstep: bool = False) -> Iterator[Group]:
    """A block that all processes which were started together run, as one measurement.

    Args:
        device: what the configuration says.
        folder: which the first process keeps.
        lockstep: whether they run models together, which are sharded.
    """
    if launched() == 1:
        yield current()
        return
    global _entries
    _entries += 1
    store = None
    try:
        with entered(device=device, lockstep=lockstep) as group:
            try:
                with nullcontext() if group.is_main else _silent(folder):
                    yield group
            except BaseException as error:  # it goes on as it came
                store = _tell(error)
                raise
    finally:
        if store is not None:
            _wait_for_others(store)


def main_only(block: Callable[[], AbstractContextManager[object]]) -> AbstractContextManager[object]:
    """The block that a function makes, on the first process; none on the others."""
    return block() if current().is_main else nullcontext()


@contextmanager
def _silent(folder: Path) -> Iterator[None]:
    """Nothing is said inside the block, nor written in the folder."""
    before = logging.root.manager.disable
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        logging.disable(logging.CRITICAL)
        try:
            with kept_by_another(folder):
                yield
        finally:
            logging.disable(before)


def _tell(error: BaseException) -> Store | None:
    """Leave word that this process has failed, before the others can notice; only the first one speaks on."""
    patience = time.monotonic() + (FAREWELL if isinstance(error, PeerError) else 0.0)
    try:
        store = _store()
        while time.monotonic() < patience and not store.add(_FAILED, 0):
            time.sleep(0.05)  # who merely noticed leaves the word to the one who knows why
        if store.add(_FAILED, 1) > 1:
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (it stays so)
    except RuntimeError:  # the machine of the store has gone, and so has whoever else could speak
        return None
    return store


def _wait_for_others(store: Store) -> None:
    """Let them end by themselves, with what they have to put away."""
    deadline = time.monotonic() + FAREWELL
    try:
        while store.add(_FAILED, 0) < launched() and time.monotonic() < deadline:
            time.sleep(0.05)
    except RuntimeError:
        return


def _store() -> Store:
    """Where the processes meet, and each can leave a word."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_entries}"
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=FAREWELL))
    return PrefixStore(f"stepscope/{attempt}", store)
