"""Checkpoints in verl's layout, written by torch's own FSDP1 and FSDP2.

verl itself is not installed: what is saved, and around which modules a model is cut, follows the source of
verl 0.9.1: ``FSDPCheckpointManager.save_checkpoint`` (``verl/utils/checkpoint/fsdp_checkpoint_manager.py``),
``get_fsdp_wrap_policy`` and ``apply_fsdp2`` (``verl/utils/fsdp_utils.py``), and ``_build_fsdp_module`` of
``FSDPEngine`` (``verl/workers/engine/fsdp/transformer_impl.py``). Beside each checkpoint lies the same state
in plain layout, put together by torch.

    python tests/verl_writer.py FOLDER [more]      writes the layouts of :data:`LAYOUTS` or of :data:`MORE`
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import (
    _or_policy,
    lambda_auto_wrap_policy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

import cases
from stepscope.policy.loss.settings import StepSettings

STEPS = 2


@dataclass(frozen=True)
class Layout:
    """One way in which verl may write a checkpoint.

    Attributes:
        version: of FSDP.
        shards: processes over which a model is cut.
        replicas: copies of it (``fsdp_size`` below the number of processes).
        lora: train an adapter.
        original: ``use_orig_params``.
        smallest: ``wrap_policy.min_num_params``.
        lora_only: ``checkpoint.save_lora_only``.
        meshed: FSDP1 is told the mesh of processes, as verl has done since 0.3.
        architecture: of the model; Qwen3's input and output embeddings are two.
    """

    version: int
    shards: int
    replicas: int = 1
    lora: bool = False
    original: bool = False
    smallest: int = 0
    lora_only: bool = False
    meshed: bool = True
    architecture: str = "qwen2"


LAYOUTS = {
    "fsdp2": Layout(2, 3, architecture="qwen3"),
    "fsdp2-lora": Layout(2, 3, lora=True),
    "flat": Layout(1, 3),
    "flat-lora": Layout(1, 2, lora=True),
    "original": Layout(1, 3, original=True),
    "old": Layout(1, 2, meshed=False),
}
"""Those that every run of the tests reads."""

MORE = {
    "fsdp2-one": Layout(2, 1),
    "fsdp2-replicas": Layout(2, 2, 2, architecture="qwen3"),
    "flat-one": Layout(1, 1),
    "flat-replicas": Layout(1, 2, 2),
    "flat-sized": Layout(1, 2, smallest=1500, architecture="qwen3"),
    "original-lora": Layout(1, 2, lora=True, original=True, lora_only=True),
}


def model(layout: Layout, base: Path) -> Any:
    """The model before it is cut; an adapter's base is saved for whoever has the adapter alone."""
    plain = cases.model(layout.architecture, vocab_size=23, intermediate_size=35)
    if not layout.lora:
        return plain.train()
    if dist.get_rank() == 0 and not base.exists():
        plain.save_pretrained(base)
    plain.config._name_or_path = plain.name_or_path = str(base)
    torch.manual_seed(1)
    return cases.adapted(plain, task_type="CAUSAL_LM", lora_alpha=3).train()


def policy(module: Any, layout: Layout) -> Any:
    """As ``get_fsdp_wrap_policy`` makes it."""
    policies: list[Any] = []
    if layout.lora and not layout.smallest:
        policies.append(
            functools.partial(
                lambda_auto_wrap_policy,
                lambda_fn=lambda m: bool(
                    not list(m.named_children())
                    and getattr(m, "weight", None) is not None
                    and m.weight.requires_grad
                ),
            )
        )
    if layout.smallest:
        policies.append(functools.partial(size_based_auto_wrap_policy, min_num_params=layout.smallest))
    else:
        names = set(module._no_split_modules)
        classes = {type(m) for m in module.modules() if type(m).__name__ in names}
        policies.append(functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes))
    return functools.partial(_or_policy, policies=policies)


def cut(module: Any, layout: Layout, mesh: DeviceMesh) -> Any:
    """As ``_build_fsdp_module`` and ``apply_fsdp2`` wrap a model; computing in float32."""
    if layout.version == 1:
        strategy = ShardingStrategy.HYBRID_SHARD if layout.replicas > 1 else ShardingStrategy.FULL_SHARD
        return FullyShardedDataParallel(
            module,
            auto_wrap_policy=policy(module, layout),
            device_id=torch.device("cpu"),
            sharding_strategy=strategy,
            mixed_precision=MixedPrecision(torch.float32, torch.float32, torch.float32),
            device_mesh=mesh if layout.meshed else None,
            process_group=None if layout.meshed else mesh.get_group(),
            use_orig_params=layout.original,
        )
    tied = module.config.tie_word_embeddings
    names = set(module._no_split_modules)
    for name, part in list(module.named_modules()):
        leaf = name.rpartition(".")[2]
        named = not tied and leaf in {"embed_tokens", "lm_head"} and hasattr(part, "weight")
        if type(part).__name__ in names or (isinstance(part, torch.nn.Embedding) and not tied) or named:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def train(module: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Some steps on random tokens, others on each process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        ids = torch.randint(2, 23, (4, 9), generator=generator)
        logits = module(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def save(module: Any, optimizer: Any, scheduler: Any, folder: Path, layout: Layout, rank: int) -> None:
    """As ``FSDPCheckpointManager.save_checkpoint`` does."""
    world = layout.shards * layout.replicas
    folder.mkdir(parents=True, exist_ok=True)
    one = layout.version == 1
    context = (
        FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        )
        if one
        else nullcontext()
    )
    with context:
        weights = module.state_dict()
        if layout.lora_only:
            weights = {k: v for k, v in weights.items() if "lora_" in k or ".adapter_" in k}
        torch.save(weights, folder / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save(optimizer.state_dict(), folder / f"optim_world_size_{world}_rank_{rank}.pt")
    extra = {"lr_scheduler": scheduler.state_dict(), "rng": {"cpu": torch.get_rng_state()}}
    torch.save(extra, folder / f"extra_state_world_size_{world}_rank_{rank}.pt")
    if rank:
        return
    inner = module._fsdp_wrapped_module if one else module
    inner.config.save_pretrained(folder / "huggingface")
    cases.tokenizer().save_pretrained(folder / "huggingface")
    (folder / "fsdp_config.json").write_text(
        json.dumps({"FSDP_version": layout.version, "world_size": world}, indent=4)
    )
    if layout.lora:
        meta = inner.peft_config["default"]
        kept = {"r": meta.r, "lora_alpha": meta.lora_alpha, "task_type": "CAUSAL_LM"}
        (folder / "lora_train_meta.json").write_text(json.dumps(kept, indent=4))


def placed_by_fsdp(module: Any, optimizer: Any, group: Any) -> dict[str, Any]:
    """The whole state under ``use_orig_params``, each slice where FSDP's own records say that it lies.

    ``FSDP.optim_state_dict`` of torch 2.13 is of no use here: on the processor it gives the second moments
    for both, since it gathers all of them into one buffer.
    """
    names = {id(p): n.replace("_fsdp_wrapped_module.", "") for n, p in module.named_parameters()}
    state: dict[str, Any] = {}
    handles = [m._handle for m in FullyShardedDataParallel.fsdp_modules(module)]
    for flat in (handle.flat_param for handle in handles if handle is not None):
        for p, shape, at in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            whole = torch.zeros(2, shape.numel())
            if at.in_shard and p in optimizer.state:
                entry = optimizer.state[p]
                own = whole[:, at.intra_param_start_idx : at.intra_param_end_idx + 1]
                own.copy_(torch.stack([entry["exp_avg"], entry["exp_avg_sq"]]))
            dist.all_reduce(whole, group=group)
            if p.requires_grad:
                m, v = whole.view(2, *shape)
                state[names[id(p)]] = {"step": torch.tensor(float(STEPS)), "exp_avg": m, "exp_avg_sq": v}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def save_plain(
    module: Any, optimizer: Any, folder: Path, base: Path, layout: Layout, mesh: DeviceMesh, rank: int
) -> None:
    """The same state as the Trainer would leave it, gathered by torch."""
    if layout.version == 1:
        with FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT):
            weights = module.state_dict()
        group = mesh.get_group() if layout.replicas == 1 else None
        if layout.original:
            moments = placed_by_fsdp(module, optimizer, group)
        else:
            moments = FullyShardedDataParallel.optim_state_dict(module, optimizer, group=group)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(module, optimizer, options=options)
    if rank:
        return
    whole = model(layout, base)
    whole.load_state_dict(weights)
    whole.save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    StepSettings().save(folder)
    names = [n for n, p in whole.named_parameters() if p.requires_grad]
    state = {i: moments["state"][n] for i, n in enumerate(names)}
    groups = [{**moments["param_groups"][0], "params": list(range(len(names)))}]
    torch.save({"state": state, "param_groups": groups}, folder / "optimizer.pt")


def write(layout: Layout, out: Path) -> None:
    """One layout; every process of the group takes part in making its mesh."""
    world, rank = layout.shards * layout.replicas, dist.get_rank()
    ranks = torch.arange(world).view(layout.replicas, layout.shards)
    flat = layout.replicas == 1
    mesh = DeviceMesh(
        "cpu", ranks[0] if flat else ranks, mesh_dim_names=("fsdp",) if flat else ("ddp", "fsdp")
    )
    if rank >= world:
        return
    base = out / "base"
    module = cut(model(layout, base), layout, mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    train(module, optimizer, scheduler)
    save(module, optimizer, scheduler, out / "global_step_2" / "actor", layout, rank)
    if layout.meshed:
        save_plain(module, optimizer, out / "plain", base, layout, mesh, rank)


def processes(layouts: Mapping[str, Layout]) -> int:
    """How many are needed."""
    return max(layout.shards * layout.replicas for layout in layouts.values())


def process(rank: int, out: Path, layouts: Mapping[str, Layout]) -> None:
    """Write layouts as one of the processes."""
    torch.set_num_threads(1)
    count = processes(layouts)
    store = dist.FileStore(str(out / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    for name, layout in layouts.items():
        write(layout, out / name)
        dist.barrier()
    dist.destroy_process_group()


def main(out: Path, layouts: Mapping[str, Layout]) -> None:
    """Fork the processes, which is cheaper than to import torch in each."""
    warnings.filterwarnings("ignore")
    out.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(processes(layouts)):
        if (child := os.fork()) == 0:
            code = 1
            try:
                process(rank, out, layouts)
                code = 0
            except BaseException:  # noqa: BLE001 (a forked process must not go on as its parent)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, failed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), MORE if "more" in sys.argv else LAYOUTS)
