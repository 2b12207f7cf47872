"""Reading a configuration: YAML, ``section.field=value`` overrides, and every wrong key named at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from stepscope.errors import ConfigError, shown
from stepscope.yaml_text import LARGEST_YAML, parse_yaml

_S = TypeVar("_S", bound=BaseModel)


_MOST_FINDINGS = 20


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_YAML + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file, so not a YAML configuration") from error
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected `key: value` lines at the top level, got a {type(data).__name__}"
        )
    return data


def apply_overrides(
    cls: type[BaseModel], data: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """A copy of ``data`` with each ``section.field=value`` set.

    The value of a field that holds a text is that text as it stands (``{question}``, ``*``, ``# 1``), unless
    it is in quotes or ``null``; these and all other values are read as YAML.

    Args:
        cls: the configuration, which says what its fields hold.
        data: what is changed.
        overrides: each later one wins.

    Raises:
        ConfigError: an override is not of that form, or goes through a value that is no section.
    """
    result = _copy(data)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", path):
            raise ConfigError(
                f"{shown(text)} is not an override; write section.field=value, for example rl.steps=20"
            )
        literal = _holds_text(cls, path) and not _QUOTED_OR_NULL.fullmatch(value)
        set_path(result, path, value if literal else parse_yaml(value, text))
    return result


_QUOTED_OR_NULL = re.compile(r"""\s*(".*"|'.*'|null|Null|NULL|~)?\s*""", re.DOTALL)


def _holds_text(cls: type[BaseModel], path: str) -> bool:
    """Whether the field at a dotted path is a free text, or that or null."""
    *sections, last = path.split(".")
    section: type[BaseModel] | None = cls
    for name in sections:
        if section is None or name not in section.model_fields:
            return False
        section = _section_in(section.model_fields[name].annotation)
    if section is None or last not in section.model_fields:
        return False
    annotation = section.model_fields[last].annotation
    return annotation is str or set(get_args(annotation)) == {str, type(None)}


def set_path(data: dict[str, Any], path: str, value: Any) -> None:
    """Set ``data[a][b] = value`` for the path ``a.b``, making sections on the way.

    Raises:
        ConfigError: part of the path already holds a value that is no section.
    """
    *sections, last = path.split(".")
    for depth, name in enumerate(sections):
        inner = data.get(name)
        if inner is None:
            inner = data[name] = {}
        if not isinstance(inner, dict):
            where = ".".join(sections[: depth + 1])
            raise ConfigError(f"{path}: {where} is the value {shown(inner)}, not a section")
        data = inner
    data[last] = value


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in data.items()}


def build_config(cls: type[_S], data: Mapping[str, Any], source: str = "configuration") -> _S:
    """Validate ``data``.

    Raises:
        ConfigError: one line that names every wrong setting with its dotted path.
    """
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        findings = list(dict.fromkeys(_describe(cls, dict(item)) for item in wrong[:_MOST_FINDINGS]))
        more = f"; and {len(wrong) - _MOST_FINDINGS} more" if len(wrong) > _MOST_FINDINGS else ""
        many = f"{len(wrong)} wrong settings" if len(findings) > 1 else "wrong setting"
        raise ConfigError(f"{source}: {many}: " + "; ".join(findings) + more) from error


def load_config(
    cls: type[_S],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    fill: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> _S:
    """Read a configuration.

    Args:
        cls: which one.
        path: YAML file, or None to start from the defaults.
        overrides: ``section.field=value``, each later one wins.
        values: settings by dotted path that win over the file but not over ``overrides``; None is skipped.
        fill: from all that is given to settings for what is given nowhere (a default that depends on others).

    Raises:
        ConfigError: one line that names every wrong setting with its dotted path.
    """
    data = read_yaml(path) if path is not None else {}
    for dotted, value in (values or {}).items():
        if value is not None:
            set_path(data, dotted, value)
    given = apply_overrides(cls, data, overrides)
    filled = given if fill is None else {**fill(given), **given}
    return build_config(cls, filled, str(path or "command line"))


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML; :func:`load_config` reads it back to an equal one.

    Settings that are null unless they are given, and were not, are left out.
    """
    return yaml.safe_dump(_given(config), sort_keys=False, allow_unicode=True)


def _given(section: BaseModel) -> dict[str, Any]:
    """Its settings as plain values, without those that are None by default."""
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is None and field.default is None:
            del plain[name]
        elif isinstance(value, BaseModel):
            plain[name] = _given(value)
    return plain


def _section_in(annotation: Any, tag: int | str | None = None) -> type[BaseModel] | None:
    """The section class an annotation allows, looking through unions; of several, the one of that name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation if tag is None or tag in _tags(annotation) else None
    for part in get_args(annotation):
        if (found := _section_in(part, tag)) is not None:
            return found
    return None


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    """What ``name`` may be in a section that is told by it from the others of a union."""
    return get_args(section.model_fields["name"].annotation) if "name" in section.model_fields else ()


def _locate(cls: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, type[BaseModel] | None]:
    """Dotted path of an error, without pydantic's union tags, and the section that holds its last part."""
    names: list[str] = []
    section: type[BaseModel] | None = cls
    for depth, part in enumerate(loc):
        last = depth == len(loc) - 1
        if isinstance(part, int):
            names[-1] += f"[{part}]"
        elif section is None:
            continue  # a union tag, or a key inside a free-form value
        elif part in section.model_fields:
            names.append(part)
            if not last:
                annotation = section.model_fields[part].annotation
                section = _section_in(annotation, loc[depth + 1]) or _section_in(annotation)
        elif last and part not in _tags(section):
            names.append(part)
    return ".".join(names), section


def _describe(cls: type[BaseModel], item: dict[str, Any]) -> str:
    """One finding: dotted path, what is wrong, expected against got, and the likely meaning."""
    path, section = _locate(cls, item["loc"])
    kind, got = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key{_suggest(cls, section, path)}"
    if kind == "missing":
        return f"{path}: missing, and it has no default"
    message = str(item["msg"]).removeprefix("Value error, ")
    if kind == "union_tag_not_found":
        return f"{path}.name: missing, and it has no default"
    if kind == "union_tag_invalid":
        return f"{path}.name: expected {item['ctx']['expected_tags']}, got {shown(got['name'])}"
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    message = re.sub(r"^Input should be (a valid )?", "expected ", message)
    if isinstance(got, BaseModel):
        return f"{path}: {message}"
    given = "a section" if isinstance(got, Mapping) else shown(got)
    quotes = "; put the text in quotes" if kind == "string_type" else ""
    return f"{path}: {message}, got {given}{quotes}"


def _suggest(cls: type[BaseModel], section: type[BaseModel] | None, path: str) -> str:
    *sections, key = path.split(".")
    siblings = list(section.model_fields) if section is not None else []
    if close := get_close_matches(key, siblings, n=1, cutoff=0.6):
        return f" (did you mean {'.'.join([*sections, close[0]])}?)"
    elsewhere = [p for p in _all_paths(cls) if p.rpartition(".")[2] == key]
    if elsewhere:
        inside = f"{'.'.join(sections)}."
        nearest = next((p for p in elsewhere if p.startswith(inside)), elsewhere[0])
        return f" (did you mean {nearest}?)"
    return f" (known here: {', '.join(siblings)})" if siblings else ""


def _all_paths(cls: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in cls.model_fields.items():
        found.append(prefix + name)
        if (inner := _section_in(field.annotation)) is not None:
            found += _all_paths(inner, f"{prefix}{name}.")
    return found
