"""Files that DeepSpeed itself wrote: equal to the bit to what it gathers from its processes; its next step.

Needs DeepSpeed, which is no dependency: ``DS_BUILD_OPS=0 pip install --no-deps deepspeed==0.19.8 hjson ninja
py-cpuinfo msgpack einops``, and a C++ compiler for its CPUAdam and FusedAdam.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
from deepspeed_layout import Training, read
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.deepspeed_state import Shards
from stepscope.policy.checkpoint.names import Names
from stepscope.policy.checkpoint.optimizer_state import state_by_name

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

TRAINING = Path(__file__).with_name("deepspeed_training.py")


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} processes".format)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """All trainings of some processes."""
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={request.param}"]
    subprocess.run([*command, str(TRAINING), str(folder)], check=True, timeout=1500)
    return request.param, folder


def test_deepspeeds_files_are_what_it_says(world: tuple[int, Path]) -> None:
    from deepspeed_training import TRAININGS, model_of

    processes, folder = world
    for name, training in TRAININGS.items():
        truth = torch.load(folder / name / "truth.pt", weights_only=True)
        shards = Shards.of(folder / name)
        assert (shards.stage, shards.processes, shards.clip) == (training["stage"], processes, 0.5)
        weights, saved = shards.weights(), shards.optimizer()
        if "round_robin_gradients" in training and processes > 1:  # what it gathers is not the weights either
            with pytest.raises(CheckpointError, match="train without round_robin_gradients"):
                [tensor[...] for tensor in weights.values()]
            continue
        model = model_of(training)
        state = state_by_name(saved, model, where=name)
        assert set(state.steps.values()) == {3}
        assert {group.lr for group in state.groups} == {1e-2 / 4}
        assert set(state.names) == set(truth["theta"])
        for n, value in truth["theta"].items():
            assert torch.equal(weights[n][...], value), (name, n)
            for key, tensors in state.tensors().items():
                assert n not in tensors or torch.equal(tensors[n], truth[key][n]), (name, key, n)
        names = Names.of(model)
        whole = training.get("frozen", True)
        rest = {n: p for n, p in model.named_parameters() if n not in truth["theta"]} if whole else {}
        tied = {names.own(n) for n in weights if n.endswith("lm_head.weight")}  # never left out
        assert {names.own(n) for n in weights} == {*truth["theta"], *rest} | tied, name
        assert all(torch.equal(weights[n][...], p) for n, p in rest.items()), name
        if "gradient" in truth:
            check_step(state, truth, name)


def check_step(state: Any, truth: dict[str, dict[str, torch.Tensor]], name: str) -> None:
    """The step that DeepSpeed took next is the state's, from the gradient that it had."""
    norm = torch.cat([g.flatten() for g in truth["gradient"].values()]).norm()
    clip = min(1.0, 0.5 / (float(norm) + 1e-6))
    ascent = {n: -g for n, g in truth["gradient"].items()}
    lr = state.groups[0].lr
    update = state.update(truth["theta"], ascent, clip=clip, lr=lr)
    for n, value in truth["next"].items():
        own = sum(part[n] for part in update.parts.values()) + update.preconditioner[n] * ascent[n]
        torch.testing.assert_close(
            value, truth["theta"][n] + lr * own, rtol=0, atol=2.5e-7, msg=f"{name} {n}"
        )


def alike(found: Any, made: Any, path: str = "") -> None:
    """What DeepSpeed wrote is laid out as the tests do it; values of tensors are those of other trainings."""
    if isinstance(made, dict):
        assert set(made) <= set(found), (path, set(made) - set(found))
        for key in made:
            alike(found[key], made[key], f"{path}/{key}")
    elif isinstance(made, list | tuple) and not isinstance(made, torch.Size):
        assert len(found) == len(made), path
        for i, (one, other) in enumerate(zip(found, made, strict=True)):
            alike(one, other, f"{path}/{i}")
    elif isinstance(made, torch.Tensor):
        assert (found.shape, found.dtype) == (made.shape, made.dtype), path
    elif type(made).__module__ == "deepspeed_layout":
        assert vars(found) == vars(made) or type(made).__name__ != "fragment_address", path
    else:
        assert found == made, path


def test_the_layout_of_the_tests_is_deepspeeds(world: tuple[int, Path], tmp_path: Path) -> None:
    processes, folder = world
    for stage in (1, 2, 3):
        model = cases.model()
        own = [*model.parameters()]
        groups = [([p for p in own if p.dim() > 1], 0.1), ([p for p in own if p.dim() == 1], 0.0)]
        optimizer = torch.optim.AdamW([{"params": ps, "weight_decay": wd} for ps, wd in groups], lr=1e-2)
        for p in own:
            p.grad = torch.ones_like(p)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        made = Training(model, optimizer, stage=stage, world=processes).write(tmp_path / str(stage))
        real = folder / f"{stage} bf16 torch" / "global_step3"
        assert {f.name for f in made.iterdir()} == {f.name for f in real.iterdir()}
        for file in made.iterdir():
            content = read(file)
            content.pop("ds_config")
            content.pop("lr_scheduler", None)
            alike(torch.load(real / file.name, weights_only=False), content)
