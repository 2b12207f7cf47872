"""Records: frozen dataclasses that are written to a JSON artifact and read back by the class that wrote it.

The fields' types say everything: how a record becomes JSON, and what a file must hold to be read. A number
that is not finite is null in the file (strict JSON knows neither nan nor infinity).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from stepscope.errors import RunFolderError

VERSION = "version"
"""Key under which a file has the version of its record."""


def _number(value: Any) -> Any:
    return float("nan") if value is None else value


def _floats(value: Any) -> npt.NDArray[np.float64]:
    return np.array(value, dtype=np.float64)  # None becomes nan


def _finite_or_none(values: npt.NDArray[np.float64]) -> Any:
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()


Number = Annotated[float, BeforeValidator(_number)]
"""A number of a record that may be nan."""

FloatArray = Annotated[npt.NDArray[np.float64], PlainValidator(_floats), PlainSerializer(_finite_or_none)]
"""An array of numbers of a record, any of which may be nan."""

IntArray = Annotated[
    npt.NDArray[np.int64],
    PlainValidator(lambda value: np.array(value, dtype=np.int64)),
    PlainSerializer(lambda values: values.tolist()),
]

BoolArray = Annotated[
    npt.NDArray[np.bool_],
    PlainValidator(lambda value: np.array(value, dtype=np.bool_)),
    PlainSerializer(lambda values: values.tolist()),
]


class Record:
    """Base of what is written to a file of its own, or is part of such a record.

    Subclasses are frozen dataclasses whose fields are numbers (:data:`Number`), arrays, texts, estimates,
    other records, and tuples and mappings of those.
    """

    version: ClassVar[int] = 1
    """Raised when a field is added, removed or means something else."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, arbitrary_types_allowed=True, ser_json_inf_nan="null"
    )

    def to_json(self) -> str:
        """The file's text: the version, then the fields in their order."""
        plain = {VERSION: self.version, **json.loads(_adapter(type(self)).dump_json(self))}
        return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """The record that :meth:`to_json` wrote.

        Args:
            text: of the file.
            where: its path, for the error.

        Raises:
            RunFolderError: it is not JSON, of another version, or lacks a field, or one is of another kind.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunFolderError(f"{where}: cannot be read as JSON ({error}); {_CURE}") from error
        if not isinstance(data, Mapping):
            raise RunFolderError(f"{where}: got a {type(data).__name__}, expected a JSON object; {_CURE}")
        fields = dict(data)
        version = fields.pop(VERSION, None)
        if version != cls.version:
            raise RunFolderError(
                f"{where}: version {version}, and this stepscope reads version {cls.version} of a "
                f"{cls.__name__}; {_CURE}"
            )
        return cls.from_plain(fields, where)

    @classmethod
    def from_plain(cls, data: Any, where: str) -> Self:
        """The record from plain JSON values without a version.

        Raises:
            RunFolderError: a field is missing, unknown or of another kind.
        """
        try:
            found: Self = _adapter(cls).validate_json(json.dumps(data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            got = repr(first["input"])
            raise RunFolderError(
                f"{where}: damaged ({place}: {first['msg']}; got {got[:80]}); {_CURE}"
            ) from error
        return found


_CURE = "delete it and run the stage that writes it again"


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Pydantic's reader and writer of a record, built when first asked for."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
