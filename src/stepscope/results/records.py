"""Records: frozen dataclasses that are written to a JSON artifact and read back by the class that wrote it.

The fields' types say everything: how a record becomes JSON, and what a file must hold to be read. Strict JSON
knows neither nan nor infinity, so both are null in the file, and null is read by the field's type: nan
(``stats.Number``, arrays), None (``... | None``), an infinite end (``stats.Estimate``). Properties are not
written: what a file holds, a field holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from stepscope.errors import RunFolderError
from stepscope.results.brief import Brief
from stepscope.results.files import whole, why_unreadable
from stepscope.stats import Estimate

VERSION = "format_version"
"""Key under which a file has the version of its record."""

CURE = "delete it and run the stage that writes it again"
"""What to do about a file that is not what its stage wrote."""


def _listed(values: npt.NDArray[Any]) -> list[Any]:
    """A (row,) array as JSON has it."""
    plain: list[Any] = values.tolist()
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return plain
    return [value if np.isfinite(value) else None for value in plain]


def _array(dtype: type[np.generic], item: CoreSchema) -> GetPydanticSchema:
    """A (row,) array: a list of one kind of values in the file."""
    schema = core_schema.no_info_after_validator_function(
        lambda found: np.array(found, dtype=dtype),  # None becomes nan
        core_schema.list_schema(item),
        serialization=core_schema.plain_serializer_function_ser_schema(_listed),
    )
    return GetPydanticSchema(lambda _source, _handler: schema)


FloatArray = Annotated[
    npt.NDArray[np.float64], _array(np.float64, core_schema.nullable_schema(core_schema.float_schema()))
]
"""Numbers of a record, any of which may be nan."""

IntArray = Annotated[
    npt.NDArray[np.int64], _array(np.int64, core_schema.int_schema(ge=-(2**63), le=2**63 - 1))
]

BoolArray = Annotated[npt.NDArray[np.bool_], _array(np.bool_, core_schema.bool_schema())]


class Record(Brief):
    """Base of what is written to a file of its own, or is part of such a record.

    Subclasses are frozen dataclasses whose fields are numbers (``stats.Number`` where one may be nan), texts,
    arrays, estimates, other records, and tuples and mappings of those.
    """

    format_version: ClassVar[int] = 1
    """Raised when a field is added, removed or means something else."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, ser_json_inf_nan="null"
    )

    def to_plain(self) -> dict[str, Any]:
        """The fields in their order, as plain JSON values."""
        plain: dict[str, Any] = json.loads(_adapter(type(self)).dump_json(self))
        return plain

    def to_json(self) -> str:
        """The file's text: the version, then the fields."""
        plain = {VERSION: self.format_version, **self.to_plain()}
        return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the file; it appears whole or not at all."""
        text = self.to_json()
        whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record that :meth:`write` wrote.

        Raises:
            RunFolderError: it cannot be read, or see :meth:`from_json`.
        """
        try:
            text = path.read_bytes()
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be read ({why_unreadable(path, error)}); run the stage that writes it"
            ) from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_plain(cls, data: Any, where: str) -> Self:
        """The record from plain JSON values without a version.

        Raises:
            RunFolderError: a field is missing, unknown or of another kind.
        """
        try:
            found: Self = _adapter(cls).validate_json(json.dumps(data))
        except (ValidationError, RecursionError) as error:
            raise RunFolderError(f"{where}: damaged ({_why(error)}); {CURE}") from error
        return found

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """The record that :meth:`to_json` wrote.

        Args:
            text: of the file.
            where: its path, for the error.

        Raises:
            RunFolderError: it is not JSON, of another version, or lacks a field, or one is of another kind.
        """
        fields = parse_object(text, where)
        if (found := fields.pop(VERSION, None)) != cls.format_version:
            raise RunFolderError(
                f"{where}: {VERSION} {str(found)[:20]}, and this stepscope reads version "
                f"{cls.format_version} of a {cls.__name__}; {CURE}"
            )
        return cls.from_plain(fields, where)

    def doubted(self, *reasons: str) -> Self:
        """The same with these reasons not to trust any estimate in it; empty ones are none."""
        values = {f.name: _doubted(getattr(self, f.name), reasons) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **values)  # type: ignore[type-var]


class FlatRecord(Record):
    """A record of one field, a mapping, that is the whole file; the version of such files is the folder's."""

    content: ClassVar[str]
    """Name of the field."""

    def to_json(self) -> str:
        """The mapping, and nothing besides."""
        plain = self.to_plain()[self.content]
        return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """The record that :meth:`to_json` wrote.

        Raises:
            RunFolderError: it is not JSON, or an entry lacks a field, or has one of another kind.
        """
        return cls.from_plain({cls.content: parse_object(text, where)}, where)


def _doubted(value: Any, reasons: tuple[str, ...]) -> Any:
    if isinstance(value, Estimate | Record):
        return value.doubted(*reasons)
    if isinstance(value, tuple):
        return tuple(_doubted(item, reasons) for item in value)
    if isinstance(value, Mapping):
        return {key: _doubted(item, reasons) for key, item in value.items()}
    return value


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RunFolderError: it is not strict JSON, or something else.
    """
    try:
        data = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{where}: cannot be read as JSON ({error}); {CURE}") from error
    if not isinstance(data, Mapping):
        raise RunFolderError(f"{where}: got a {type(data).__name__}, expected a JSON object; {CURE}")
    return dict(data)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _why(error: ValidationError | RecursionError) -> str:
    """The first thing that is wrong, in a line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the whole"
    return f"{place}: {first['msg']}; got {repr(first['input'])[:80]}"


_ADAPTERS: dict[type[Record], TypeAdapter[Any]] = {}


def _adapter(kind: type[Record]) -> TypeAdapter[Any]:
    """Pydantic's reader and writer of a record, built when first asked for."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
