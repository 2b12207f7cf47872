"""Every example of docs/EXTENDING.md runs: what is added, and the test of it."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from stepscope import known_criteria
from stepscope.measure.criteria import criterion, models
from stepscope.policy.checkpoint.formats.registry import FORMATS
from stepscope.policy.loss.registry import LOSSES
from stepscope.policy.optim.registry import OPTIMIZERS
from stepscope.rules.applied import INTERVENTIONS

PAGE = (Path(__file__).parent.parent / "docs" / "EXTENDING.md").read_text()
SECTIONS = {
    title: "\n".join(re.findall(r"^```python\n(.*?)^```", body, re.M | re.S))
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Where an example runs; what it registers is gone after it."""
    assert known_criteria()
    made = ModuleType("extending_stepscope")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(criterion, "_KNOWN", dict(criterion._KNOWN))
    monkeypatch.setattr(models, "_PREDICTING", list(models._PREDICTING))
    kept = list(OPTIMIZERS), list(FORMATS), dict(INTERVENTIONS)
    losses = dict(LOSSES)
    yield made
    OPTIMIZERS[:], FORMATS[:] = kept[:2]
    INTERVENTIONS.clear()
    INTERVENTIONS.update(kept[2])
    LOSSES.clear()
    LOSSES.update(losses)
    vars(made).clear()
    gc.collect()  # quantities are the subclasses that there are


def test_all_that_can_be_added_has_an_example() -> None:
    rows = re.findall(r"^\| (\w[\w ]+?) \| ", PAGE, re.M)[1:]
    assert [title.split(" ", 1)[1] for title in SECTIONS] == rows


@pytest.mark.parametrize("title", SECTIONS)
def test_an_example_runs(title: str, module: ModuleType) -> None:
    assert SECTIONS[title].count("import") > 1
    exec(compile(SECTIONS[title], f"docs/EXTENDING.md: {title}", "exec"), vars(module))
