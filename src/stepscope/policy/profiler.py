"""Where time and memory go, pass by pass: what a measurement with ``--profile`` writes down.

Every pass of a model over a batch goes through :func:`stepscope.policy.passes.sweep`, or generates responses;
both report here. Without a profiler at work nothing is called in their loops.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from stepscope.policy.forward import TokenBatch
from stepscope.results.profile import REST, Profile, ProfileRow

T = TypeVar("T")
_at_work: list[Profiler] = []
_PASSAGE = ("stepscope.policy.passes", "stepscope.policy.profiler")
_LIBRARY = "stepscope.policy."


@dataclass(frozen=True)
class _Event:
    """A micro-batch, or a stage where there is no ``work``; times in seconds since the profiler began."""

    stage: str
    work: str
    asked_by: str
    number: int
    sequences: int
    tokens: int
    padded: int
    start: float
    stop: float
    rise: float


class Profiler:
    """Writes down every micro-batch while it is at work, see :func:`profiling`.

    Attributes:
        device: whose memory is looked at; the process's resident memory where it is no GPU.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._events: list[_Event] = []
        self._begin = time.perf_counter()
        self._stage = ""
        self._passes = 0
        self._inside = False
        self._peak = math.nan

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block whose passes belong to a stage."""
        before, self._stage = self._stage, name
        start = self._now()
        try:
            yield
        finally:
            self._stage = before
            self._events.append(_Event(name, "", "", 0, 0, 0, 0, start, self._now(), math.nan))

    def pass_over(self) -> Callable[..., AbstractContextManager[None]]:
        """A new pass over a batch: makes the block of each of its micro-batches."""
        self._passes += 1
        number, asked_by = self._passes, _caller(sys._getframe(1))

        def block(work: str, sequences: int, tokens: int, padded: int) -> AbstractContextManager[None]:
            return self._micro_batch(work, asked_by, number, sequences, tokens, padded)

        return block

    @contextmanager
    def _micro_batch(
        self, work: str, asked_by: str, number: int, sequences: int, tokens: int, padded: int
    ) -> Iterator[None]:
        if self._inside:  # a pass within a pass is part of it
            yield
            return
        self._inside = True
        before = self._reset_peak()
        start = self._now()
        try:
            yield
        finally:
            stop = self._now()
            peak = self._read_peak()
            self._peak = max(peak, self._peak) if self._peak == self._peak else peak
            self._inside = False
            counts = number, sequences, tokens, padded
            self._events.append(_Event(self._stage, work, asked_by, *counts, start, stop, peak - before))

    def profile(self) -> Profile:
        """What was written down, by stage and kind."""
        stages = [e for e in self._events if not e.work]
        rows: list[ProfileRow] = []
        for stage in dict.fromkeys(e.stage for e in stages):
            kinds: dict[tuple[str, str], list[_Event]] = {}
            for event in self._events:
                if event.work and event.stage == stage:
                    kinds.setdefault((event.work, event.asked_by), []).append(event)
            own = [_row(stage, *kind, events) for kind, events in kinds.items()]
            whole = sum(e.stop - e.start for e in stages if e.stage == stage)
            rest = whole - sum(row.seconds for row in own)
            own.append(ProfileRow(stage, REST, "", 0, 0, 0, 0, 0, max(rest, 0.0), math.nan))
            rows += sorted(own, key=lambda row: -row.seconds)
        return Profile(tuple(rows), sum(e.stop - e.start for e in stages), self._peak)

    def write_trace(self, path: Path) -> None:
        """Every stage and micro-batch in Chrome's trace format, for Perfetto or ``chrome://tracing``."""
        events: list[dict[str, Any]] = []
        for e in sorted(self._events, key=lambda e: e.start):
            place = {"ph": "X", "pid": 0, "tid": 0, "ts": 1e6 * e.start, "dur": 1e6 * (e.stop - e.start)}
            if not e.work:
                events.append({"name": e.stage, "cat": "stage", **place})
                continue
            told = {"asked by": e.asked_by, "pass": e.number, "sequences": e.sequences}
            told |= {"tokens": e.tokens, "padded": e.padded}
            if math.isfinite(e.rise):
                told["rise in bytes"] = int(e.rise)
            events.append({"name": e.work, "cat": "pass", **place, "args": told})
        path.write_text(json.dumps({"traceEvents": events}) + "\n", encoding="utf-8")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self._begin

    def _reset_peak(self) -> float:
        """From now on the peak is looked at; what is in use now, in bytes."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return float(torch.cuda.memory_allocated(self.device))
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return math.nan
        return _resident("VmRSS")

    def _read_peak(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return _resident("VmHWM")


def _resident(key: str) -> float:
    """An entry of the process's status, in bytes; nan where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * float(line.split()[1]) for line in lines if line.startswith(key)), math.nan)


def _row(stage: str, work: str, asked_by: str, events: list[_Event]) -> ProfileRow:
    rises = [e.rise for e in events if e.rise == e.rise]
    return ProfileRow(
        stage=stage,
        work=work,
        asked_by=asked_by,
        passes=len({e.number for e in events}),
        micro_batches=len(events),
        sequences=sum(e.sequences for e in events),
        tokens=sum(e.tokens for e in events),
        padded=sum(e.padded for e in events),
        seconds=sum(e.stop - e.start for e in events),
        rise=max(rises, default=math.nan),
    )


def _caller(frame: FrameType | None) -> str:
    """The function outside ``policy`` that asked for a pass, as ``module.function``, or ""."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("stepscope.") and not module.startswith(_LIBRARY):
            return f"{module.rpartition('.')[2]}.{_outermost(frame.f_code.co_qualname)}"
        frame = frame.f_back
    return ""


def _outermost(qualname: str) -> str:
    """The function or method that a nested function stands in."""
    return qualname.partition(".<locals>")[0]


@contextmanager
def profiling(profiler: Profiler | None) -> Iterator[None]:
    """A block whose passes a profiler writes down; with None nothing is."""
    if profiler is None:
        yield
        return
    _at_work.append(profiler)
    try:
        yield
    finally:
        _at_work.remove(profiler)


def profiled_stage(name: str) -> AbstractContextManager[None]:
    """A block that is a stage for the profiler at work, if any is."""
    return _at_work[-1].stage(name) if _at_work else nullcontext()


def watched(run: Callable[[TokenBatch], T]) -> Callable[[TokenBatch], T]:
    """A function of a micro-batch that the profiler at work sees; the function itself where none is."""
    if not _at_work:
        return run
    block = _at_work[-1].pass_over()
    work = f"{run.__module__.rpartition('.')[2]}.{_outermost(run.__qualname__)}"

    def seen(batch: TokenBatch) -> T:
        with block(work, len(batch), int(batch.attention_mask.sum()), batch.input_ids.numel()):
            return run(batch)

    return seen


def generating(sequences: int, tokens: int) -> AbstractContextManager[None]:
    """A block that samples responses.

    Args:
        sequences: how many.
        tokens: of prompts, and of responses at most.
    """
    if not _at_work:
        return nullcontext()
    return _at_work[-1].pass_over()("generate", sequences, tokens, tokens)
