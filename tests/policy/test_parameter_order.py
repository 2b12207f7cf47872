"""Orders of unnamed optimizer states, each against the optimizer that really had them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.optimizer_state import match_optimizer
from stepscope.policy.checkpoint.parameter_order import decay_parameter_names


def check(model: nn.Module, groups: Sequence[Sequence[str]], lrs: Sequence[float] | None = None) -> None:
    """Step a real AdamW over these names, forget them, and demand them back, moments included."""
    saved = stepped(model, groups, lrs)
    matched = match_optimizer(saved, model, where="here")
    assert [list(g.names) for g in matched.groups] == [list(names) for names in groups]
    for i, name in enumerate(n for names in groups for n in names):
        assert float(matched.exp_avg[name].flatten()[0]) == pytest.approx(0.1 * (i + 1))


def stepped(
    model: nn.Module, groups: Sequence[Sequence[str]], lrs: Sequence[float] | None = None
) -> dict[str, Any]:
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [params[n] for n in names], "lr": lr}
            for names, lr in zip(groups, lrs or [1e-3] * len(groups), strict=True)
        ]
    )
    for i, name in enumerate(n for names in groups for n in names):
        params[name].grad = torch.full_like(params[name], float(i + 1))
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def by_rule(model: nn.Module, *exempted: str) -> list[list[str]]:
    decay = decay_parameter_names(model, exempted)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return [[n for n in names if n in decay], [n for n in names if n not in decay]]


@pytest.mark.parametrize("exempted", [("bias",), ("bias", "layernorm", "rmsnorm")])
def test_groups_of_older_trainers(architecture: str, exempted: tuple[str, ...]) -> None:
    """Up to transformers 4.49 only LayerNorm and biases went without decay."""
    model = cases.model(architecture)
    check(model, by_rule(model, *exempted))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_frozen_embeddings_are_found(kind: str) -> None:
    """With an output matrix of the same shape behind the layers, and tied to it."""
    model = cases.model(kind)
    today = by_rule(model, "bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)")
    check(model, [[n for n in names if "embed_tokens" not in n] for names in today])


def test_equal_layers_that_were_frozen_are_not_guessed() -> None:
    model = cases.model()
    kept = [n for n, _ in model.named_parameters() if ".layers.0." not in n]
    with pytest.raises(CheckpointError, match="so layers were frozen, and the shapes do not tell which"):
        match_optimizer(stepped(model, [kept]), model, where="here")


def test_two_rates_that_shapes_tell_apart() -> None:
    model = cases.model()
    names = [n for n, _ in model.named_parameters()]
    embedding = [n for n in names if "embed" in n]
    check(model, [embedding, [n for n in names if n not in embedding]], [1e-4, 1e-3])
    adapted = get_peft_model(cases.model(), LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]))
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    check(adapted, [[n for n in names if part in n] for part in ("lora_A", "lora_B")], [1e-4, 1.6e-3])


def test_two_rates_that_shapes_do_not_tell_apart() -> None:
    model = cases.model()
    names = [n for n, _ in model.named_parameters()]
    first = [n for n in names if ".layers.0." in n]
    saved = stepped(model, [first, [n for n in names if n not in first]], [1e-4, 1e-3])
    with pytest.raises(
        CheckpointError, match=r"2 parameter groups with learning rates 0\.0001, 0\.001 are not"
    ):
        match_optimizer(saved, model, where="here")
