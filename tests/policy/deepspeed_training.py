"""Trainings with DeepSpeed itself, one process of several: ``torchrun deepspeed_training.py FOLDER``.

Each leaves its checkpoint after three steps and, in ``truth.pt``, what DeepSpeed says of it then: masters,
moments and the gradient of the next step as it gathers them from its processes, the masters after that step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # type: ignore[import-not-found]
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam  # type: ignore[import-not-found]
from deepspeed.utils import (  # type: ignore[import-not-found]
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import cases

OPTIMIZERS = {"torch": torch.optim.AdamW, "cpu": DeepSpeedCPUAdam, "fused": FusedAdam}
TRAININGS: dict[str, dict[str, Any]] = {
    **{
        f"{stage} {kind} {optimizer}": {"stage": stage, "bf16": kind == "bf16", "optimizer": optimizer}
        for stage in (1, 2, 3)
        for kind in ("bf16", "fp32")
        for optimizer in OPTIMIZERS
        if kind == "bf16" or optimizer == "torch"
    },
    "2 round robin": {"stage": 2, "round_robin_gradients": True},
    "3 sub-groups": {"stage": 3, "sub_group_size": 700},
    "2 offload": {"stage": 2, "optimizer": "cpu", "offload_optimizer": {"device": "cpu"}},
    "3 offload": {"stage": 3, "optimizer": "cpu", "offload_optimizer": {"device": "cpu"}},
    **{f"{stage} adapter": {"stage": stage, "adapter": True} for stage in (1, 2, 3)},
    **{f"{stage} adapter alone": {"stage": stage, "adapter": True, "frozen": False} for stage in (1, 2, 3)},
}


def model_of(training: dict[str, Any]) -> Any:
    """The model before the first step."""
    model = cases.model()
    if training.get("adapter"):
        torch.manual_seed(1)
        model = cases.adapted(model)
    return model.bfloat16() if training.get("bf16", True) else model


def train(
    folder: Path,
    *,
    stage: int,
    bf16: bool = True,
    optimizer: str = "torch",
    adapter: bool = False,
    frozen: bool = True,
    **zero: Any,
) -> None:
    """Three steps, a checkpoint, one step more."""
    model = model_of({"adapter": adapter, "bf16": bf16})
    own = [p for p in model.parameters() if p.requires_grad]
    groups = [([p for p in own if p.dim() > 1], 0.1), ([p for p in own if p.dim() == 1], 0.0)]
    made: Any = OPTIMIZERS[optimizer]
    built = made([{"params": ps, "weight_decay": wd} for ps, wd in groups if ps], lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=built,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(built, lambda s: 1 / (1 + s)),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": stage, **zero},
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(2, cases.VOCAB, (2 * world, 9), generator=random)[2 * rank : 2 * rank + 2]
    for _ in range(3):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=not frozen)
    if stage < 3:  # DeepSpeed 0.19.8 links the moments of the first group alone
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    truth = {"theta": {n: safe_get_full_fp32_param(p).clone() for n, p in named.items()}}
    for key in ("exp_avg", "exp_avg_sq"):
        truth[key] = {n: safe_get_full_optimizer_state(p, key).clone() for n, p in named.items()}
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    if "round_robin_gradients" not in zero:  # which safe_get_full_grad cannot gather
        truth["gradient"] = {n: safe_get_full_grad(p).float().clone() for n, p in named.items()}
    engine.step()
    truth["next"] = {n: safe_get_full_fp32_param(p).clone() for n, p in named.items()}
    if rank == 0:
        torch.save(truth, folder / "truth.pt")
    engine.destroy()


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for name, training in TRAININGS.items():
        train(Path(sys.argv[1]) / name, **training)
    dist.destroy_process_group()
