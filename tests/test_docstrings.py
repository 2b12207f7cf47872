"""Links in docstrings lead somewhere."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import stepscope

SOURCE = Path(stepscope.__file__).parent
LINK = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`([^`]+)`")
DOTTED = re.compile(r"``((?:measure|policy|training|evaluation)\.[\w.]+)``")
MODULES = [
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Every docstring of a file (of modules, classes, functions and attributes), and the class it is in."""

    def walk(node: ast.AST, inside: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                if isinstance(child.value.value, str):
                    yield child.value.value, inside
            else:
                yield from walk(child, child.name if isinstance(child, ast.ClassDef) else inside)

    yield from walk(ast.parse(path.read_text()), "")


def leads_somewhere(name: str, module: object, inside: str) -> bool:
    """Whether a dotted name is one of the module's, of its class's, of Python's, or a full path."""
    for start in (module, getattr(module, inside, None), builtins):
        found = start
        for part in name.split("."):
            found = getattr(found, part, None) or getattr(found, "__annotations__", {}).get(part)
        if found is not None:
            return True
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return leads_somewhere(".".join(parts[count:]), found, "") if count < len(parts) else True
    return False


@pytest.mark.parametrize("name", MODULES)
def test_links_in_docstrings_resolve(name: str) -> None:
    module = importlib.import_module(name)
    path = Path(str(module.__file__))
    lost = [
        link
        for text, inside in docstrings(path)
        for link in [*LINK.findall(text), *(f"stepscope.{found}" for found in DOTTED.findall(text))]
        if not leads_somewhere(link.removeprefix("~").removeprefix(".").removesuffix("()"), module, inside)
    ]
    assert not lost
