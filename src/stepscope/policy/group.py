"""Processes that measure together: which one this is, and what they tell each other.

Every process runs the same code (SPMD). :meth:`Group.share` gives each its part of the work, and after each
pass the parts are put together, so that all hold the same, to the bit, and take the same branches. A group is
*entered* (:func:`entered`), never found: inside a training with a process group of its own a measurement is
that of one process unless someone enters. With one process every exchange is a no-op.

Rules for code that runs in a group:

- Exchanges are collective: every process makes the same ones in the same order. What decides on a branch
  around one is exchanged first, or comes from :meth:`Group.from_main`.
- Files are the first process's: others get what they need by :meth:`Group.from_main`.
- Random numbers belong to a sequence and position, never to a process.
- In a group with ``lockstep`` (parameters are sharded, so that a forward pass is itself collective),
  ``policy.passes.sweep`` makes every process run the same number of micro-batches.

An exchange whose partner has gone raises :class:`stepscope.errors.PeerError`; nothing waits for the dead.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from stepscope.errors import ConfigError, PeerError

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""How long an exchange waits for a process that is alive and at work: scoring answers takes its time."""


@dataclass(frozen=True)
class Group:
    """Some processes; the default is this one alone.

    Attributes:
        rank: which one this is, from 0; 0 is the main one, which keeps files and speaks.
        size: how many there are.
        device: the GPU of this one; None where there is none, or it is not asked for.
        lockstep: whether all have to run a model the same number of times.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    lockstep: bool = False
    _processes: Any = None

    @property
    def processes(self) -> Any:
        """Torch's process group; None for this process alone."""
        return self._processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that keeps files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of some items; see :meth:`deal`. In lockstep each has a part in every item."""
        return list(items) if self.lockstep else self.deal(items)[self.rank]

    def place_of_share(self, count: int) -> slice:
        """Where this process's part of so many items is, once the parts stand one after the other."""
        if self.lockstep:
            return slice(0, count)
        sizes = list(map(len, self.deal(range(count))))
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def deal(self, items: Sequence[T]) -> list[list[T]]:
        """Each process's part of some items, dealt there and back (0 1 1 0 0 1 ...).

        Of items that go from the most to the least work, parts are about equal work. Depends on nothing but
        the items' number.
        """
        if self.lockstep:
            return [list(items), *([] for _ in range(1, self.size))]
        period = 2 * self.size
        parts: list[list[T]] = [[] for _ in range(self.size)]
        for i, item in enumerate(items):
            k = i % period
            parts[min(k, period - 1 - k)].append(item)
        return parts

    def largest_share(self, count: int) -> int:
        """Most items that a process has of so many."""
        return count if self.lockstep else -(-count // self.size)

    def gather(self, own: T) -> list[T]:
        """What each process has, by rank; anything that can be pickled."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        with _exchange():
            dist.all_gather_object(found, own, group=self._processes)
        return found

    def merge(self, own: Mapping[int, T]) -> dict[int, T]:
        """What the processes have under different keys each, in the order of the keys."""
        return dict(sorted(item for part in self.gather(dict(own)) for item in part.items()))

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, on all: for whatever reads or writes files. Must be picklable.

        Raises:
            PeerError: on the others, where the main process has raised.
        """
        if self.size == 1:
            return make()
        found: list[Any] = [None]
        try:
            if self.is_main:
                found = [(make(),)]
        finally:
            with _exchange():
                dist.broadcast_object_list(found, group=self._processes, group_src=0)
        if found[0] is None:
            raise PeerError("the first process has stopped; what it says tells why")
        made: T = found[0][0]
        return made

    def least(self, value: float) -> float:
        """The smallest of the processes' numbers."""
        return min(self.gather(value))

    def most(self, value: float) -> float:
        """The largest of the processes' numbers."""
        return max(self.gather(value))

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes the sum over the processes, in place; the same bits on all.

        Args:
            tensors: in the same order on all processes, with the same shapes and types.
        """
        if self.size == 1:
            return
        with torch.no_grad(), _exchange():
            todo = [(tensor, tensor.detach().contiguous()) for tensor in tensors]
            works = [dist.all_reduce(whole, group=self._processes, async_op=True) for _, whole in todo]
            for (tensor, whole), work in zip(todo, works, strict=True):
                work.wait()
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    def scatter(self, own: Tensor, places: Sequence[int], count: int) -> Tensor:
        """Rows of all processes, each in its place: exact, since all others add 0 there.

        Args:
            own: (row, ...) those of this process.
            places: (row,) where they belong.
            count: rows in all; every place is one process's.

        Returns:
            (count, ...) on all processes.
        """
        found = own.new_zeros(count, *own.shape[1:])
        found[torch.as_tensor(places, dtype=torch.long, device=own.device)] = own
        self.sum_([found])
        return found

    def rows(self, own: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Rows of different lengths that the processes have under different keys, in the order of the keys.

        Args:
            own: one type of numbers on all processes.
        """
        if self.size == 1:
            return dict(sorted(own.items()))
        about = self.gather([(key, tuple(row.shape), row.dtype, row.device.type) for key, row in own.items()])
        found: dict[int, Tensor] = {}
        for source, listed in enumerate(about):
            if not listed:
                continue
            (_, _, dtype, kind), *_ = listed
            sizes = [torch.Size(shape).numel() for _, shape, _, _ in listed]
            if source == self.rank:
                flat = torch.cat([row.detach().reshape(-1) for row in own.values()])
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=self.device if kind == "cuda" else kind)
            with _exchange():
                dist.broadcast(flat, group=self._processes, group_src=source)
            parts = torch.split(flat, sizes)
            found |= {key: part.view(shape) for (key, shape, *_), part in zip(listed, parts, strict=True)}
        return dict(sorted(found.items()))

    def concatenated(self, own: Tensor) -> Tensor:
        """Tensors of one shape, by rank, one after the other along their first axis."""
        found = own.new_empty(self.size * len(own), *own.shape[1:])
        parts = [found[rank * len(own) : (rank + 1) * len(own)] for rank in range(self.size)]
        with _exchange():
            dist.all_gather(parts, own.contiguous(), group=self._processes)
        return found

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)


ALONE = Group()
_current: Group = ALONE  # of the whole process: consumers of gradients run in autograd's own threads, too


def current() -> Group:
    """The group that was entered; this process alone outside of one."""
    return _current


def launched() -> int:
    """How many processes were started together (torchrun, ``accelerate launch``); 1 where nobody says."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def entered(*, device: str | None = None, lockstep: bool = False) -> Iterator[Group]:
    """A block in which the processes that were started together measure together.

    Started alone, it is a block like any other. Where a training has made a process group, the processes are
    the same and the exchanges are kept apart from the training's.

    Args:
        device: what the configuration says; None takes the GPU of this process's ``LOCAL_RANK``, where there
            are GPUs, else the processor.
        lockstep: see :class:`Group`.

    Raises:
        ConfigError: more processes on this machine than GPUs.
        PeerError: the others cannot be reached.
    """
    if launched() == 1:
        yield _current
        return
    group = formed(device=device, lockstep=lockstep)
    try:
        with within(group):
            yield group
    finally:
        if not lockstep:  # torch's cache of layouts names the first group that had such tensors
            dist.destroy_process_group(group.processes)


def formed(*, device: str | None = None, lockstep: bool = False, patience: timedelta = PATIENCE) -> Group:
    """A group of the processes that were started together, to be entered by :func:`within`; an exchange.

    Args:
        device: as :func:`entered` takes it.
        lockstep: see :class:`Group`.
        patience: how long an exchange waits for another process.

    Raises:
        ConfigError: more processes on this machine than GPUs.
        PeerError: the others cannot be reached.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    place = _place(device) if on_gpu else None
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    with _exchange():
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=PATIENCE)
            atexit.register(_part)
        processes = dist.new_group(backend=backend, timeout=patience)
    return Group(dist.get_rank(), dist.get_world_size(), place, lockstep, processes)


@contextmanager
def within(group: Group) -> Iterator[None]:
    """A block in which this process measures together with the others of a group."""
    global _current
    before, _current = _current, group
    try:
        yield
    finally:
        _current = before


def _part() -> None:
    """At the end of the process, where nobody has done so before."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _place(device: str | None) -> torch.device:
    """The GPU of this process."""
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(
            f"{local + 1} processes or more on a machine with {there} GPU(s); start one for each, or give "
            "--device cpu"
        )
    if device not in (None, "cuda"):
        raise ConfigError(
            f"device: {device!r} for several processes, which have one GPU each; give cuda, or leave it out"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def _exchange() -> Iterator[None]:
    """Say it in one line where the others cannot be reached."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no class of their own for it
        reason = " ".join(str(error).split())[:200]
        raise PeerError(
            f"another of the processes that measure together has ended ({reason}); see what it says, and "
            "run the same again: what is finished is kept"
        ) from error
