"""verl's FSDP checkpoints, as torch's FSDP1 and FSDP2 write them, and the same state in plain layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
import verl_writer
from hostile import damage, ends_well, few
from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.formats.verl_shards import read_ranks
from stepscope.policy.checkpoint.load import checkpoint_digest, load_checkpoint, read_settings
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.adamw import AdamWState

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NEEDED = {
    "loss_type": "grpo",
    "scale_rewards": "group",
    "temperature": 1.0,
    "max_response_tokens": 6,
    "max_grad_norm": 1.0,
}


def written(out: Path, *more: str) -> Path:
    script = Path(verl_writer.__file__)
    subprocess.run([sys.executable, script, out, *more], check=True, timeout=300, capture_output=True)
    return out


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("verl") / "layouts")


@pytest.fixture(scope="module")
def more_layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = written(tmp_path_factory.mktemp("verl") / "more", "more")
    config = out / "original-lora/global_step_2/actor/huggingface/config.json"
    with pytest.raises(CheckpointError, match=r"the run has saved the adapter alone .* as _name_or_path"):
        loaded(config.parents[2])
    described = json.loads(config.read_text()) | {"_name_or_path": str(out / "original-lora/base")}
    config.write_text(json.dumps(described))
    return out


@pytest.fixture
def copy(layouts: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a layout that a test may spoil: its ``actor``."""

    def copied(name: str) -> Path:
        shutil.copytree(layouts / name / "global_step_2" / "actor", tmp_path / name / "actor")
        return tmp_path / name / "actor"

    return copied


def loaded(folder: Path, precision: str = "float64") -> Any:
    return load_checkpoint(folder, precision=precision, settings=StepSettings())


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    return str(caught.value)


def rewritten(file: Path, change: Callable[[Any], None]) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def check_same(folder: Path) -> None:
    """Weights, moments, steps, groups and the next direction are those of the plain layout, bit for bit."""
    own, plain = loaded(folder / "global_step_2"), loaded(folder / "plain")
    theirs = dict(plain.model.named_parameters())
    assert [n for n, _ in own.model.named_parameters()] == list(theirs)
    for name, parameter in own.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    state, expected = own.optimizer, plain.optimizer
    assert isinstance(state, AdamWState)
    assert set(state.names) == set(expected.names)
    assert state.steps == expected.steps == dict.fromkeys(state.names, 2)
    for name in state.names:
        assert torch.equal(state.exp_avg[name], expected.exp_avg[name]), name
        assert torch.equal(state.exp_avg_sq[name], expected.exp_avg_sq[name]), name
    (group,), (other,) = state.groups, expected.groups
    assert group.lr == other.lr == 0.00075  # the schedule's third step: 3/4 of 1e-3
    assert (group.betas, group.eps, group.weight_decay) == (other.betas, other.eps, 0.01)
    update = cases.batch(plain)
    direction = reconstruct_step(own, update).direction
    for name, vector in reconstruct_step(plain, update).direction.items():
        assert torch.equal(direction[name], vector), name
    assert own.step == 2
    assert own.stored_dtypes == ("float32",)


@pytest.mark.parametrize("name", [n for n, layout in verl_writer.LAYOUTS.items() if layout.meshed])
def test_a_checkpoint_is_the_one_in_plain_layout(layouts: Path, name: str) -> None:
    check_same(layouts / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", verl_writer.MORE)
def test_every_further_layout_is_the_one_in_plain_layout(more_layouts: Path, name: str) -> None:
    check_same(more_layouts / name)


def test_uneven_pieces_are_among_them(layouts: Path) -> None:
    ranks = read_ranks(layouts / "fsdp2-lora/global_step_2/actor", "model")
    name = next(n for n in ranks[0] if "lora_A" in n)
    assert [rank[name]._local_tensor.shape[0] for rank in ranks] == [1, 1, 0]
    ranks = read_ranks(layouts / "flat/global_step_2/actor", "optim")
    assert sum(rank["state"][1]["exp_avg"].numel() for rank in ranks) == 2512 + 2  # padded for 3 processes


def test_check_tells_the_layout_and_what_must_be_given(layouts: Path) -> None:
    folder = layouts / "flat-lora" / "global_step_2"
    first, second, *rest = inspect_checkpoint(folder)
    assert (first.level, first.what) == (
        "ok",
        "layout of verl (FSDP), written by 2 processes: weights: model_world_size_2_rank_*.pt (FSDP1, a LoRA "
        "adapter, float32); optimizer state: optim_world_size_2_rank_*.pt",
    )
    assert second.level == "fail"
    assert all(f"loss.{name}=..." in second.cure for name in NEEDED)
    assert not [f for f in rest if f.level == "fail"]
    assert not [f for f in inspect_checkpoint(folder, overrides=NEEDED) if f.level == "fail"]
    assert read_settings(folder, overrides=NEEDED).loss_type == "grpo"


@pytest.mark.slow
def test_it_is_measured_with_the_settings_given(layouts: Path, tmp_path: Path) -> None:
    checkpoint = layouts / "fsdp2" / "global_step_2"
    task = ["--task", "arithmetic:terms=2,digits=1,ops=+", "--out", tmp_path / "m"]
    code, said = ends_well("measure", checkpoint, *task)
    assert code == 2
    assert all(f"loss.{name}=..." in said for name in NEEDED)
    given = [f"loss.{name}={value}" for name, value in (NEEDED | {"max_response_tokens": 2}).items()]
    batches = ["update.num_prompts=16", "update.group_size=8", "probe.num_prompts=8"]
    short = ["loss.answer_format=last_number", *batches, "--stages", "rollouts,step,change"]
    assert ends_well("measure", checkpoint, *task, *given, *short)[0] == 0
    step = json.loads((tmp_path / "m" / "step.json").read_text())
    assert step["lr"] == 0.00075
    assert step["num_parameters"] == 5744


def test_a_run_folder_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    for step in (10, 20):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
    assert "a run with 2 checkpoints, expected one checkpoint; point at one" in refusal(tmp_path)


def test_a_checkpoint_has_an_identity(copy: Callable[[str], Path]) -> None:
    actor = copy("flat")
    before = checkpoint_digest(actor.parent)
    rewritten(actor / "optim_world_size_3_rank_2.pt", lambda c: c["state"][0]["exp_avg"].neg_())
    assert checkpoint_digest(actor.parent) != before != checkpoint_digest(actor)


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)


def reshape(folder: Path, **values: int) -> None:
    path = folder / "huggingface" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_run(folder: Path) -> None:
    shutil.copy(folder / "optim_world_size_3_rank_0.pt", folder / "optim_world_size_2_rank_0.pt")


def later(content: Any) -> None:
    for entry in content["state"].values():
        entry["step"] += 1


SPOILED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a file is missing": (
        "flat",
        lambda f: (f / "optim_world_size_3_rank_1.pt").unlink(),
        r"2 optim files of 3 processes, optim_world_size_3_rank_1\.pt is missing; copy those of all machines",
    ),
    "another run's files": ("flat", other_run, "optim files of 2 and of 3 processes"),
    "files under each other's names": (
        "fsdp2",
        lambda f: swap(f, "model_world_size_3_rank_0.pt", "model_world_size_3_rank_1.pt"),
        "the file of process 0 has been written by another",
    ),
    "moments under each other's names": (
        "fsdp2",
        lambda f: swap(f, "optim_world_size_3_rank_0.pt", "optim_world_size_3_rank_1.pt"),
        "the file of process 0 has been written by another",
    ),
    "a file of a later step": (
        "original",
        lambda f: rewritten(f / "optim_world_size_3_rank_1.pt", later),
        r"entry 0 \(step\): the processes have different values of it",
    ),
    "another model": ("fsdp2", lambda f: reshape(f, intermediate_size=36), "got .*, expected "),
    "another wrap policy": (
        "flat",
        lambda f: rewritten(
            f / "optim_world_size_3_rank_0.pt",
            lambda c: c["state"][1].update(exp_avg=torch.zeros(9), exp_avg_sq=torch.zeros(9)),
        ),
        "no way in which FSDP joins the parameters of this model gives entries of these sizes",
    ),
    "the old ShardedTensor": ("old", lambda f: None, "torch's old ShardedTensor"),
    "no configuration": ("flat", lambda f: shutil.rmtree(f / "huggingface"), "says what model this is"),
    "an adapter without its scale": (
        "flat-lora",
        lambda f: (f / "lora_train_meta.json").unlink(),
        "r is None, expected a positive whole number",
    ),
    "moments in blocks": (
        "flat",
        lambda f: [
            rewritten(path, lambda c: c["state"][0].update(state1=torch.zeros(3)))
            for path in f.glob("optim_*.pt")
        ],
        "moments of bitsandbytes in blocks",
    ),
    "torchao's AdamW": (
        "flat",
        lambda f: [
            rewritten(path, lambda c: [c["param_groups"][0].pop(k) for k in ("maximize", "fused")])
            for path in f.glob("optim_*.pt")
        ],
        "torchao's Adam or AdamW, where nothing says",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_does_not_fit_is_named(copy: Callable[[str], Path], what: str) -> None:
    name, spoil, message = SPOILED[what]
    actor = copy(name)
    spoil(actor)
    with pytest.raises(CheckpointError, match=message):
        loaded(actor.parent)


def test_world_size_of_the_configuration_is_held_to_the_files(copy: Callable[[str], Path]) -> None:
    actor = copy("flat")
    (actor / "fsdp_config.json").write_text('{"FSDP_version": 1, "world_size": 8}')
    first = inspect_checkpoint(actor)[0]
    assert first.level == "fail"
    assert "world_size is 8, and there are files of 3 processes" in first.what


def test_parameters_are_numbered_as_the_training_s_model_had_them(copy: Callable[[str], Path]) -> None:
    """A later transformers may order a model's parameters anew; the files have the order of the training."""
    actor = copy("fsdp2")
    before = loaded(actor).optimizer
    pair = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "kv"]
    numbers = [list(read_ranks(actor, "model")[0]).index(name) for name in pair]

    def exchanged(content: Any) -> None:
        kept = list(content.items())
        i, j = numbers
        kept[i], kept[j] = kept[j], kept[i]
        content.clear()
        content.update(kept)

    def renumbered(content: Any) -> None:
        i, j = numbers
        content["state"][i], content["state"][j] = content["state"][j], content["state"][i]

    for rank in range(3):
        rewritten(actor / f"model_world_size_3_rank_{rank}.pt", exchanged)
        rewritten(actor / f"optim_world_size_3_rank_{rank}.pt", renumbered)
    after = loaded(actor).optimizer
    for name in pair:
        assert torch.equal(after.exp_avg[name], before.exp_avg[name])
    assert not torch.equal(after.exp_avg[pair[0]], after.exp_avg[pair[1]])


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_nothing_in_the_files_is_run(
    copy: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    actor = copy("fsdp2")
    torch.save(Payload(), actor / f"{kind}_world_size_3_rank_1.pt")
    assert "nothing of it was run" in refusal(actor)
    assert not [f for f in inspect_checkpoint(actor) if f.level == "ok" and "AdamW" in f.what]
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "flat", "flat-lora", "original"])
def test_damage_is_an_error_of_the_files_or_does_no_harm(layouts: Path, place: Path, name: str) -> None:
    @few(40)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        actor = place / name
        shutil.rmtree(actor, ignore_errors=True)
        shutil.copytree(layouts / name / "global_step_2" / "actor", actor)
        files = sorted(path for path in actor.rglob("*") if path.is_file() and "extra" not in path.name)
        damage(data.draw(st.sampled_from(files)), data.draw)
        with suppress(CheckpointError):
            loaded(actor, "float32")

    check()
