"""The pages under docs/ name functions, tests, files, commands and settings that exist.

Examples that stand alone are run in tests/test_api.py (the README's) and tests/test_extending.py.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stepscope
import stepscope.pipeline
from stepscope.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDER = re.compile(r"\b(?:[A-Z]{3,}|CONFIG)\b|\.\.\.|\[")
"""What a line of usage has and a command that can be given has not."""


def blocks(text: str, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in some languages, "" for none."""
    for language, block in re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.M | re.DOTALL):
        if language in languages:
            yield textwrap.dedent(block)


def commands() -> Iterator[Any]:
    """Every line of a page that calls stepscope with arguments of its own."""
    for page in PAGES:
        for block in blocks(page.read_text(), "", "bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["stepscope"] and not PLACEHOLDER.search(" ".join(words)):
                    yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words)}"[:100])


def resolve(dotted: str) -> None:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_functions_and_tests_named_in_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for dotted in set(re.findall(r"`(stepscope(?:\.\w+)+)`", text)):
        resolve(dotted)
    for file, test in set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)):
        source = (ROOT / file).read_text()
        found = not test or re.search(rf"^(?:def|class) {test}\b", source, re.M)
        assert found, f"{page.name}: {file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_a_page_is_taken_with_its_options_and_settings(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the work: options, settings and configuration files are read as the verb reads them."""
    called = []
    for name in [name for name in stepscope.pipeline.__all__ if name.startswith("run_")]:
        monkeypatch.setattr(stepscope.pipeline, name, lambda *args, **kwargs: called.append(args) is None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")  # where paths are not looked at before the work
    with pytest.raises(SystemExit) as ended:
        app(words)
    assert ended.value.code == 0
    assert called


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_of_a_page_is_code_and_its_names_exist(page: Path) -> None:
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            match node:
                case ast.Attribute(value=ast.Name(id="ss" | "stepscope" as package), attr=name):
                    assert hasattr(stepscope, name), f"{page.name}: {package}.{name}"
