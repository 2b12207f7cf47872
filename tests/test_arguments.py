"""No function of ``measure`` and ``policy`` takes more than eight arguments; more belong into records."""

from __future__ import annotations

import ast
from pathlib import Path

import stepscope

MOST = 8
ROOT = Path(stepscope.__file__).parent


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of the arguments, without ``self`` and ``cls``; ``*args`` and ``**kwargs`` count as one each."""
    every = function.args
    rest = [extra for extra in (every.vararg, every.kwarg) if extra is not None]
    names = [a.arg for a in (*every.posonlyargs, *every.args, *every.kwonlyargs, *rest)]
    return [name for name in names if name not in ("self", "cls")]


def test_no_function_takes_more_than_eight_arguments() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {node.name} takes {len(arguments(node))}"
        for room in ("measure", "policy")
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(arguments(node)) > MOST
    ]
    assert not found
