"""Trainings under FSDP2 on the processor, with and without a probe, and what they leave."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from trl import GRPOConfig, GRPOTrainer

import cases
import stepscope as ss
from stepscope.errors import MeasurementError
from stepscope.measure.change.online import realised_change
from stepscope.policy.group import Group, current, formed, within
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.shards import is_sharded, part
from stepscope.policy.state import Policy
from stepscope.policy.twin import twin_of
from stepscope.results import Rollouts
from stepscope.training.probe import callback
from stepscope.training.probe.predict import predict
from stepscope.training.watching.capture import Captured
from stepscope.training.watching.state import (
    gradient_of,
    looking_at,
    optimizer_state,
    optimizer_within,
)

SETTINGS = StepSettings(group_size=3, prompts_per_step=3, max_response_tokens=6)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "full, untied": lambda: cases.model("llama", vocab_size=13).double(),
    "lora, tied": lambda: cases.adapted(cases.model("qwen2", vocab_size=13)).double(),
}


def cut(model: nn.Module) -> None:
    """As a training does it: by layers, and the rest."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(model)


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """A tensor held as a parameter is."""
    if not is_sharded(parameter):
        return values.clone()
    return distribute_tensor(values, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def seen(update: Rollouts) -> list[Captured]:
    """What the loss would have sent back."""
    rng = np.random.default_rng(0)
    rows = zip(
        update.prompt_token_ids,
        update.response_token_ids,
        update.logprobs,
        update.entropies,
        strict=True,
    )
    return [Captured(p, r, lp, h, rng.normal(size=len(r))) for p, r, lp, h in rows]


def two_steps(model: nn.Module) -> torch.optim.AdamW:
    """An optimizer after two steps on random tokens."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(2, 13, (4, 9), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def third_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    gradient: Mapping[str, Tensor],
    batches: tuple[Rollouts, Rollouts] | None,
    group: Group | None,
) -> dict[str, Any]:
    """One more step along a gradient, with a probe around it where there are batches."""
    for name, parameter in model.named_parameters():
        if name in gradient:
            parameter.grad = like(gradient[name], parameter)
    if batches is None:
        optimizer.step()
        return {}
    update, probe = batches
    args = SimpleNamespace(per_device_train_batch_size=2, max_grad_norm=0.0)
    budget = Budget(max_sequences=2)
    tokenizer = cases.tokenizer()
    with looking_at(model, group) as (look, own):
        state = optimizer_state(optimizer, look, own=own)
        pending = predict(
            Policy(look, tokenizer, SETTINGS, state, step=2),
            probe,
            seen(update),
            args,
            gradient=gradient_of(look, own),
            noise=True,
            top_tokens=4,
            budget=budget,
        )
    optimizer.step()
    with looking_at(model, group) as (look, _):
        change = realised_change(Policy(look, tokenizer, SETTINGS), pending.prediction, budget=budget)
    (point,) = change.points
    figures = {**pending.prediction.parts, **pending.figures, "true": point.true, "linear": point.linear}
    assert point.excess is not None
    figures["excess"] = point.excess
    found: dict[str, Any] = {name: (f.value, f.stderr) for name, f in figures.items() if name != "reward"}
    return found | {"norm": pending.grad_norm, **{k: pending.tokens[k] for k in ("influence", "position")}}


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this process holds of parameters and moments."""
    found = [part(p).clone() for p in model.parameters()]
    for entry in optimizer.state.values():
        found += [part(value).clone() for value in entry.values()]
    return found


@contextmanager
def fsdp_on_the_processor() -> Iterator[None]:
    """accelerate takes FSDP for processes with GPUs alone; here for those without, too."""
    made = AcceleratorState.__init__

    def with_plugin(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or vars(self).get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    settings = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", with_plugin)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


def save_model(folder: Path) -> None:
    """A model to train, and its tokenizer."""
    cases.model("qwen2").save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)


def lengths(completions: list[str], **_: Any) -> list[float]:
    """Different digits of a response."""
    return [float(len(set(text))) for text in completions]


def trainer(folder: Path, out: str, probe: ss.StepProbe | None, per_process: int) -> GRPOTrainer:
    """Two steps of GRPO on eight responses."""
    return GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=lengths,
        args=GRPOConfig(
            output_dir=str(folder / out),
            max_steps=2,
            per_device_train_batch_size=per_process,
            num_generations=2,
            max_completion_length=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            adam_epsilon=1e-4,
            weight_decay=0.1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)]),
        callbacks=[] if probe is None else [probe],
    )


def own_probe() -> ss.StepProbe:
    """At every step."""
    return ss.StepProbe(every=1, num_prompts=6, top_tokens=2, max_sequences=2)


@contextmanager
def batches_kept(folder: Path, rank: int | None) -> Iterator[None]:
    """What a process samples goes to files; without a rank it is taken from there, that of both as one."""
    plain = GRPOTrainer._generate_and_score_completions

    def kept(self: Any, inputs: Any) -> Any:
        step = self.state.global_step
        if rank is not None:
            found = plain(self, inputs)
            torch.save(dict(found), folder / f"batch-{step}-{rank}.pt")
            return found
        return together([torch.load(folder / f"batch-{step}-{r}.pt") for r in (0, 1)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", kept)
        yield


def together(halves: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of two processes as one, padded where TRL pads: prompts on the left, responses on the right."""
    found = {}
    for name, first in halves[0].items():
        rows = [half[name] for half in halves]
        if not isinstance(first, Tensor) or first.dim() == 0:
            found[name] = first
            continue
        if first.dim() == 2:
            most = max(r.shape[1] for r in rows)
            side = (lambda n: (n, 0)) if name.startswith("prompt") else (lambda n: (0, n))
            rows = [nn.functional.pad(r, side(most - r.shape[1])) for r in rows]
        found[name] = torch.cat(rows)
    return found


def trained(folder: Path, out: str, probe: ss.StepProbe | None) -> tuple[list[Tensor], list[str]]:
    """What a training left on this process, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = trainer(folder, out, probe, per_process=4)
        own.train()
    assert all(map(is_sharded, own.model.parameters()))
    said = [str(w.message) for w in caught if "StepProbe" in str(w.message)]
    return parts(own.model, own.optimizer.optimizer), said


def failing_on(rank: int) -> Callable[..., Any]:
    """A prediction that fails at the second step, on one process."""

    def failing(policy: Policy, *args: Any, **kwargs: Any) -> Any:
        if policy.step == 1 and current().rank == rank:
            raise ValueError("a fault on one process")
        return predict(policy, *args, **kwargs)

    return failing


def trainings_in_parts(rank: int, folder: Path) -> None:
    """A training alone, one with a probe, and one whose probe fails on one of the processes."""
    with fsdp_on_the_processor():
        expected, _ = trained(folder, "bare", None)
        with batches_kept(folder, rank):
            found, said = trained(folder, "probed", own_probe())
        assert not said, said
        assert all(map(torch.equal, expected, found))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(callback, "predict", failing_on(1))
            patch.setattr(callback, "PATIENCE", timedelta(seconds=4))
            found, said = trained(folder, "faulty", own_probe())
        assert len(said) == 1
        assert "off from step 2 on" in said[0]
        assert ("a fault on one process" in said[0]) == (rank == 1)
        assert len(expected) == len(found)
        assert all(map(torch.equal, expected, found))


def steps_in_parts(folder: Path, group: Group) -> None:
    """Steps of either kind with a probe are those without, and the probe's figures those of one process."""
    expected = torch.load(folder / "alone.pt", weights_only=False)
    for kind, make in KINDS.items():
        gradient, batches, alone = expected[kind]
        left = []
        for looked in (False, True):
            model = make().train()
            cut(model)
            optimizer = two_steps(model)
            hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
            found = third_step(model, optimizer, gradient, batches if looked else None, group)
            assert hooks == [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
            optimizer.zero_grad()
            ids = torch.arange(2, 10).reshape(2, 4)
            model(input_ids=ids, labels=ids).loss.backward()  # FSDP2's own state is in order
            optimizer.step()
            left.append(parts(model, optimizer))
        assert all(map(torch.equal, *left))
        assert found.keys() == alone.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, alone[name], rtol=1e-9, atol=1e-12, err_msg=f"{kind}, {name}")


def refused(group: Group) -> None:
    """A model of which something is whole everywhere, and an optimizer of whole parameters."""
    model: Any = KINDS["full, untied"]()
    for layer in model.model.layers:
        fully_shard(layer)
    with within(group), pytest.raises(MeasurementError, match=r"holds model\.embed_tokens\.weight as whole"):
        twin_of(model, group)
    held = [p for p in model.model.layers.parameters() if p.dim() == 2]
    with pytest.raises(MeasurementError, match="the optimizer is sharded Muon"):
        optimizer_within(torch.optim.Muon(held), parts=True)


def run(rank: int, folder: Path, environment: Mapping[str, str]) -> None:
    """One of two processes."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    group = formed(device="cpu", lockstep=True)
    refused(group)
    steps_in_parts(folder, group)
    trainings_in_parts(rank, folder)
    (folder / f"done {rank}").touch()
    torch.distributed.destroy_process_group()
