"""Matching optimizer state to names, apart from what test_checkpoint.py does on real TRL folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.optimizer_state import match_optimizer, read_optimizer
from stepscope.policy.checkpoint.parameter_order import decay_parameter_names


def stepped(groups: Any, **settings: Any) -> dict[str, Any]:
    """State of a real AdamW after one step in which parameter i of the optimizer had gradient i + 1."""
    optimizer = torch.optim.AdamW(groups, **settings)
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(everything):
        p.grad = torch.full_like(p, float(i + 1))
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("lora", [False, True])
def test_decay_groups_are_those_of_the_trainer(architecture: str, lora: bool, tmp_path: Path) -> None:
    model = cases.model(architecture)
    if lora:
        model = cases.adapted(model, target_modules="all-linear", fan_in_fan_out=architecture == "gpt2")
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert decay_parameter_names(model) >= {n for n, _ in model.named_parameters() if "proj.weight" in n}
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    names = {id(p): n for n, p in model.named_parameters()}
    theirs = [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]
    for i, p in enumerate(p for group in trainer.optimizer.param_groups for p in group["params"]):
        p.grad = torch.full_like(p, float(i + 1))
    trainer.optimizer.step()
    matched = match_optimizer(trainer.optimizer.state_dict(), model, where="optimizer.pt")
    assert [list(g.names) for g in matched.groups] == theirs
    for i, name in enumerate(n for group in theirs for n in group):
        assert float(matched.exp_avg[name].flatten()[0]) == pytest.approx(0.1 * (i + 1))
        assert float(matched.exp_avg_sq[name].flatten()[0]) == pytest.approx(0.001 * (i + 1) ** 2)


def test_hyperparameters_are_read_per_group() -> None:
    model = cases.model()
    decaying = decay_parameter_names(model)
    params = dict(model.named_parameters())
    saved = stepped(
        [
            {"params": [p for n, p in params.items() if n in decaying], "weight_decay": 0.3, "lr": 0.5},
            {"params": [p for n, p in params.items() if n not in decaying], "betas": (0.8, 0.9), "eps": 1e-5},
        ],
        lr=torch.tensor(0.25),
        weight_decay=0.0,
        amsgrad=True,
    )
    first, second = match_optimizer(saved, model, where="here").groups
    assert (first.lr, first.weight_decay, first.betas, first.eps) == (0.5, 0.3, (0.9, 0.999), 1e-8)
    assert (second.lr, second.weight_decay, second.betas, second.eps) == (0.25, 0.0, (0.8, 0.9), 1e-5)
    assert first.amsgrad
    assert set(match_optimizer(saved, model, where="here").max_exp_avg_sq) == set(params)


def test_moments_are_widened_never_narrowed() -> None:
    for stored, asked, expected in (
        (torch.bfloat16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ):
        model = cases.model().to(stored)
        matched = match_optimizer(stepped(model.parameters()), model, where="here", dtype=asked)
        assert {t.dtype for t in (*matched.exp_avg.values(), *matched.exp_avg_sq.values())} == {expected}


def test_what_is_not_adamw_is_refused() -> None:
    model = cases.model()
    for optimizer, message in (
        (torch.optim.RMSprop(model.parameters(), lr=0.1), "that of RMSprop"),
        (torch.optim.Adagrad(model.parameters()), "that of Adagrad"),
        (torch.optim.AdamW(model.parameters(), maximize=True), "maximizes"),
    ):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(CheckpointError, match=message) as caught:
            match_optimizer(optimizer.state_dict(), model, where="optimizer.pt")
        assert str(caught.value).startswith("optimizer.pt: ")


def test_groups_that_no_known_order_explains_are_refused() -> None:
    model = cases.model()
    params = list(model.parameters())
    with pytest.raises(CheckpointError, match="3 parameter groups with learning rates"):
        match_optimizer(
            stepped([{"params": params[:2]}, {"params": params[2:5]}, {"params": params[5:]}]),
            model,
            where="x",
        )
    with pytest.raises(CheckpointError, match=r"groups of \[25\] parameters, expected \[26\]"):
        match_optimizer(stepped(params[:0:-1]), model, where="x")
    strange = stepped([(f"elsewhere.{n}", p) for n, p in model.named_parameters()])
    with pytest.raises(
        CheckpointError, match=r"the optimizer has elsewhere\.\S+, which is no trainable parameter"
    ):
        match_optimizer(strange, model, where="x")


def test_a_pickle_in_the_place_of_tensors_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return eval, (f"open({str(witness)!r}, 'w')",)

    torch.save({"state": Hostile(), "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="not plain tensors") as caught:
        read_optimizer(tmp_path / "optimizer.pt")
    assert not witness.exists()
    assert "\n" not in str(caught.value)
