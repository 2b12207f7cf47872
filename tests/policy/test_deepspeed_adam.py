"""DeepSpeed's FusedAdam and CPUAdam: the step of their kernels, from states that count in either place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import real_steps
from deepspeed_layout import Training
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.deepspeed_state import Shards
from stepscope.policy.checkpoint.optimizer_state import match_optimizer, state_by_name
from stepscope.policy.optim.deepspeed import DeepSpeedAdam


class Fused(torch.optim.Optimizer):
    """``csrc/adam/multi_tensor_adam.cu`` in its mode for decoupled decay, with FusedAdam's keys."""

    def __init__(self, params: Any, **settings: Any) -> None:
        defaults = {
            "lr": 1e-3,
            "bias_correction": True,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
        }
        super().__init__(params, defaults | settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group.setdefault("step", 0)
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                own = self.state[p]
                if not own:
                    own |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                own["step"] += 1
                own["exp_avg"] = beta1 * own["exp_avg"] + (1 - beta1) * p.grad
                own["exp_avg_sq"] = beta2 * own["exp_avg_sq"] + (1 - beta2) * p.grad * p.grad
                first = own["exp_avg"] / (1 - beta1 ** own["step"])
                second = own["exp_avg_sq"] / (1 - beta2 ** own["step"])
                p -= lr * (first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_step_is_that_of_the_kernel(decay: float) -> None:
    policy = cases.policy(max_grad_norm=0.02)
    optimizer = Fused(policy.parameters.values(), lr=0.01, weight_decay=decay)
    real_steps.train(policy, optimizer)
    policy = real_steps.matched(policy, optimizer)
    assert isinstance(policy.optimizer, DeepSpeedAdam)
    step = cases.step(policy, seed=9)
    real_steps.assert_step_is_the_librarys(policy, optimizer, step, rtol=0, atol=1e-11)


@pytest.mark.parametrize("stage", [1, 3])
def test_steps_are_counted_in_the_entry_or_in_the_group(stage: int, tmp_path: Any) -> None:
    model = cases.model()
    optimizer = Fused(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    for entries in (True, False):
        if not entries:  # as in versions before 2024
            for own in optimizer.state.values():
                del own["step"]
            optimizer.param_groups[0]["step"] = 2
        folder = tmp_path / str(entries)
        Training(model, optimizer, stage=stage, world=2).write(folder)
        found = state_by_name(Shards.of(folder).optimizer(), model, where="here")
        assert set(found.steps.values()) == {2}


@pytest.mark.parametrize(
    ("setting", "said"), [("bias_correction", "without bias correction"), ("amsgrad", "with AMSGrad")]
)
def test_other_steps_are_refused(setting: str, said: str) -> None:
    model = cases.model()
    optimizer = Fused(model.parameters(), amsgrad=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0][setting] = setting == "amsgrad"
    with pytest.raises(CheckpointError, match=said):
        match_optimizer(optimizer.state_dict(), model, where="here")
