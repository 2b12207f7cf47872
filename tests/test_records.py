"""Records: written and read by one class, whatever they hold; anything else in a file is one error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepscope import runs
from stepscope.errors import RunFolderError
from stepscope.results import BoolArray, FloatArray, IntArray, Record
from stepscope.stats import Estimate, Number


@dataclass(frozen=True)
class Part(Record):
    figure: Estimate
    version: str


@dataclass(frozen=True, repr=False)
class Whole(Record):
    parts: tuple[Part, ...]
    by_step: Mapping[int, Part | None]
    number: Number
    numbers: FloatArray
    counts: IntArray
    flags: BoolArray


FIGURE = Estimate(1.0, 2.0, 5, "nats", "a test")
WHOLE = Whole(
    (Part(FIGURE, "on_policy"),),
    {1: None, 10: Part(FIGURE, "")},
    math.nan,
    np.array([0.1, math.nan]),
    np.array([2**60]),
    np.array([True]),
)


def test_every_kind_of_field_comes_back() -> None:
    text = WHOLE.to_json()
    found = Whole.from_json(text, "whole.json")
    assert found.to_json() == text
    assert found.parts == WHOLE.parts
    assert found.by_step == WHOLE.by_step
    assert math.isnan(found.number)
    np.testing.assert_array_equal(found.numbers, WHOLE.numbers)
    assert (found.counts.dtype, found.counts.tolist()) == (np.int64, [2**60])
    assert (found.flags.dtype, found.flags.tolist()) == (np.bool_, [True])
    assert json.loads(text)["number"] is None
    assert next(iter(json.loads(text))) == "format_version"


any_float = st.floats(allow_nan=True, allow_infinity=False)
low_end, high_end = st.floats(-math.inf, 1e300), st.floats(-1e300, math.inf)


@given(any_float, any_float, st.integers(2, 100), low_end, high_end)
def test_an_estimate_comes_back_with_the_ends_it_had(
    value: float, stderr: float, n: int, low: float, high: float
) -> None:
    given_ends = Estimate(value, stderr, n, "1", "", low=low, high=high)
    for figure in (given_ends, Estimate(value, abs(stderr), n, "1", "")):
        found = Part.from_json(Part(figure, "").to_json(), "").figure
        if all(map(math.isfinite, (value, stderr, figure.value))) or math.isfinite(figure.low):
            assert repr(found) == repr(figure)
        else:  # nothing says whether ends that are both null were infinite
            assert not found.resolved


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"n": 5', '"n": "5"', "parts.0.figure.n: .*integer"),
        ('"n": 5', '"n": null', "parts.0.figure.n: .*integer"),
        ('"value": 1.0', '"value": [1]', "parts.0.figure.value: .*number"),
        ('"value": 1.0', '"value": NaN', "NaN is no JSON"),
        ('"value": 1.0', '"value": -Infinity', "Infinity is no JSON"),
        ('"unit"', '"unt"', "parts.0.figure.unit: Field required"),
        ('"on_policy"', "null", "parts.0.version: .*string"),
        ('"1": null', '"one": null', "by_step.one"),
        ("0.1,", '"0.1",', "numbers.0: .*number"),
        ("true\n ]", "1\n ]", "flags.0: .*boolean"),
        ('"counts": [', '"counts": [1.5, ', "counts.0: .*integer"),
        ('"counts": [', '"counts": [null, ', "counts.0: .*integer"),
        ('"counts": [', '"counts": [1e400, ', "counts.0"),
        ('"counts": [', f'"counts": [{10**30}, ', "counts.0: .*less"),
        ('"number": null', '"number": false', "number"),
        ('"number": null', '"nummer": null', "number"),
        ('"number": null', '"number": null, "more": 1', "more: Unexpected"),
        (
            '"format_version": 1',
            '"format_version": 2',
            "format_version 2, and this stepscope reads version 1",
        ),
        ('"format_version": 1,', "", "format_version None"),
    ],
)
def test_what_no_record_wrote_is_one_error_with_its_place(old: str, new: str, expected: str) -> None:
    text = WHOLE.to_json()
    assert old in text
    with pytest.raises(RunFolderError, match=rf"^whole\.json: .*{expected}") as error:
        Whole.from_json(text.replace(old, new, 1), "whole.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "{", '{"format_version": 1}', "[" * 10**6, "\xff", '{"a":' * 10**5]
)
def test_what_is_no_record_at_all_is_one_error(text: str) -> None:
    with pytest.raises(RunFolderError, match=r"^whole\.json: "):
        Whole.from_json(text, "whole.json")


def test_records_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    with pytest.raises(RunFolderError, match="no such file"):
        runs.read_record(Whole, path)
    runs.write_record(path, WHOLE)
    assert runs.read_record(Whole, path).to_json() == WHOLE.to_json()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RunFolderError, match=r"whole\.json"):
        runs.read_record(Whole, path)


def test_a_doubt_reaches_every_estimate_and_leaves_the_rest() -> None:
    found = WHOLE.doubted("", "an old checkpoint")
    parts = [found.parts[0], found.by_step[10]]
    assert all(p is not None and p.figure == FIGURE.doubted("an old checkpoint") for p in parts)
    assert (found.by_step[1], found.parts[0].version) == (None, "on_policy")
    np.testing.assert_array_equal(found.numbers, WHOLE.numbers)
    assert WHOLE.doubted("").to_json() == WHOLE.to_json()
