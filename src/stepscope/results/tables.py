"""Tables: frozen dataclasses with a column per field, written to parquet and read back by the same class.

Parquet files appear whole or not at all, and every page has a checksum. Columns that a class does not know
pass unread: a table may be joined with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stepscope.errors import RunFolderError
from stepscope.results.brief import Brief, framed
from stepscope.results.files import whole
from stepscope.results.records import CURE, VERSION, BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    import pandas as pd

TextArray = Annotated[npt.NDArray[np.object_], "texts"]
"""(row,) texts."""

IdArray = Annotated[npt.NDArray[np.object_], "integers"]
"""(row,) integers, None where there is none."""


class Column(NamedTuple):
    """What a column of a file must be.

    Attributes:
        type: of its values.
        nullable: some may be missing.
        optional: the whole column may be missing.
    """

    type: pa.DataType
    nullable: bool = False
    optional: bool = False


_COLUMNS: tuple[tuple[Any, Column], ...] = (
    (FloatArray, Column(pa.float64())),
    (IntArray, Column(pa.int64())),
    (BoolArray, Column(pa.bool_())),
    (TextArray, Column(pa.string())),
    (IdArray, Column(pa.int64(), nullable=True)),
)


class Table(Brief):
    """Base of what is written to a parquet file of its own.

    Subclasses are frozen dataclasses of (row,) arrays: numbers, flags, texts, ids; the same or None where a
    file may lack the column; and at most one mapping of name to floats, for columns of any name.
    """

    format_version: ClassVar[int] = 1
    """Raised when a column is added, removed or means something else."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def to_arrow(self) -> pa.Table:
        """The columns in their order."""
        known, rest = _schema(type(self))
        columns = {
            name: pa.array(values, column.type, from_pandas=False)
            for name, column in known.items()
            if (values := getattr(self, name)) is not None
        }
        others = {} if rest is None else getattr(self, rest)
        assert not columns.keys() & others.keys()
        columns |= {name: np.asarray(values, dtype=np.float64) for name, values in others.items()}
        return pa.table(columns).replace_schema_metadata({VERSION: str(self.format_version)})

    def _repr_html_(self) -> str:
        """The first rows and the last, as pandas shows them."""
        rows = self.to_pandas().to_html(max_rows=10, border=0)
        return framed(f"<p>{type(self).__name__}, {len(self):,} rows</p>{rows}")

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a data frame of pandas."""
        return self.to_arrow().to_pandas()

    def write(self, path: Path) -> None:
        """Write the table; the file appears whole or not at all."""
        write_table(self.to_arrow(), path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The table that :meth:`write` wrote.

        Raises:
            RunFolderError: the file is missing, damaged, of another version, lacks a column, or holds one of
                another type or with nulls.
        """
        known, rest = _schema(cls)
        stored = read_table(path)
        found = (stored.schema.metadata or {}).get(VERSION.encode(), b"none").decode(errors="replace")
        if found != str(cls.format_version):
            raise RunFolderError(
                f"{path}: {VERSION} {found}, and this stepscope reads version {cls.format_version} of "
                f"{cls.__name__}; {CURE}"
            )
        wanted = dict(known)
        if rest is not None:
            others = [name for name in stored.column_names if name not in known]
            wanted |= dict.fromkeys(others, Column(pa.float64()))
        table = checked(stored, wanted, path)
        values = {
            name: _values(table.column(name), column) if name in table.column_names else None
            for name, column in wanted.items()
        }
        if rest is not None:
            values[rest] = {name: values.pop(name) for name in others}
        return cls(**values)

    @classmethod
    def joined(cls, tables: Sequence[Self]) -> Self:
        """The rows of several tables, one after another."""
        known, rest = _schema(cls)
        joined: dict[str, Any] = {n: np.concatenate([getattr(table, n) for table in tables]) for n in known}
        if rest is not None:
            others = [getattr(table, rest) for table in tables]
            joined[rest] = {name: np.concatenate([own[name] for own in others]) for name in others[0]}
        return cls(**joined)

    def where(self, rows: BoolArray) -> Self:
        """The rows at which ``rows`` is True."""
        known, rest = _schema(type(self))
        chosen: dict[str, Any] = {n: None if (v := getattr(self, n)) is None else v[rows] for n in known}
        if rest is not None:
            chosen[rest] = {name: values[rows] for name, values in getattr(self, rest).items()}
        return type(self)(**chosen)


def _schema(kind: type[Table]) -> tuple[dict[str, Column], str | None]:
    """The columns of a class, and its field for columns of any name."""
    hints = get_type_hints(kind, include_extras=True)
    known: dict[str, Column] = {}
    rest = None
    for field in fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        if hint == Mapping[str, FloatArray]:
            rest = field.name
            continue
        optional = type(None) in get_args(hint)
        own = get_args(hint)[0] if optional else hint
        (column,) = (found for kind_of, found in _COLUMNS if kind_of == own)
        known[field.name] = column._replace(optional=optional)
    return known, rest


def _values(column: pa.ChunkedArray, kind: Column) -> Any:
    if kind.nullable or kind.type == pa.string():
        return np.array(column.to_pylist(), dtype=np.object_)
    return np.array(column.to_numpy())


def checked(table: pa.Table, columns: Mapping[str, Column], path: Path, cure: str = CURE) -> pa.Table:
    """The columns asked for, of their types and without nulls where there can be none.

    Raises:
        RunFolderError: naming the column.
    """
    there = {n: c for n, c in columns.items() if n in table.column_names or not c.optional}
    if missing := [name for name in there if name not in table.column_names]:
        raise RunFolderError(f"{path}: column(s) {', '.join(missing)} missing; {cure}")
    found = []
    for name, kind in there.items():
        column = table.column(name)
        try:
            column = column.cast(kind.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RunFolderError(
                f"{path}: column {name} is {column.type}, expected {kind.type}; {cure}"
            ) from error
        nulls = column.null_count
        if pa.types.is_list(kind.type):
            nulls += pc.list_flatten(column).null_count
        if nulls and not kind.nullable:
            raise RunFolderError(f"{path}: column {name} holds {nulls} nulls, expected none; {cure}")
        found.append(column)
    return pa.table(found, names=list(there), metadata=table.schema.metadata)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as parquet with a checksum for every page; the file appears whole or not at all."""
    whole(path, lambda partial: pq.write_table(table, partial, write_page_checksum=True))


def read_table(path: Path) -> pa.Table:
    """Read a parquet file, its pages verified where they have checksums.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if not path.exists() else str(error).splitlines()[0]
        raise RunFolderError(f"{path}: cannot be read as parquet ({reason}); write it again") from error
