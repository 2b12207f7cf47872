"""Tensors of torch's distributed checkpoints: whole, or an error; and what their directory may not do."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from hostile import Runs, few
from stepscope.errors import CheckpointError
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.formats.distributed.metadata import (
    Chunk,
    Span,
    TensorEntry,
    read_directory,
)
from stepscope.policy.checkpoint.formats.distributed.state import located, optimizer_dict, sort_items
from stepscope.policy.checkpoint.formats.distributed.tensors import ChunkedTensor, refuse_gaps
from stepscope.policy.checkpoint.load import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], number: int, file: Path) -> Chunk:
    return Chunk(offsets, sizes, Span(file, number, 100))


@few(60)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    boxes=st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=3), max_size=4
    ),
)
def test_chunks_are_a_partition_or_refused(
    shape: list[int], boxes: list[list[tuple[int, int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "chunks"
    file.write_bytes(bytes(1000))
    rank = len(shape)
    cut = [(tuple(a for a, _ in b[:rank]), tuple(n for _, n in b[:rank])) for b in boxes]
    entry = TensorEntry(
        "t", tuple(shape), torch.float32, tuple(chunk(a, n, i, file) for i, (a, n) in enumerate(cut))
    )
    covered, inside = np.zeros(shape, dtype=int), True
    for start, sizes in cut:
        if math.prod(sizes):
            inside &= all(a + n <= s for a, n, s in zip(start, sizes, shape, strict=True))
            covered[tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))] += 1
    if inside and (covered == 1).all():
        refuse_gaps(entry)
    else:
        with pytest.raises(CheckpointError, match="chunk"):
            refuse_gaps(entry)


def test_halves_of_a_tensor_are_partitions(tmp_path: Path) -> None:
    """Random drawing finds few of them, so some are made."""
    file = tmp_path / "f"
    file.write_bytes(bytes(1000))
    for shape in ((), (5,), (4, 3), (2, 3, 4)):
        boxes = [((0,) * len(shape), shape)]
        for axis, size in enumerate(shape):
            (start, sizes), *rest = boxes
            left = (*sizes[:axis], size // 2, *sizes[axis + 1 :])
            right = (*sizes[:axis], size - size // 2, *sizes[axis + 1 :])
            boxes = [(start, left), ((*start[:axis], size // 2, *start[axis + 1 :]), right), *rest]
        made = tuple(chunk(a, n, i, file) for i, (a, n) in enumerate(boxes))
        entry = TensorEntry("t", shape, torch.int8, made)
        refuse_gaps(entry)
        if len(made) > 1:
            with pytest.raises(CheckpointError, match="numbers in all"):
                refuse_gaps(replace(entry, chunks=made[1:]))
        with pytest.raises(CheckpointError, match="in 0 bytes"):
            refuse_gaps(replace(entry, chunks=(replace(made[0], span=Span(file, 0, 0)), *made[1:])))


PLACES = {
    ("optimizer", "state", "a.b", "exp_avg"): ("optimizer", "state", ("a.b", "exp_avg")),
    ("app", "optimizers", "state", "a.b", "step"): ("app.optimizers", "state", ("a.b", "step")),
    ("optim", "optim", "param_groups", 1, "lr"): ("optim.optim", "param_groups", ("1", "lr")),
    ("optimizer", "param_groups"): ("optimizer", "param_groups", ()),
    ("optimizer", "state.a.b.exp_avg"): ("optimizer", "state", ("a.b", "exp_avg")),
    ("param_groups.a.b.lr",): ("", "param_groups", ("a.b", "lr")),
    ("optim.state.model.state.w.exp_avg",): ("optim", "state", ("model.state.w", "exp_avg")),
    ("model", "a.b"): None,
    ("model", "state"): None,
    ("app", "scheduler", "last_epoch"): None,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_item_is_found_where_trainers_put_it(place: tuple[Any, ...]) -> None:
    found, expected = located(place), PLACES[place]
    assert (found and (found.root, found.kind, found.keys)) == expected


def test_groups_saved_flat_are_put_together_by_their_settings(tmp_path: Path) -> None:
    moments = {f"state.{n}.{k}": torch.ones(2) for n in "abc" for k in ("exp_avg", "exp_avg_sq", "step")}
    settings = {f"param_groups.{n}.lr": 0.1 if n == "b" else 0.2 for n in "abc"}
    settings |= {f"param_groups.{n}.betas": (0.9, 0.99) for n in "abc"}
    dcp.save({"optim": moments | settings}, checkpoint_id=tmp_path, no_dist=True)
    found = optimizer_dict(sort_items(read_directory(tmp_path)), where="here")
    assert sorted((g["lr"], g["betas"], sorted(g["params"])) for g in found["param_groups"]) == [
        (0.1, (0.9, 0.99), ["b"]),
        (0.2, (0.9, 0.99), ["a", "c"]),
    ]
    assert set(found["state"]) == {"a", "b", "c"}


def test_two_optimizers_are_not_mixed(tmp_path: Path) -> None:
    one = {"state": {"a": {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": ["a"]}]}
    dcp.save({"actor": one, "critic": one}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match=r"2 optimizers are there \('actor', 'critic'\), expected one"):
        optimizer_dict(sort_items(read_directory(tmp_path)), where="here")


class System:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/stepscope-was-here",)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of one process, with config, tokenizer and settings."""
    import cases
    from stepscope.policy.loss.settings import StepSettings

    folder = tmp_path_factory.mktemp("sharded")
    model, saved = cases.stepped()
    dcp.save({"model": model.state_dict(), "optimizer": saved}, checkpoint_id=folder / "shards", no_dist=True)
    model.config.save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    StepSettings().save(folder)
    assert load_checkpoint(folder).optimizer is not None
    return folder


def test_a_snapshot_of_the_hub_is_read(sharded: Path, tmp_path: Path) -> None:
    """Its files are links to where the hub's client keeps what it has downloaded."""
    for file in sharded.rglob("*"):
        if file.is_file():
            link = tmp_path / "snapshot" / file.relative_to(sharded)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    found, expected = load_checkpoint(tmp_path / "snapshot"), load_checkpoint(sharded)
    assert all(torch.equal(p, expected.parameters[name]) for name, p in found.parameters.items())
    assert found.optimizer is not None
    assert expected.optimizer is not None
    assert found.optimizer.steps == expected.optimizer.steps


def metadata(change: Callable[[Any], Any]) -> Callable[[Path, Path], None]:
    """A change of the directory, made by torch's own classes."""

    def apply(folder: Path, witness: Path) -> None:
        path = folder / "shards" / ".metadata"
        found = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(change(found) or found))

    return apply


def item(content: Callable[[Path], Any], name: str) -> Callable[[Path, Path], None]:
    """Another item in place of one, at the end of its file."""

    def apply(folder: Path, witness: Path) -> None:
        path = folder / "shards" / ".metadata"
        found = pickle.loads(path.read_bytes())
        index = next(i for i in found.storage_data if i.fqn == name)
        file = folder / "shards" / found.storage_data[index].relative_path
        torch.save(content(witness), witness.parent / "item")
        added = (witness.parent / "item").read_bytes()
        found.storage_data[index] = replace(
            found.storage_data[index], offset=file.stat().st_size, length=len(added)
        )
        with file.open("ab") as stream:
            stream.write(added)
        path.write_bytes(pickle.dumps(found))

    return apply


WEIGHT = "model.model.norm.weight"


def grow(found: Any) -> None:
    entry = found.state_dict_metadata[WEIGHT]
    entry.size = torch.Size([10**12])
    entry.chunks[0].sizes = torch.Size([10**12])


def moved(**where: Any) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        index = next(i for i in found.storage_data if i.fqn == WEIGHT)
        found.storage_data[index] = replace(found.storage_data[index], **where)

    return change


def cut(folder: Path, witness: Path) -> None:
    file = next((folder / "shards").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-2000])


ATTACKS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a directory that runs": (
        lambda folder, witness: (
            (folder / "shards" / ".metadata").write_bytes(
                pickle.dumps({"state_dict_metadata": Runs(witness)})
            )
            and None
        ),
        r"\.metadata: it holds builtins\.eval",
    ),
    "os.system": (
        metadata(lambda found: setattr(found, "planner_data", System())),
        r"it holds posix\.system",
    ),
    "an item that runs": (item(Runs, "optimizer.param_groups.0.lr"), r"lr: damaged, or no plain data"),
    "a weight that runs": (item(Runs, WEIGHT), r"norm\.weight: damaged, or no plain data"),
    "a weight of text": (item(lambda _: "weights", WEIGHT), r"norm\.weight is no tensor"),
    "a weight of another type": (
        item(lambda _: torch.zeros(16, dtype=torch.int8), WEIGHT),
        r"is torch\.int8 of",
    ),
    "a huge size": (metadata(grow), r"a chunk of \(1000000000000,\) in \d+ bytes"),
    "a huge length": (metadata(moved(length=2**50)), r"bytes \d+ to \d+ are asked for and it has"),
    "an offset outside": (metadata(moved(offset=2**60)), r"are asked for and it has"),
    "an offset below 0": (metadata(moved(offset=-1)), r"are no offsets or sizes"),
    "a file elsewhere": (metadata(moved(relative_path="../../secret")), "outside of its folder"),
    "a file of the system": (metadata(moved(relative_path="/etc/passwd")), "outside of its folder"),
    "items transformed": (metadata(moved(transform_descriptors=["zstd"])), "items are stored transformed"),
    "a file cut short": (cut, "are asked for and it has"),
    "no directory": (
        lambda folder, witness: (folder / "shards" / ".metadata").write_bytes(b"") and None,
        r"\.metadata: damaged",
    ),
    "a list for a directory": (
        lambda folder, witness: (folder / "shards" / ".metadata").write_bytes(pickle.dumps([1])) and None,
        "storage_data is None|sound checkpoint",
    ),
    "no names": (metadata(lambda f: setattr(f, "state_dict_metadata", None)), "state_dict_metadata is None"),
    "a hole": (
        metadata(lambda f: f.state_dict_metadata[WEIGHT].chunks.clear()),
        "chunks of 0 numbers in all",
    ),
    "a part twice": (
        metadata(
            lambda f: f.state_dict_metadata[WEIGHT].chunks.append(f.state_dict_metadata[WEIGHT].chunks[0])
        ),
        "stand in one place of a file",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_file_is_an_error_and_nothing_else(sharded: Path, tmp_path: Path, attack: str) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "step"))
    witness = tmp_path / "witness"
    change, said = ATTACKS[attack]
    change(folder, witness)
    Path("/tmp/stepscope-was-here").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    if attack in ("os.system", "a weight that runs"):
        assert any(f.level == "fail" for f in inspect_checkpoint(folder))
    assert not witness.exists()
    assert not Path("/tmp/stepscope-was-here").exists()


@few(40)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_to_a_directory_gives_a_traceback(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for file in (sharded / "shards").iterdir():
        (folder / file.name).symlink_to(file)
    content = bytearray((folder / ".metadata").read_bytes())
    place %= len(content)
    if cut:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    (folder / ".metadata").unlink()
    (folder / ".metadata").write_bytes(content)
    with suppress(CheckpointError):
        found = sort_items(read_directory(folder))
        optimizer_dict(found, where=str(folder))
        for tensor in found.others.values():
            tensor[...]


def test_a_tensor_is_read_as_it_was_saved(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.int64)
    saved = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds} | {
        "scalar": torch.tensor(2.5)
    }
    dcp.save({"x": saved}, checkpoint_id=tmp_path, no_dist=True)
    directory = read_directory(tmp_path)
    for name, expected in saved.items():
        found = ChunkedTensor(directory.tensors["x", name])
        assert (found.shape, found.dtype) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(found[...], expected)
