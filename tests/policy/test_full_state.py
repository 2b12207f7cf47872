"""FSDP's full state: files that are hostile, damaged or empty are errors and nothing else."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
from hostile import Runs
from stepscope.errors import CheckpointError
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.loss.settings import StepSettings

WEIGHTS, STATE = "pytorch_model_fsdp.bin", "optimizer.bin"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint; the writers' own files are in ``test_sharded.py``."""
    folder = tmp_path_factory.mktemp("whole")
    model, saved = cases.stepped()
    torch.save(model.state_dict(), folder / WEIGHTS)
    torch.save(saved, folder / STATE)
    model.config.save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    StepSettings().save(folder)
    assert load_checkpoint(folder).optimizer is not None
    return folder


def test_running_numbers_as_accelerate_saves_them_without_fsdp(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    model = cases.model("qwen2")
    model.save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    named = torch.load(folder / STATE, weights_only=True)
    names = named["param_groups"][0]["params"]
    named["state"] = {i: named["state"][name] for i, name in enumerate(names)}
    named["param_groups"][0]["params"] = list(range(len(names)))
    torch.save(named, folder / STATE)
    found, expected = load_checkpoint(folder).optimizer, load_checkpoint(whole).optimizer
    assert found is not None
    assert expected is not None
    assert found.groups == expected.groups
    for key, tensors in expected.tensors().items():
        assert all(torch.equal(found.tensors()[key][name], value) for name, value in tensors.items())


def test_parameters_without_a_state_are_named(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    kept = torch.load(folder / STATE, weights_only=True)
    del kept["state"]["model.norm.weight"]
    torch.save(kept, folder / STATE)
    warned = [f.what for f in inspect_checkpoint(folder) if f.level == "warn"]
    assert any(w.startswith("1 trained parameters have no") and "model.norm.weight" in w for w in warned)


def test_embeddings_that_were_one_and_differ_are_refused(whole: Path, tmp_path: Path) -> None:
    """transformers would untie them, and the output's would stand still."""
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    torch.save(weights, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        load_checkpoint(folder)


def test_two_states_in_one_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    """A state that another run left there would be measured, or passed over, without a word."""
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    model = cases.model("qwen2")
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), folder / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"optimizer states of 2 layouts \(FSDP \(full state\), Hugging"
    ):
        load_checkpoint(folder)
    assert any(f.level == "fail" and "2 layouts" in f.what for f in inspect_checkpoint(folder))


def saved(file: str, content: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    return lambda folder, witness: torch.save(content(witness), folder / file)


def cut(file: str) -> Callable[[Path, Path], None]:
    def apply(folder: Path, witness: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:-3000])

    return apply


def packed(folder: Path, witness: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/999", bytes(2**24))


def strided(folder: Path, witness: Path) -> None:
    """A number that claims to be 10^12 of them."""
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    weights["model.norm.weight"] = torch.ones(1).expand(10**12)
    torch.save(weights, folder / WEIGHTS)


ATTACKS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "weights that run": (saved(WEIGHTS, lambda w: {"a": Runs(w)}), r"fsdp\.bin: it holds builtins\.eval"),
    "a state that runs": (saved(STATE, Runs), r"optimizer\.bin: the optimizer state is not plain tensors"),
    "weights of text": (saved(WEIGHTS, lambda _: {"a": "b"}), "it holds no weights by name"),
    "a list of weights": (saved(WEIGHTS, lambda _: [torch.ones(2)]), "it holds no weights by name"),
    "no weights": (saved(WEIGHTS, lambda _: {}), r"fsdp\.bin: it is empty|no weights|cannot be loaded"),
    "weights cut short": (cut(WEIGHTS), r"fsdp\.bin: damaged"),
    "a state cut short": (cut(STATE), r"optimizer\.bin: damaged"),
    "packed weights": (packed, "bytes unpacked from a file of"),
    "a weight of 10^12 numbers": (strided, r"norm\.weight among them: got \(1000000000000,\)"),
    "a state of groups alone": (saved(STATE, lambda _: {"param_groups": []}), "without 'state'"),
    "another optimizer's numbers": (
        saved(STATE, lambda _: {"state": {}, "param_groups": [{"params": [0], "lr": 1e-3}]}),
        r"optimizer\.bin",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_file_is_an_error_and_nothing_else(whole: Path, tmp_path: Path, attack: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "step"))
    witness = tmp_path / "witness"
    change, said = ATTACKS[attack]
    change(folder, witness)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    if attack.endswith("run"):
        assert any(f.level == "fail" for f in inspect_checkpoint(folder))
    assert not witness.exists()
