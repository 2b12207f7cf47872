"""YAML of any origin: plain types, bounded size and depth, and one error for whatever is wrong with it."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from stepscope.errors import ConfigError, shown

LARGEST_YAML = 2**18
"""Bytes; the longest configuration that people write has some thousand."""

MOST_NODES = 100_000
"""Values of a YAML text with every alias written out: a few nested ones can stand for any number."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; ``1e-5`` is the number everyone means (YAML 1.2), keys are texts, none is twice."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise yaml.constructor.ConstructorError(None, None, "too many values", node.start_mark)
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for inner, _ in node.value:
            if inner.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(inner, deep=True)
            if not isinstance(key, str):
                problem = f"key {shown(key)} is no text; put it in quotes"
            elif key in seen:
                problem = f"key {shown(key)} appears twice"
            else:
                seen.add(key)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, inner.start_mark)
        return super().construct_mapping(node, deep=deep)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    """An integer that 64 bits can hold: no setting has another, and Python writes no very large ones."""
    value: int = loader.construct_yaml_int(node)
    if not -(2**63) <= value < 2**64:
        raise yaml.constructor.ConstructorError(None, None, "a whole number too large", node.start_mark)
    return value


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """A text; the two halves of a character that JSON escapes are joined, one half alone is none."""
    value: str = loader.construct_yaml_str(node)
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise yaml.constructor.ConstructorError(None, None, "half a character", node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:str", _text)


def _size(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Values below a node, aliases counted each time; infinite where one holds itself."""
    if node not in known:
        known[node] = math.inf  # until it is known: met again below itself, it holds itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
        known[node] = 1 + sum(_size(part, known) for part in parts)
    return known[node]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML with plain types only.

    Raises:
        ConfigError: the text is not YAML, or out of all proportion.
    """
    if len(text) > LARGEST_YAML:
        raise ConfigError(f"{source}: {len(text)} characters are no configuration; at most {LARGEST_YAML}")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2020-99-99, 5,000 digits
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
