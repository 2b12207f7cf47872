"""Policies of which two processes hold a part each: derivatives, products and artifacts are those of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor, multiprocessing, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cases
from policy.test_group import free_port, started
from stepscope.cli import app
from stepscope.config import MeasureConfig, build_config
from stepscope.errors import ConfigError, MeasurementError
from stepscope.measure.change.measured import measure_changes
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.influence.attribution import influences
from stepscope.measure.noise.scale import noise_scale
from stepscope.measure.step.reconstruct import reconstruct_step, step_components
from stepscope.measure.step.sequence_shares import sequence_shares
from stepscope.pipeline import run_measure
from stepscope.pipeline.inputs.fitness import unfit_for_parts
from stepscope.policy import head, vectors
from stepscope.policy.distribution import bytes_held, dealt_out, refuse_uncuttable
from stepscope.policy.forward import make_batch
from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
from stepscope.policy.gradients.gram import grams
from stepscope.policy.gradients.products import paired_dots
from stepscope.policy.gradients.projection import Sketch, sketches
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.group import entered
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.adamw import AdamState, AdamWGroup, AdamWState
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.lion import LionGroup, LionState
from stepscope.policy.optim.muon import MuonState
from stepscope.policy.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeGroup, ScheduleFreeSGD
from stepscope.policy.optim.sgd import SGDGroup, SGDState
from stepscope.policy.passes import Budget
from stepscope.policy.shards import whole
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from test_together import same_artifacts

BUDGET = Budget(max_sequences=2)  # micro-batches of both processes are full, and one is not


def policy_of(model: nn.Module) -> Policy:
    settings = StepSettings(group_size=2, prompts_per_step=2, max_response_tokens=6)
    return Policy(model.double(), None, settings, cases.adamw_state(model), step=3)


UNTIED = "full, untied"
CPU = torch.device("cpu")
ROUND_OFF = {torch.float32: 1e-4, torch.bfloat16: 0.1}
KINDS: dict[str, Callable[[], Policy]] = {
    UNTIED: lambda: policy_of(cases.model("llama", vocab_size=13)),
    "lora, tied": lambda: policy_of(cases.adapted(cases.model("qwen2", vocab_size=13))),
}
SETTINGS = cases.MEASUREMENT | {
    "precision": "float64",
    "probe": {"num_prompts": 5, "group_size": 1},
    "stages": ["rollouts", "step", "change", "influence", "kernel", "noise"],
    "batch_size": 7,
}


def adapter_of_untied(checkpoint: Path, folder: Path) -> Path:
    """A LoRA adapter after three steps of AdamW, on a base that has a head of its own."""
    described = AutoConfig.from_pretrained(checkpoint)
    described.tie_word_embeddings = False
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(described)
    trained = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    base.load_state_dict(trained | {"lm_head.weight": trained["model.embed_tokens.weight"]})
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        ids = torch.randint(2, 20, (4, 9))
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder / "adapter")
    torch.save(optimizer.state_dict(), folder / "adapter" / "optimizer.pt")
    for name in ("tokenizer.json", "tokenizer_config.json", "trainer_state.json", "stepscope.json"):
        shutil.copy(checkpoint / name, folder / "adapter" / name)
    return folder / "adapter"


class OneWay(torch.autograd.Function):
    """tanh, which torch cannot differentiate in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.tanh()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * (1 - out**2)


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OneWay.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def without_forward_mode() -> Policy:
    owner = cases.policy()
    for layer in owner.model.model.layers:
        layer.mlp.act_fn = Tanh()
    return owner


def numbers(found: Any) -> list[np.ndarray[Any, Any]]:
    """What a result holds, each sharded tensor gathered."""
    if isinstance(found, dict):
        return [n for value in found.values() for n in numbers(value)]
    if isinstance(found, list | tuple):
        return [n for value in found for n in numbers(value)]
    if isinstance(found, Tensor):
        return [whole(found.detach()).double().numpy()]
    return [np.asarray(found, dtype=float)]


def with_optimizer(owner: Policy, name: str) -> Policy:
    """A policy whose AdamW is another optimizer that treats coordinates alike, with the same moments."""
    state = owner.optimizer
    assert isinstance(state, AdamWState)
    first, second, steps = state.exp_avg, state.exp_avg_sq, state.steps
    common: dict[str, Any] = {"names": tuple(first), "lr": 1e-3, "weight_decay": 0.1}
    average = ScheduleFreeGroup(**common, taken=3, weight_sum=3e-6, lr_max=1e-3)
    points = {n: p.detach() + first[n] for n, p in owner.parameters.items()}
    adam: dict[str, Any] = {"exp_avg": first, "exp_avg_sq": second, "steps": steps}
    made: dict[str, OptimizerState] = {
        "AMSGrad": AdamWState(
            groups=(AdamWGroup(**common, amsgrad=True),),
            max_exp_avg_sq={n: 2 * v for n, v in second.items()},
            **adam,
        ),
        "Adam": AdamState(groups=(AdamWGroup(**common, decoupled=False),), **adam),
        "SGD": SGDState(groups=(SGDGroup(**common, momentum=0.9, nesterov=True),), steps={}, buffer=first),
        "Lion": LionState(groups=(LionGroup(**common),), steps={}, exp_avg=first),
        "schedule-free": ScheduleFreeAdamW(groups=(average,), steps=steps, z=points, exp_avg_sq=second),
        "schedule-free SGD": ScheduleFreeSGD(groups=(average,), steps=steps, z=points, exp_avg_sq={}),
    }
    return replace(owner, optimizer=made[name])


OPTIMIZERS = ("AMSGrad", "Adam", "SGD", "Lion", "schedule-free", "schedule-free SGD")


def stepped(owner: Policy) -> list[np.ndarray[Any, Any]]:
    """An optimizer's step and its derivative at a gradient that is the parameters, halved."""
    state = owner.optimizer
    assert state is not None
    at: dict[str, Any] = {"clip": 0.5, "lr": 1e-3}
    ascent = {n: p.detach() / 2 for n, p in owner.parameters.items()}
    made = state.update(owner.parameters, ascent, **at)
    found = [made.parts, made.made_of(ascent)]
    if not state.nonlinear:
        slope = state.slope(owner.parameters, ascent, **at)
        stack = {n: torch.stack([t, t.cos()]) for n, t in ascent.items()}
        found += [slope.along(ascent), slope.pulled(stack)]
    return numbers(found)


def ones(rollouts: Rollouts) -> SequenceGradients:
    return SequenceGradients(rollouts, response_logprob)


def measured(owner: Policy, update: Rollouts, probe: Rollouts) -> dict[str, Any]:
    """What every stage that goes through the model is made of."""
    step = reconstruct_step(owner, update, budget=BUDGET)
    shares = sequence_shares(owner, step, budget=BUDGET)
    assert shares is not None
    changes = measure_changes(
        owner,
        step,
        probe,
        quantities=("entropy", "reward"),
        lrs=[1e-4],
        options=ChangeOptions(second_order=True),
        budget=BUDGET,
    )
    points = [point for change in changes for point in change.points]
    ways = influences(owner, step, update, probe, budget=BUDGET)
    gradients = ones(update)
    metrics = {"one": None, "P": step.preconditioner}
    products = grams(
        owner,
        gradients,
        metrics=metrics,
        other=ones(probe),
        budget=replace(BUDGET, memory_bytes=4 * vectors.vector_bytes(owner.parameters)),
    )
    noise = noise_scale(owner, update, preconditioner=step.preconditioner, budget=BUDGET)
    return {
        "gradient": gradient(owner, update, response_logprob, budget=BUDGET),
        "step": step.direction,
        "components": [(c.norm, c.share, c.cosine) for c in step_components(step).values()],
        "shares": (shares.share, shares.norm),
        "true": [p.true.value for p in points],
        "linear": [(p.linear.value, p.linear.stderr) for p in points],
        "second order": [p.second_order.value for p in points if p.second_order],
        "influence": [(w.sequences, w.stderr, *w.fold_tokens, w.total.value) for w in ways],
        "kernel": (products.square, products.cross, products.other_norms),
        "paired": paired_dots(owner, gradients, gradients, metrics, budget=BUDGET),
        "noise": (noise.sgd.noise.value, noise.sgd.signal.value),
    }


def slopes(owner: Policy, update: Rollouts) -> list[Tensor]:
    direction = {n: p.detach() for n, p in owner.parameters.items()}
    return directional_derivative(owner, update, response_logprob, direction, budget=BUDGET)


def by_command(rank: int, folder: Path, port: int) -> None:
    started(rank, 2, port)
    for name in ("full", "lora"):
        app(["measure", "--config", str(folder / f"{name}.yaml"), "--shard"], standalone_mode=False)
    expected = torch.load(folder / "alone.pt", weights_only=False)
    with entered(device="cpu", lockstep=True) as group:
        for name in OPTIMIZERS:
            own = dealt_out(lambda name=name: with_optimizer(KINDS[UNTIED](), name), group, CPU)  # type: ignore[misc]
            for one, two in zip(expected[name], stepped(own), strict=True):
                np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-12, err_msg=name)
        assert 0.4 < bytes_held(own) / bytes_held(with_optimizer(KINDS[UNTIED](), name)) < 0.6
        parameters = {n: p.detach() for n, p in own.parameters.items()}
        before = {n: whole(p).clone() for n, p in parameters.items()}
        with vectors.shifted(own.parameters, parameters, 1.0):
            assert all(torch.equal(whole(p), 2 * before[n]) for n, p in parameters.items())
        assert all(torch.equal(whole(p), before[n]) for n, p in parameters.items())
        with pytest.raises(MeasurementError, match="whole parameters"):
            sketches(own, ones(expected["batch"]), Sketch(8), metrics={"one": None})
        for dtype, close in ROUND_OFF.items():
            coarse = dealt_out(partial(cases.policy, dtype=dtype), group, CPU)
            found = numbers(gradient(coarse, expected["batch"], response_logprob, budget=BUDGET))
            for one, two in zip(expected[dtype], found, strict=True):
                np.testing.assert_allclose(two, one, rtol=close, atol=close * np.abs(one).max(initial=0))
        odd = dealt_out(without_forward_mode, group, CPU)
        for one, two in zip(expected["slopes"], slopes(odd, expected["batch"]), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-7, atol=1e-7)
    (folder / f"done {rank}").touch()


def test_two_processes_with_a_part_each_measure_what_one_does(checkpoint: Path, tmp_path: Path) -> None:
    sources = {"full": checkpoint, "lora": adapter_of_untied(checkpoint, tmp_path)}
    for name, source in sources.items():
        chosen = SETTINGS | {"checkpoint": str(source), "quantities": ["entropy" if name == "full" else "kl"]}
        run_measure(build_config(MeasureConfig, chosen | {"out": str(tmp_path / "one" / name)}))
        two = chosen | {"out": str(tmp_path / "two" / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(two))
    found: dict[Any, Any] = {name: stepped(with_optimizer(KINDS[UNTIED](), name)) for name in OPTIMIZERS}
    odd = without_forward_mode()
    found["batch"] = cases.batch(odd)
    found["slopes"] = slopes(odd, found["batch"])
    for dtype in ROUND_OFF:
        coarse = cases.policy(dtype=dtype)
        found[dtype] = numbers(gradient(coarse, found["batch"], response_logprob, budget=BUDGET))
    torch.save(found, tmp_path / "alone.pt")
    multiprocessing.spawn(by_command, (tmp_path, free_port()), nprocs=2)
    assert (tmp_path / "done 0").exists()
    assert (tmp_path / "done 1").exists()
    for name in sources:
        assert same_artifacts(tmp_path / "one" / name, tmp_path / "two" / name) > 10


def in_pieces(rank: int, folder: Path, port: int) -> None:
    started(rank, 2, port)
    head.PIECE_BYTES = 2000
    expected = torch.load(folder / "alone.pt", weights_only=False)
    with entered(device="cpu", lockstep=True) as group:
        for kind, make in KINDS.items():
            owner = dealt_out(make, group, CPU)
            found = measured(owner, *expected["batches", kind])
            for name, values in found.items():
                for one, two in zip(expected[kind][name], numbers(values), strict=True):
                    about = 1e-9 * np.abs(one).max(initial=1e-9)
                    np.testing.assert_allclose(two, one, rtol=1e-9, atol=about, err_msg=f"{kind}, {name}")
    (folder / f"done {rank}").touch()


@pytest.mark.slow
def test_so_they_do_with_the_vocabulary_and_the_kernel_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "PIECE_BYTES", 2000)
    found: dict[Any, Any] = {}
    for kind, make in KINDS.items():
        found["batches", kind] = cases.batch(make()), cases.batch(make(), seed=5)
        found[kind] = {n: numbers(v) for n, v in measured(make(), *found["batches", kind]).items()}
    torch.save(found, tmp_path / "alone.pt")
    multiprocessing.spawn(in_pieces, (tmp_path, free_port()), nprocs=2)
    assert (tmp_path / "done 0").exists()
    assert (tmp_path / "done 1").exists()


def test_one_process_has_no_parts(checkpoint: Path, tmp_path: Path) -> None:
    asked = {"checkpoint": str(checkpoint), "out": str(tmp_path / "m"), "shard": True}
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node=N"):
        run_measure(build_config(MeasureConfig, asked))
    assert not (tmp_path / "m").exists()


def test_an_optimizer_of_whole_parameters_is_refused() -> None:
    owner = cases.policy()
    muon = MuonState(groups=(), steps={}, buffer={})
    with pytest.raises(MeasurementError, match="whole parameters"):
        refuse_uncuttable(replace(owner, optimizer=muon))


def test_what_takes_whole_parameters_or_another_engine_is_refused_before_anything_is_computed() -> None:
    asked: dict[str, Any] = {"checkpoint": "", "out": "", "task": "arithmetic"}
    for more, said in (
        ({"projection": 8}, "random projection"),
        ({"sampler": {"engine": "continuous"}}, "sampler continuous"),
    ):
        config = build_config(MeasureConfig, asked | more)
        owner = cases.policy()
        assert any(said in finding.what for finding in unfit_for_parts(owner, config, config.stages))
    mixture = replace(cases.policy(), model=cases.model("qwen3_moe"), optimizer=None)
    config = build_config(MeasureConfig, asked)
    assert "experts" in unfit_for_parts(mixture, config, config.stages)[0].what


def test_parts_of_a_batch_have_one_shape_and_fill_up_with_nothing() -> None:
    batch = make_batch([[3, 4], [5], [6]], [[7], [8, 9], [2]])
    parts = [batch.part(rank, 2) for rank in range(2)]
    assert [tuple(p.input_ids.shape) for p in parts] == [(2, 4)] * 2
    assert parts[1].present.any(1).tolist() == [True, False]
    assert parts[1].response_mask.any(1).tolist() == [True, False]
    assert [i for p in parts for i in p.seq_index[p.present.any(1)].tolist()] == [0, 1, 2]
