"""Records as data frames of pandas: a row each, an estimate in several columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stepscope.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd


def frame(rows: Iterable[Any]) -> pd.DataFrame:
    """Records, or mappings of names to values, a row each, in their order.

    An estimate called ``x`` becomes ``x``, ``x_stderr``, ``x_low``, ``x_high`` (the 95 % interval),
    ``x_unit``, ``x_n``, ``x_reliable`` and ``x_reason``; records and mappings within get the name before
    theirs; arrays and lists are left out. What one row lacks is missing there.
    """
    import pandas as pd

    return pd.DataFrame([flat(row) for row in rows])


def flat(row: Any) -> dict[str, Any]:
    """One row of :func:`frame`."""
    return dict(_columns(row, ""))


def _columns(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    inner = f"{name}_" if name else ""
    if isinstance(value, Estimate):
        yield name or "value", value.value
        for part in ("stderr", "low", "high", "unit", "n", "reliable", "reason"):
            yield f"{inner}{part}", getattr(value, part)
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield from _columns(own, f"{inner}{key}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _columns(getattr(value, field.name), f"{inner}{field.name}")
    elif not isinstance(value, tuple | list | np.ndarray):
        yield name, value


def labelled(
    matrix: Any, rows: Sequence[str], columns: Sequence[str], *, of: tuple[str, str] = ("update", "update")
) -> pd.DataFrame:
    """A matrix between sequences with their prompts and numbers on both axes.

    Args:
        matrix: (row, column).
        rows: prompt of each row's sequence.
        columns: of each column's.
        of: batches that they are of.
    """
    import pandas as pd

    def axis(prompts: Sequence[str], batch: str) -> pd.MultiIndex:
        names = [f"{batch}_prompt_id", f"{batch}_sequence_id"]
        return pd.MultiIndex.from_arrays([list(prompts), range(len(prompts))], names=names)

    return pd.DataFrame(matrix, index=axis(rows, of[0]), columns=axis(columns, of[1]))
