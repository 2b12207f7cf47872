"""DeepSpeed's files that are incomplete, of another layout, damaged or hostile: named, and nothing is run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
import hostile
from deepspeed_layout import folders, read, save
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.load import load_checkpoint


def state_of(step: Path, rank: int = 0) -> Path:
    return step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_of(step: Path) -> Path:
    return step / "mp_rank_00_model_states.pt"


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = read(file)
    change(content)
    save(content, file)


def of_state(change: Callable[[dict[str, Any]], object], *ranks: int) -> Callable[[Path], None]:
    """A change to ``optimizer_state_dict`` of some ranks."""

    def done(step: Path) -> None:
        for rank in ranks or (0, 1):
            edit(state_of(step, rank), lambda content: change(content["optimizer_state_dict"]))

    return done


def flat(value: Any, *keys: str) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["base_optimizer_state"]["state"][0].update(dict.fromkeys(keys, value))


def coupled(step: Path) -> None:
    config = {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}}
    edit(state_of(step), lambda content: content["ds_config"].update(config))


def exchanged(state: dict[str, Any]) -> None:
    """Places of another order than the masters, as DeepSpeed writes under ``round_robin_gradients``."""
    places = state["param_slice_mappings"][0]
    one, other = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qo")
    places[one].start, places[other].start = places[other].start, places[one].start


def swapped(step: Path) -> None:
    state_of(step).rename(step / "kept")
    state_of(step, 1).rename(state_of(step))
    (step / "kept").rename(state_of(step, 1))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank is missing": (
        lambda s: state_of(s, 1).unlink(),
        r"the file of rank 1 is missing, expected one of each of 2 processes, such as bf16_zero_pp_rank_0",
    ),
    "a rank too many": (
        lambda s: shutil.copy(state_of(s), state_of(s, 2)),
        r"bf16_zero_pp_rank_2_mp_rank_00_optim_states\.pt is not of this checkpoint, which 2 processes wrote",
    ),
    "two files of a rank": (
        lambda s: shutil.copy(state_of(s), s / state_of(s).name.removeprefix("bf16_")),
        "are of one rank",
    ),
    "files under each other's names": (swapped, r"the masters of .* are not those of the weights in"),
    "places of another order": (
        of_state(exchanged, 0),
        r"_proj\.weight are not those of the weights .* train without round_robin_gradients",
    ),
    "another learning rate on a rank": (
        of_state(lambda state: state["base_optimizer_state"]["param_groups"][0].update(lr=5.0), 1),
        "the parameter groups of the ranks have other settings each",
    ),
    "weights of another step": (
        lambda s: edit(model_of(s), lambda content: content["module"]["model.norm.weight"].mul_(1.1)),
        r"the masters of model\.norm\.weight are not those of the weights in",
    ),
    "no model file": (lambda s: model_of(s).unlink(), "the file of rank 0 is missing"),
    "tensor parallelism": (
        lambda s: shutil.copy(state_of(s), s / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"),
        r"weights were split over processes \(tensor parallelism\)",
    ),
    "experts": (
        lambda s: shutil.copy(model_of(s), s / "layer_0_expert_3_mp_rank_00_model_states.pt"),
        "experts were spread over processes",
    ),
    "pipeline": (
        lambda s: shutil.copy(model_of(s), s / "layer_03-model_states.pt"),
        "layers were spread over processes",
    ),
    "groups over other numbers of processes": (
        of_state(lambda s: s.update(partition_count=[2, 1])),
        "experts were spread",
    ),
    "elastic": (of_state(lambda s: s.update(base_optimizer_state=[{}, {}])), "an elastic checkpoint"),
    "decay in the gradient": (coupled, r"inside the gradient \(adam_w_mode false\)"),
    "no mapping": (
        of_state(lambda s: s.pop("param_slice_mappings")),
        "param_slice_mappings is NoneType, expected a list",
    ),
    "a slice that is too short": (
        of_state(lambda s: vars(next(iter(s["param_slice_mappings"][0].values()))).update(numel=1)),
        r"the ranks hold \d+ numbers of model\.embed_tokens\.weight, expected",
    ),
    "a slice that is elsewhere": (
        of_state(lambda s: vars(next(iter(s["param_slice_mappings"][0].values()))).update(start=10**7)),
        "ends at",
    ),
    "a slice before the start": (
        of_state(lambda s: vars(next(iter(s["param_slice_mappings"][0].values()))).update(start=-5)),
        "expected 0 or more",
    ),
    "factored moments": (
        of_state(flat(torch.ones(2, 3), "exp_avg_sq")),
        "expected one number per weight",
    ),
    "ranks at different steps": (
        of_state(flat(torch.tensor(2.0), "step"), 1),
        r"step is 3\.0 on rank 0|step is tensor\(3\.\) on rank 0",
    ),
    "no state": (
        of_state(lambda s: s["base_optimizer_state"].update(state={})),
        "there is no state for any of",
    ),
    "another optimizer": (
        of_state(lambda s: [s["base_optimizer_state"]["state"][i].pop("exp_avg_sq") for i in (0, 1)]),
        "the state is that of",
    ),
    "damaged": (lambda s: state_of(s).write_bytes(state_of(s).read_bytes()[:-4000]), "damaged"),
    "of two trainings": (
        lambda s: edit(model_of(s), lambda c: c["param_shapes"][1].popitem()),
        "which the model's file does not know",
    ),
    "no data": (lambda s: save([1], model_of(s)), "got list, expected a mapping"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint of two processes; not to be changed."""
    return folders(cases.model(), tmp_path_factory.mktemp("whole"), stage=2, world=2)[1]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(fault: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    damage, said = FAULTS[fault]
    damage(folder / "global_step3")
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


def test_the_last_of_several_steps_has_to_be_named(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    shutil.copytree(folder / "global_step3", folder / "global_step12")
    assert load_checkpoint(folder).step == 3  # latest says so
    (folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="it holds global_step12, global_step3 and no file 'latest'"):
        load_checkpoint(folder)


def test_a_step_that_latest_names_and_that_is_not_there_is_not_replaced(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    (folder / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match=r"latest: it names 'global_step7', of which no files.*step3"):
        load_checkpoint(folder)


class Runs:
    """What a hostile file would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", [state_of, model_of], ids=["optimizer", "model"])
def test_nothing_in_a_file_is_run(place: Callable[[Path], Path], whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    marker = tmp_path / "made"
    edit(place(folder / "global_step3"), lambda content: content.update(ds_version=Runs(marker)))
    with pytest.raises(CheckpointError, match=r"it holds posix\.mkdir, expected tensors and plain data"):
        load_checkpoint(folder)
    assert not marker.exists()


@pytest.fixture(scope="module")
def changed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("changed") / "checkpoint"))


@pytest.mark.parametrize("place", [state_of, model_of], ids=["optimizer", "model"])
def test_no_damage_gives_another_error(place: Callable[[Path], Path], whole: Path, changed: Path) -> None:
    file = place(changed / "global_step3")
    sound = place(whole / "global_step3")

    @hostile.few(12)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        content = read(sound)
        odd = [torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2, dtype=torch.long)]
        hostile.change(content, data.draw, [*hostile.ODD, *odd])
        save(content, file)
        with suppress(CheckpointError):
            load_checkpoint(changed)

    holds()
    shutil.copy(sound, file)
