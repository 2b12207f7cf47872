"""Checkpoints laid out as DeepSpeed 0.19.8 does, without it: ``runtime/engine.py``, ``runtime/zero/*.py``.

``tests/policy/test_deepspeed_real.py`` holds what is written here against DeepSpeed's own files.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import cases
from stepscope.policy.loss.settings import StepSettings


class ZeroStageEnum(int, Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:  # noqa: N801
    numel: int
    start: int


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


_HOMES = {
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    fragment_address: "deepspeed.utils.tensor_fragment",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
}


@contextmanager
def pickled_as_deepspeeds() -> Iterator[None]:
    """Inside, the classes above are pickled under the names that DeepSpeed's have."""
    before, own = dict(sys.modules), {kind: kind.__module__ for kind in _HOMES}
    for kind, home in _HOMES.items():
        parts = home.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        setattr(sys.modules[home], kind.__name__, kind)
        kind.__module__ = home
    try:
        yield
    finally:
        for kind, home in own.items():
            kind.__module__ = home
        for name in [n for n in sys.modules if n.partition(".")[0] == "deepspeed" and n not in before]:
            del sys.modules[name]


def save(content: Any, file: Path) -> None:
    """``torch.save`` with those classes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with pickled_as_deepspeeds():
        torch.save(content, file)


def read(file: Path) -> Any:
    """What :func:`save` wrote, to be changed."""
    with pickled_as_deepspeeds():
        return torch.load(file, weights_only=False)


@dataclass(frozen=True)
class Training:
    """What a training with W processes has when it writes a checkpoint.

    Attributes:
        model: in float32, with ``requires_grad`` as in training.
        optimizer: with one entry per parameter, whose types and keys the flat ones get.
        stage: of ZeRO.
        world: W.
        sub_groups: of stage 3: number of parameters after which a new sub-group begins.
        backwards: whether groups are put in another order (``round_robin_gradients``).
        frozen: whether frozen weights are in the files.
        clip: ``gradient_clipping``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    stage: int
    world: int
    sub_groups: int | None = None
    backwards: bool = False
    frozen: bool = True
    clip: float = 0.5

    def write(self, folder: Path, *, step: int = 3) -> Path:
        """Write ``latest`` and the files of all ranks.

        Returns:
            The folder of the step.
        """
        inner = folder / f"global_step{step}"
        inner.mkdir(parents=True, exist_ok=True)
        (folder / "latest").write_text(inner.name)
        config = {"gradient_clipping": self.clip, "zero_optimization": {"stage": self.stage}}
        for rank in range(self.world):
            state = self._third(rank) if self.stage == 3 else self._first(rank)
            content = {"optimizer_state_dict": state, "ds_config": config, "ds_version": "0.19.8"}
            save(content, inner / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            if self.stage == 3 or rank == 0:
                prefix = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
                model = self._model(rank, step) | {"ds_config": config}
                save(model, inner / f"{prefix}mp_rank_00_model_states.pt")
        return inner

    @property
    def _names(self) -> Mapping[nn.Parameter, str]:
        return {p: n for n, p in self.model.named_parameters()}

    def _groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each flat tensor."""
        found: list[list[nn.Parameter]] = []
        for group in self.optimizer.param_groups:
            own = list(reversed(group["params"])) if self.backwards else list(group["params"])
            size = self.sub_groups or len(own)
            found += [own[i : i + size] for i in range(0, len(own), size)]
        return found

    def _model(self, rank: int, step: int) -> dict[str, Any]:
        names = self._names
        free = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        shared = _shared(self.model)
        module = OrderedDict(
            (n, torch.empty(0, dtype=torch.bfloat16) if self.stage == 3 else t.bfloat16())
            for n, t in self.model.state_dict().items()
            if self.frozen or n not in free  # a second name of a tied weight stays
        )
        shapes = fragments = None
        if self.stage > 1 and self.frozen:
            still = {n: p.detach().bfloat16() for n, p in self.model.named_parameters() if n in free}
            shapes = OrderedDict((n, t.shape) for n, t in still.items())
            fragments = OrderedDict(
                (n, self._part(t, rank) if self.stage == 3 else t) for n, t in still.items()
            )
        return {
            "module": module,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [OrderedDict((names[p], p.shape) for p in group) for group in self._groups()],
            "frozen_param_shapes": shapes,
            "shared_params": shared if rank == 0 else {},
            "frozen_param_fragments": fragments,
            "lr_scheduler": None,
            "skipped_steps": 0,
            "global_steps": step,
            "dp_world_size": self.world,
            "mp_world_size": 1,
            "ds_version": "0.19.8",
        }

    def _part(self, tensor: Tensor, rank: int) -> Tensor:
        """A rank's part of a parameter in stage 3."""
        length = -(-tensor.numel() // self.world)
        flat = pad(tensor.detach().reshape(-1), (0, length * self.world - tensor.numel()))
        return flat[rank * length : (rank + 1) * length].clone()

    def _state(self, flat: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``state_dict()`` of the optimizer over the flat tensors."""
        groups, number = [], 0
        for group in self.optimizer.param_groups:
            count = -(-len(group["params"]) // (self.sub_groups or len(group["params"])))
            own = {key: value for key, value in group.items() if key != "params"}
            groups.append(own | {"params": list(range(number, number + count))})
            number += count
        return {"state": dict(enumerate(flat)), "param_groups": groups}

    def _keys(self, group: list[nn.Parameter]) -> tuple[list[str], dict[str, Any]]:
        """Keys of what is kept per weight, and what is kept once."""
        entry = self.optimizer.state[group[0]]
        once = {k: v for k, v in entry.items() if not (isinstance(v, Tensor) and v.dim())}
        return [k for k in entry if k not in once], once

    def _first(self, rank: int) -> dict[str, Any]:
        masters, moments, mappings, paddings = [], [], [], []
        for group in self._groups():
            total = sum(p.numel() for p in group)
            size = -(-total // (2 * self.world)) * 2
            low, high = rank * size, (rank + 1) * size
            padding = min(max(high - total, 0), size)

            def cut(key: str, group: list[nn.Parameter] = group, low: int = low, high: int = high) -> Tensor:
                parts = [(self.optimizer.state[p][key] if key else p.detach()).reshape(-1) for p in group]
                whole = torch.cat(parts)
                return pad(whole, (0, max(high - len(whole), 0)))[low:high].clone()

            keys, once = self._keys(group)
            masters.append(cut("")[: size - padding].clone())
            moments.append(once | {key: cut(key) for key in keys})
            paddings.append(padding)
            mapping, start = OrderedDict(), 0
            for p in group:
                first, last = max(start, low), min(start + p.numel(), high)
                if first < last:
                    mapping[self._names[p]] = fragment_address(numel=last - first, start=first - low)
                start += p.numel()
            mappings.append(mapping)
        return {
            "loss_scaler": LossScaler(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "clip_grad": self.clip,
            "base_optimizer_state": self._state(moments),
            "single_partition_of_fp32_groups": masters,
            "zero_stage": ZeroStageEnum(self.stage),
            "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(group) for group in self._groups()],
            "partition_count": [self.world] * len(masters),
            "ds_version": "0.19.8",
            "param_slice_mappings": mappings,
        }

    def _third(self, rank: int) -> dict[str, Any]:
        masters, moments = [], []
        for group in self._groups():
            keys, once = self._keys(group)
            masters.append(torch.cat([self._part(p, rank) for p in group]))
            own = {k: torch.cat([self._part(self.optimizer.state[p][k], rank) for p in group]) for k in keys}
            moments.append(once | own)
        return {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": self.world,
            "optimizer_state_dict": self._state(moments),
            "fp32_flat_groups": masters,
        }


def _shared(model: nn.Module) -> dict[str, str]:
    """Second names of tied parameters, and the first."""
    first: dict[int, str] = {}
    found = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            found[name] = first[id(p)]
    return found


SETTINGS = StepSettings(max_response_tokens=6, max_grad_norm=0.5)


def trained(model: Any, *, lr: float = 1e-3) -> torch.optim.AdamW:
    """The optimizer of a model after three steps, in the Trainer's two groups."""
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in own if p.dim() > 1]
    plain = [p for _, p in own if p.dim() == 1]
    groups = [(decayed, 0.1), (plain, 0.0)]
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": wd} for params, wd in groups if params], lr=lr
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(2, cases.VOCAB, (4, 9), generator=random)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def beside(model: Any, folder: Path) -> None:
    """What stands beside weights and moments: config, tokenizer, settings."""
    model.save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    SETTINGS.save(folder)


def folders(model: Any, at: Path, **how: Any) -> tuple[Path, Path]:
    """One state in the plain layout and in DeepSpeed's, whose bfloat16 weights stand beside it."""
    optimizer = trained(model)
    plain, split = at / "plain", at / "split"
    beside(model, plain)
    torch.save(optimizer.state_dict(), plain / "optimizer.pt")
    shutil.copytree(plain, split)
    (split / "optimizer.pt").unlink()
    for weights in split.glob("*.safetensors"):
        if "adapter" in weights.name:
            weights.unlink()  # of nothing that is read
        else:
            copy.deepcopy(model).bfloat16().save_pretrained(split)
    Training(model, optimizer, **how).write(split)
    return plain, split
