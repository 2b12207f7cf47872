"""What a stage declares: what it reads, what it writes, which keys of the configuration it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from stepscope.config import Stage
from stepscope.pipeline.stages.session import Session
from stepscope.stats import Estimate

Figures = dict[str, Estimate]
"""Figures for ``summary.json`` by name."""

POLICY = ("checkpoint", "precision", "device", "loss")
"""Keys that say which policy is measured; all stages that need one depend on them."""

UPDATE = ("update.parquet", "update_tokens.parquet")
PROBE = ("probe.parquet", "probe_tokens.parquet")
STEP = ("step.json", "direction.safetensors")


@dataclass(frozen=True)
class Plan:
    """One stage.

    Attributes:
        name: as ``--stages`` takes it.
        work: does it, writes the files, returns figures for ``summary.json``.
        reads: artifacts of other stages that it cannot do without.
        writes: what it leaves; a file that an earlier stage wrote, too, is completed.
        config: keys of the configuration that what it leaves depends on.
        needs_policy: whether the model is needed, too.
        shows_all: it also shows whatever else is there.
    """

    name: Stage
    work: Callable[[Session], Figures]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    config: tuple[str, ...]
    needs_policy: bool = True
    shows_all: bool = False


def stage(
    *, reads: tuple[str, ...] = (), writes: tuple[str, ...], config: tuple[str, ...]
) -> Callable[[Callable[[Session], Figures]], Plan]:
    """Declare the function that does a stage, and has its name."""
    return lambda work: Plan(cast(Stage, work.__name__), work, reads, writes, (*POLICY, *config))
