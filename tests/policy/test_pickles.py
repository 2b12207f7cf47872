"""Pickled files: tensors and named stubs are read, everything else is an error that names it."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.optimizer_state import state_by_name
from stepscope.policy.checkpoint.pickles import ForbiddenClassError, read_item, read_tensors, unpickle


class Kept:
    """Stands for a class of a library that is not there."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class Touches:
    """What makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_a_named_class_is_its_stub_and_no_other_is_made(tmp_path: Path) -> None:
    file, before = tmp_path / "f.pt", torch.serialization.get_safe_globals()
    torch.save({"a": torch.ones(2), "half": Fraction(1, 2)}, file)
    for lazily in (False, True):
        found = read_tensors(file, stubs={"fractions.Fraction": Kept}, lazily=lazily)
        assert torch.equal(found["a"], torch.ones(2))
        assert isinstance(found["half"], Kept)
    with pytest.raises(ForbiddenClassError, match=r"it holds fractions\.Fraction, expected") as caught:
        read_tensors(file)
    assert caught.value.names == ["fractions.Fraction"]
    assert torch.serialization.get_safe_globals() == before


def test_a_pickle_is_read_with_stubs_alone(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(pickle.dumps([Fraction(1, 2), collections.OrderedDict(a=1)]))
    with pytest.raises(ForbiddenClassError, match=r"it holds collections\.OrderedDict"):
        unpickle(file, stubs={"fractions.Fraction": Kept})
    found = unpickle(file, stubs={"fractions.Fraction": Kept, "collections.OrderedDict": dict})
    assert isinstance(found[0], Kept)
    assert found[1] == {"a": 1}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    witness, file = tmp_path / "witness", tmp_path / "f"
    file.write_bytes(pickle.dumps(Touches(witness), protocol=protocol))
    with pytest.raises(ForbiddenClassError, match=r"pathlib\.Path\.touch|getattr"):
        unpickle(file, stubs={})
    torch.save(Touches(witness), file)
    for read in (lambda: read_tensors(file), lambda: read_item(file.read_bytes(), where="f")):
        with pytest.raises(CheckpointError, match=r"f: (it holds|damaged)"):
            read()
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"x" * 100, b"PK\x03\x04" + b"\0" * 60, b"\x80\x04Nq\xff"])
def test_what_is_no_pickle_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    for read in (
        lambda: read_tensors(file),
        lambda: read_tensors(file, lazily=True),
        lambda: unpickle(file, stubs={}),
        lambda: read_item(content, where=str(file)),
    ):
        with pytest.raises(CheckpointError, match="f: damaged"):
            read()
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "none")


def renamed(saved: dict[str, Any], change: Callable[[str], str]) -> None:
    saved["state"] = {change(n): e for n, e in saved["state"].items()}
    group = saved["param_groups"][0]
    group["params"] = [change(n) for n in group["params"]]


def test_a_state_is_found_under_wrapped_names() -> None:
    model, saved = cases.stepped()
    renamed(
        saved, lambda n: f"module._fsdp_wrapped_module.{n.replace('mlp.', 'mlp._checkpoint_wrapped_module.')}"
    )
    found = state_by_name(saved, model, where="here")
    assert found.names == tuple(n for n, _ in model.named_parameters())


def test_a_parameter_without_state_may_be_frozen() -> None:
    model, saved = cases.stepped()
    model.model.norm.weight.requires_grad_(False)
    del saved["state"]["model.norm.weight"]
    assert "model.norm.weight" not in state_by_name(saved, model, where="here").names


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another model": (
        lambda s: renamed(s, lambda n: n.replace("mlp", "ffn")),
        r"has model\.layers\.0\.ffn\S+, which",
    ),
    "a name twice": (
        lambda s: s["param_groups"][0]["params"].append("module.model.norm.weight"),
        r"model\.norm\.weight and module\.model\.norm\.weight are one parameter",
    ),
    "in no group": (
        lambda s: s["param_groups"][0]["params"].remove("model.norm.weight"),
        r"model\.norm\.weight has a state and is in no parameter group",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_of_another_model_is_named(fault: str) -> None:
    model, saved = cases.stepped()
    change, said = FAULTS[fault]
    change(saved)
    with pytest.raises(CheckpointError, match=f"^here: .*{said}"):
        state_by_name(saved, model, where="here")
