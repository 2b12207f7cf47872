"""Optimizers told apart by what they save; each state is a real optimizer's unless it says otherwise."""

from __future__ import annotations

import copy
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.optimizer_state import match_optimizer, read_optimizer
from stepscope.policy.optim.registry import OPTIMIZERS, kind_of, recognised


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """After one step with gradient 1 everywhere."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("RAdam", {}, "RAdam"),
        ("RAdam", {"decoupled_weight_decay": True}, "RAdam"),
        ("NAdam", {"decoupled_weight_decay": True}, "NAdam"),
        ("Adamax", {}, "Adamax"),
        ("RMSprop", {}, "RMSprop"),
        ("Adagrad", {}, "Adagrad"),
        ("Adadelta", {}, "Adadelta"),
        ("ASGD", {}, "another optimizer"),
    ],
)
def test_the_optimizers_of_torch(kind: str, options: dict[str, Any], named: str) -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    saved = state_of(getattr(torch.optim, kind)([parameter], lr=1e-3, **options))
    with pytest.raises(CheckpointError, match=f"here: the state is that of .*{named}|{named}") as caught:
        recognised(saved, "here")
    assert "train with optim='adamw_torch'" in str(caught.value)


def every_optimizer_of_torch() -> list[str]:
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return sorted(n for n, k in kinds.items() if issubclass(k, torch.optim.Optimizer) and n != "Optimizer")


@pytest.mark.parametrize("name", every_optimizer_of_torch())
def test_every_optimizer_of_torch_is_measured_or_refused(name: str) -> None:
    """A running one and what it saves are both known or both refused."""
    kind = getattr(torch.optim, name)
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = kind([parameter], lr=1e-3)
    sparse = torch.ones(3, 2).to_sparse()
    parameter.grad = sparse if name == "SparseAdam" else torch.ones(3, 2)
    optimizer.step(lambda: 1.0) if name == "LBFGS" else optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    if kind_of(optimizer) is not None:
        assert recognised(saved, "here")[0].library in (kind_of(optimizer).library, torch.optim.AdamW)
        return
    with pytest.raises(CheckpointError, match=r"here: .*a step can be rebuilt of"):
        recognised(saved, "here")


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optimizer_of_the_trainer_is_measured_or_refused(name: str, tmp_path: Path) -> None:
    """Those that a package makes which is not here cannot be tried; none of them counts as measured."""
    measured = {known for kind in OPTIMIZERS for known in kind.asked_for}
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to=[])
    layer = nn.Linear(80, 80)
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
    except (ImportError, ValueError):
        assert name not in measured
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        optimizer = made(layer.parameters(), **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        saved = state_of(optimizer)
    if name in measured:
        kind, _ = recognised(saved, "here")
        assert name in kind.asked_for
        assert match_optimizer(saved, layer, where="here").names == ("weight", "bias")
    else:
        with pytest.raises(CheckpointError, match=r"here: .*a step can be rebuilt of"):
            recognised(saved, "here")


class Cautious(torch.optim.AdamW):
    """The public cautious AdamW marks its groups; what it does to the step plays no part here."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["caution"] = True


class Own(torch.optim.AdamW):
    """Keeps something more than AdamW for every parameter."""

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg_slow"] = torch.zeros_like(p)
        return done


class Kahan(torch.optim.AdamW):
    """Keeps what rounding to the type of the weights loses, as the public ones do."""

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["compensation"] = torch.zeros_like(p)
        return done


@pytest.mark.parametrize(
    ("kind", "named"), [(Cautious, "a cautious AdamW"), (Own, "AdEMAMix"), (Kahan, "Kahan summation")]
)
def test_relatives_of_adamw_with_marks_of_their_own(kind: Any, named: str) -> None:
    saved = state_of(kind([nn.Parameter(torch.ones(3, 2))], lr=1e-3))
    with pytest.raises(CheckpointError, match=named):
        recognised(saved, "here")


@pytest.mark.parametrize(
    ("marks", "named"),
    [
        ({"momentum": 0.95, "nesterov": True, "ns_steps": 5}, "a Muon other than torch's"),
        ({"momentum": 0.95, "use_muon": True}, "Muon and AdamW in one optimizer"),
        ({"mu": 0.95, "algorithm": "muon", "flatten": False}, "the package dion"),
    ],
)
def test_muons_of_other_packages_are_named(marks: dict[str, Any], named: str) -> None:
    """By the keys of their groups, as their sources have them: Jordan's, one with AdamW beside it, dion's."""
    groups = [{"lr": 0.02, "weight_decay": 0.0, **marks, "params": [0]}]
    saved = {"state": {0: {"momentum_buffer": torch.ones(3, 2)}}, "param_groups": groups}
    with pytest.raises(CheckpointError, match=named):
        recognised(saved, "here")


def test_an_unknown_mark_is_named() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    saved = state_of(torch.optim.AdamW([{"params": [parameter], "lookahead": 5}], lr=1e-3))
    with pytest.raises(CheckpointError, match="its keys lookahead are not of AdamW"):
        recognised(saved, "here")


def test_schedules_and_labels_are_no_marks() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([{"params": [parameter], "name": "all"}], lr=1e-3, amsgrad=True)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9, cycle_momentum=False)
    assert set(recognised(state_of(optimizer), "here")[1][0]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
    }


def bitsandbytes_state(saved: dict[str, Any], *, nested: bool) -> dict[str, Any]:
    """The state of torch's AdamW as bitsandbytes 0.50 lays its own out (flat before 2026)."""
    state = {}
    for number, entry in saved["state"].items():
        moments = {"state1": entry["exp_avg"], "state2": entry["exp_avg_sq"]}
        inner = {"__bnb_optimizer_quant_state__": moments} if nested else moments
        state[number] = {"step": int(entry["step"]), **inner}
    kept = ("lr", "betas", "eps", "weight_decay", "params")
    groups = [
        {k: group[k] for k in kept} | {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
        for group in saved["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_in_32_bits_is_adamw(nested: bool) -> None:
    model = cases.model()
    saved = state_of(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1))
    ours = match_optimizer(bitsandbytes_state(saved, nested=nested), model, where="here")
    theirs = match_optimizer(saved, model, where="here")
    assert ours.groups == theirs.groups
    assert ours.steps == theirs.steps
    for name, moment in theirs.exp_avg_sq.items():
        torch.testing.assert_close(ours.exp_avg_sq[name], moment, rtol=0, atol=0)
        torch.testing.assert_close(ours.exp_avg[name], theirs.exp_avg[name], rtol=0, atol=0)


def test_what_bitsandbytes_has_beside_it_is_refused() -> None:
    saved = state_of(torch.optim.AdamW([nn.Parameter(torch.ones(3, 2))], lr=1e-3))
    ademamix = bitsandbytes_state(saved, nested=True)
    ademamix["param_groups"][0] |= {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0}
    lamb = bitsandbytes_state(saved, nested=True)
    lamb["state"][0]["__bnb_optimizer_quant_state__"]["unorm_vec"] = torch.zeros(1)
    lion = bitsandbytes_state(saved, nested=True)
    del lion["state"][0]["__bnb_optimizer_quant_state__"]["state2"]
    for other, named in ((ademamix, "not AdamW"), (lamb, "LAMB"), (lion, "not AdamW")):
        with pytest.raises(CheckpointError, match=named):
            recognised(other, "here")


class Packed(Tensor):
    """A low-bit tensor that answers to the type it stands for, as torchao's do."""


def test_moments_that_are_no_plain_tensors_are_refused() -> None:
    saved = state_of(torch.optim.AdamW([nn.Parameter(torch.ones(3, 2))], lr=1e-3))
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].as_subclass(Packed)
    with pytest.raises(CheckpointError, match=r"exp_avg of parameter 0 is .*Packed"):
        recognised(saved, "here")


def test_what_torchao_saves_is_refused() -> None:
    """As torchao 0.18 saves its AdamW: Adam's state is the same, and so is one with random rounding."""
    saved = state_of(torch.optim.AdamW([nn.Parameter(torch.ones(3, 2))], lr=1e-3))
    (group,) = saved["param_groups"]
    kept = {key: group[key] for key in ("betas", "eps", "weight_decay", "amsgrad", "params")}
    saved["param_groups"] = [{"lr": torch.tensor(1e-3), **kept}]
    with pytest.raises(CheckpointError, match="torchao's Adam or AdamW, where nothing says"):
        recognised(saved, "here")


def test_objects_in_a_state_name_their_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GaLore keeps its projector in the state as an object."""
    name = "galore_torch.galore_projector"
    module, projector = types.ModuleType(name), type("GaLoreProjector", (), {"__module__": name})
    monkeypatch.setattr(module, "GaLoreProjector", projector, raising=False)
    monkeypatch.setitem(sys.modules, "galore_torch", types.ModuleType("galore_torch"))
    monkeypatch.setitem(sys.modules, name, module)
    file = tmp_path / "optimizer.pt"
    torch.save({"state": {0: {"projector": projector()}}, "param_groups": []}, file)
    with pytest.raises(
        CheckpointError, match=rf"not plain tensors \(it holds {name}\S+, it is that of GaLore"
    ):
        read_optimizer(file)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("param_groups",), {}),
        (("param_groups", 0), None),
        (("param_groups", 0, "params"), None),
        (("param_groups", 0, "params"), [None]),
        (("param_groups", 0, "lr"), None),
        (("param_groups", 0, "amsgrad"), torch.ones(2)),
        (("param_groups", 0, "fused"), torch.ones(2)),
        (("param_groups", 0), {"fused": True, "foreach": True}),
        (("state",), []),
        (("state", 0), torch.ones(2)),
        (("state", 0, "exp_avg"), 3),
        (("state", 0, "exp_avg"), torch.ones(2)),
        (("state", 0), {}),
    ],
)
def test_states_of_another_form_are_one_line(place: tuple[Any, ...], value: Any) -> None:
    layer = nn.Linear(3, 2)
    saved: Any = state_of(torch.optim.AdamW(layer.parameters(), lr=1e-3))
    inside = saved
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = {**inside[place[-1]], **value} if isinstance(value, dict) and value else value
    with pytest.raises(CheckpointError, match="copy the") as caught:
        match_optimizer(saved, layer, where="here")
    assert "\n" not in str(caught.value)
