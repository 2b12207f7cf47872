"""Run as a program: one training state, written by torch and accelerate in each layout, by several processes.

``python sharded_writers.py OUT 2 3`` leaves OUT/N/LAYOUT for N processes, and OUT/N/plain-full and
OUT/N/plain-lora of the same state as the Trainer of one process would write it. The processes are forks, so
that the libraries are imported once.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

import cases
from stepscope.policy.loss.settings import StepSettings

STEPS = 3


def build(kind: str, out: Path) -> nn.Module:
    """The model of a kind, the same in every process."""
    if kind == "full":
        return cases.model("qwen2").train()
    return cases.adapted(
        AutoModelForCausalLM.from_pretrained(out / "base"), task_type="CAUSAL_LM", init_lora_weights=False
    ).train()


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """AdamW in the two groups of the Trainer, with settings that tell them apart."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if "norm" not in n and "bias" not in n]
    plain = [p for n, p in trained if "norm" in n or "bias" in n]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1, "lr": 1e-3}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0, "lr": 2e-3})
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-7)


def trained(kind: str, out: Path) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(1)
    model = build(kind, out)
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        ids = torch.randint(2, len(cases.CHARACTERS), (4, 9))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def beside(folder: Path, kind: str, model: Any) -> None:
    """What the Trainer or its user leaves beside weights and state."""
    folder.mkdir(parents=True, exist_ok=True)
    configs = model.peft_config["default"] if kind == "lora" else model.config
    configs.save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    StepSettings(max_response_tokens=6).save(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": STEPS}))


def sharded(kind: str, out: Path, version: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same state under FSDP; its optimizer has the moments of the one that trained."""
    whole, before = trained(kind, out)
    names = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    moments = {n: copy.deepcopy(before.state[p]) for n, p in names.items()}
    numbered = [
        n for group in before.param_groups for p in group["params"] for n, q in names.items() if q is p
    ]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = [m for m in whole.modules() if isinstance(m, Qwen2DecoderLayer)]
    if version == 2:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(whole, mesh=mesh)
        optimizer = optimizer_of(whole)
        for name, p in whole.named_parameters():
            if name in moments:
                optimizer.state[p] = {
                    key: t if key == "step" else distribute_tensor(t, mesh, p.placements)  # type: ignore[attr-defined]
                    for key, t in moments[name].items()
                }
        return whole, optimizer
    saved = before.state_dict()
    for group in saved["param_groups"]:
        group["params"] = [numbered[i] for i in group["params"]]
    saved["state"] = moments
    wrapped = FullyShardedDataParallel(
        whole,
        auto_wrap_policy=ModuleWrapPolicy({Qwen2DecoderLayer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = optimizer_of(wrapped)
    optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(wrapped, optimizer, saved))
    return wrapped, optimizer


def by_accelerate(folder: Path, kind: str, model: nn.Module, optimizer: Any, version: int, form: str) -> None:
    """What ``Trainer._save_optimizer_and_scheduler`` calls under FSDP."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        state_dict_type="FULL_STATE_DICT" if form == "full" else "SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    # With several processes, accelerate has FSDP 1 move what it gathered to the processor. Where it is there
    # already, torch makes no copy and frees or reuses the memory: weights are gone, exp_avg is exp_avg_sq.
    if version == 1 and form == "full":
        plugin.optim_state_dict_config.offload_to_cpu = False  # type: ignore[union-attr]
    said = 1 if version == 1 else dist.get_world_size()
    accelerator: Any = SimpleNamespace(
        process_index=dist.get_rank(), num_processes=said, is_fsdp2=version == 2
    )
    by_file = {"use_dcp": False} if form == "ranks" else {}
    save_fsdp_model(plugin, accelerator, model, folder, adapter_only=kind == "lora", **by_file)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder, **by_file)


class AppState:
    """As prime-rl's ``trainer/ckpt.py`` has it."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizers = get_state_dict(self.model, [self.optimizer])
        return {"model": model, "optimizers": optimizers, "progress": {"step": STEPS, "total_tokens": 7}}

    def load_state_dict(self, _: Any) -> None:
        raise NotImplementedError


def by_prime_rl(folder: Path, model: nn.Module, optimizer: Any) -> None:
    dcp.save({"app": AppState(model, optimizer)}, checkpoint_id=folder / "trainer")


def by_nemo_rl(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """As NeMo-RL's ``utils/native_checkpoint.py`` has it."""
    options = StateDictOptions(cpu_offload=True)
    dcp.save({"model": get_model_state_dict(model, options=options)}, checkpoint_id=folder / "weights")
    state = {"optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save({"optim": state}, checkpoint_id=folder / "optimizer")


def flattened(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Flat keys, as torchtitan saves them."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({**get_model_state_dict(model), "optimizer": state}, checkpoint_id=folder)


def layouts(out: Path) -> dict[str, tuple[str, int, Callable[[Path, nn.Module, Any], None]]]:
    """Name to kind of model, version of FSDP, and what writes it."""
    found: dict[str, tuple[str, int, Callable[[Path, nn.Module, Any], None]]] = {}
    for kind in ("full", "lora"):
        for version in (1, 2):
            for form in ("full", "sharded", "ranks"):
                if form != "ranks" or (kind, version) == ("full", 2):
                    found[f"{kind}-fsdp{version}-{form}"] = (
                        kind,
                        version,
                        lambda folder, model, optimizer, k=kind, v=version, f=form: by_accelerate(
                            folder, k, model, optimizer, v, f
                        ),
                    )
    found["full-prime-rl"] = ("full", 2, by_prime_rl)
    found["full-nemo-rl"] = ("full", 2, by_nemo_rl)
    found["full-flat"] = ("full", 2, flattened)
    return found


def work(rank: int, world: int, out: Path) -> None:
    torch.set_num_threads(1)
    store = out / f"store-{world}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    PartialState(cpu=True)  # its loggers ask for it
    for kind in ("full", "lora"):
        model, optimizer = trained(kind, out)
        if rank == 0:
            plain = out / str(world) / f"plain-{kind}"
            beside(plain, kind, model)
            model.save_pretrained(plain)  # type: ignore[operator]
            torch.save(optimizer.state_dict(), plain / "optimizer.pt")
        dist.barrier()
        for version in (1, 2):
            shards = sharded(kind, out, version)
            for name, (of, under, write) in layouts(out).items():
                if (of, under) == (kind, version):
                    folder = out / str(world) / name
                    if rank == 0:
                        beside(folder, kind, model)
                        if name == "lora-fsdp1-full":  # of which PEFT has no weights, but for Trainer._save
                            model.save_pretrained(folder)  # type: ignore[operator]
                    write(folder, *shards)
                    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    base = cases.model("qwen2", seed=5)
    base.save_pretrained(target / "base")
    cases.tokenizer().save_pretrained(target / "base")
    for number in map(int, sys.argv[2:]):
        torch.multiprocessing.start_processes(work, args=(number, target), nprocs=number, start_method="fork")
