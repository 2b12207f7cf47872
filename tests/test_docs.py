"""The pages under docs/ name functions, tests and files that exist; the README's example runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
