"""The arguments of a TRL run, read with their types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.settings.training_args import TrainingArguments


class TrlArguments:
    """Typed access: a value of another type is named instead of failing further on."""

    def __init__(self, found: TrainingArguments, path: Path) -> None:
        self.origin = found.origin
        self.values = found.values
        self.path = path

    def __call__(self, name: str, default: Any) -> Any:
        """The argument; None counts as absent where the default is not None."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int) -> int:
        """An argument that counts something.

        Raises:
            CheckpointError: it is no positive integer.
        """
        value = self(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.path}: {name} is {said(value)}, expected a positive number; copy the file again"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """An argument that is a number.

        Raises:
            CheckpointError: it is none.
        """
        value = self(name, default)
        if not isinstance(value, (int, float)):
            raise CheckpointError(
                f"{self.path}: {name} is {said(value)}, expected a number; copy the file again"
            )
        return float(value)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.count("gradient_accumulation_steps", 1)

    @property
    def processes(self) -> int:
        """Processes, each with a micro-batch of its own."""
        counts = (getattr(self.values.get("distributed_state"), "num_processes", 1), self("_n_gpu", 1))
        return max(1, *(count for count in counts if isinstance(count, int)))

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch over all processes."""
        return self.count("per_device_train_batch_size", 1) * self.processes

    @property
    def cuts(self) -> str:
        """How a step's batch is cut; empty where it is one piece."""
        parts = [f"gradient_accumulation_steps={self.accumulation}"] * (self.accumulation > 1)
        parts += [f"{self.processes} processes"] * (self.processes > 1)
        return " and ".join(parts)


def said(value: Any) -> str:
    """An untrusted value, short enough for a line."""
    if isinstance(value, str):
        return json.dumps(value[:60])
    small = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return str(value) if small else f"a {type(value).__name__[:40]}"
