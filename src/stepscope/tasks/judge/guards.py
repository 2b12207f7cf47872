"""The scorers of reasoning-gym that evaluate an answer, and what they are given to evaluate instead."""

from __future__ import annotations

import ast
import importlib

LITERALS = {
    "binary_matrix": "reasoning_gym.algorithmic.binary_matrix",
    "n_queens": "reasoning_gym.games.n_queens",
    "spiral_matrix": "reasoning_gym.algorithmic.spiral_matrix",
    "string_insertion": "reasoning_gym.algorithmic.string_insertion",
}
"""Datasets whose module calls ``eval`` on the answer, which is to be a list or a string."""

EXPRESSIONS = frozenset(
    ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
)
"""Datasets that give the answer to sympy's ``parse_expr``, which evaluates it as Python."""

EVALUATING = EXPRESSIONS | frozenset(LITERALS)

FUNCTIONS = "Abs acos acosh acot asin asinh atan atanh cos cosh cot csc exp ln log sec sin sinh sqrt tan tanh"
"""What an expression may call."""

_PARTS = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Call, ast.Load),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.UAdd, ast.USub),
)


def evaluates(task: str) -> bool:
    """Whether a task specification names a dataset whose scorer evaluates answers."""
    kind, _, rest = task.partition(":")
    return kind == "rg" and rest.partition(":")[0] in EVALUATING


def read_literals_only() -> None:
    """Give the modules that call ``eval`` on an answer :func:`ast.literal_eval` under that name."""
    for module in LITERALS.values():
        vars(importlib.import_module(module))["eval"] = ast.literal_eval


def require_expression(text: str) -> None:
    """Let only arithmetic through: numbers, names, ``+ - * / **``, brackets, calls of elementary functions.

    Raises:
        SyntaxError: it is anything else; sympy would evaluate attributes, subscripts, strings and calls.
        ValueError: it is no Python at all.
    """
    for part in ast.walk(ast.parse(text.strip(), mode="eval")):
        allowed = isinstance(part, _PARTS)
        if isinstance(part, ast.Constant):
            allowed = type(part.value) in (int, float)
        elif isinstance(part, ast.Name):
            allowed = not part.id.startswith("_")
        elif isinstance(part, ast.Call):
            allowed = (
                isinstance(part.func, ast.Name) and part.func.id in FUNCTIONS.split() and not part.keywords
            )
        if not allowed:
            raise SyntaxError(f"{type(part).__name__} is not arithmetic")
