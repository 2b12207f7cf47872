"""A batch size that fits the memory, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import find_executable_batch_size

from stepscope.errors import MeasurementError

_T = TypeVar("_T")


class FittingBatch:
    """The largest batch size that has not run out of memory yet.

    Attributes:
        size: sequences at a time; halved whenever the memory does not suffice, and kept from then on.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, work: Callable[[int], _T]) -> _T:
        """``work(size)``, again with half the size after each out-of-memory error.

        Raises:
            MeasurementError: not even one sequence fits.
        """

        def attempt(batch_size: int) -> _T:
            return work(batch_size)

        result: _T = find_executable_batch_size(
            attempt, starting_batch_size=self.size, reduce_batch_size_fn=self._halve
        )()
        return result

    def _halve(self) -> int:
        if self.size == 1:
            raise MeasurementError(
                "evaluation: out of memory with a single sequence; shorten max_response_tokens, use "
                "--precision bfloat16 or a device with more memory"
            )
        self.size //= 2
        return self.size
