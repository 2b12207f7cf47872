"""Weights, optimizer states and settings that no training can have, each refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.load import load_checkpoint, load_model, read_settings
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.finiteness import first_not_finite, refuse_broken_weights

NAN, INF = float("nan"), float("inf")
PART = "layers.1.mlp.up_proj.weight"


def save(model: nn.Module, tokenizer: Any, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint as plain torch leaves it after one step, with its optimizer state changed."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    change(state)
    torch.save(state, folder / "optimizer.pt")
    StepSettings().save(folder)
    return folder


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Path:
    return save(cases.model(), tokenizer, tmp_path / "sound", lambda state: None)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_weight_that_is_not_finite_is_named_by_load_and_check(
    tokenizer: Any, tmp_path: Path, value: float
) -> None:
    model = cases.model()
    with torch.no_grad():
        model.get_parameter(f"model.{PART}")[3, 2] = value
    folder = save(model, tokenizer, tmp_path / "broken", lambda state: None)
    with pytest.raises(CheckpointError, match=rf"{PART} holds 1 NaN or infinite numbers among 512"):
        load_checkpoint(folder)
    (found,) = (f for f in inspect_checkpoint(folder) if f.level == "fail")
    assert PART in found.what
    assert "earlier checkpoint" in found.cure


def test_weights_of_an_adapter_are_named(tokenizer: Any, tmp_path: Path) -> None:
    cases.model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "base")
    base, _ = load_model(tmp_path / "base", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    with torch.no_grad():
        adapted.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")[0] = (
            NAN
        )
    folder = save(adapted, tokenizer, tmp_path / "adapter", lambda state: None)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_B.* holds 2 NaN"):
        load_checkpoint(folder)


def test_a_bias_of_logits_may_exclude_tokens() -> None:
    model: Any = cases.model("llama")
    model.lm_head = nn.Linear(16, 23)
    with torch.no_grad():
        model.lm_head.bias[20:] = -INF
    refuse_broken_weights(model, "here")
    with torch.no_grad():
        model.lm_head.bias[20] = INF
    with pytest.raises(CheckpointError, match=r"here: weight lm_head\.bias holds 1 NaN or infinite"):
        refuse_broken_weights(model, "here")


def test_every_floating_type_is_looked_at() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.zeros(3, 4, dtype=dtype)
        assert first_not_finite([("t", tensor), ("none", tensor[:0]), ("whole", torch.ones(2).int())]) == ""
        tensor[1, 2] = NAN
        assert first_not_finite([("t", tensor)]).startswith("t holds 1 NaN")


def entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        old = state["state"][4][key]
        state["state"][4][key] = value if key == "step" else old.index_fill(0, torch.tensor([0]), value)

    return change


def group(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["param_groups"][0].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("exp_avg", NAN), r"exp_avg of model\.layers\.0\.\S+ holds \d+ NaN"),
        (entry("exp_avg", -INF), r"exp_avg of model\.layers\.0\.\S+ holds \d+ NaN or infinite"),
        (entry("exp_avg_sq", NAN), r"exp_avg_sq of model\.layers\.0\.\S+ holds \d+ NaN"),
        (entry("exp_avg_sq", -1e-12), r"exp_avg_sq of model\.layers\.0\.\S+ holds negative numbers"),
        (entry("step", torch.tensor(-5.0)), r"layers\.0\.\S+ has taken -5 steps"),
        (entry("step", torch.tensor(0.0)), r"layers\.0\.\S+ has taken 0 steps"),
        (entry("step", torch.tensor(1e30)), r"layers\.0\.\S+ has taken 1\d+ steps"),
        (entry("step", torch.tensor(2.5)), r"step of model\.layers\.0\.\S+ is 2\.5, expected a whole number"),
        (entry("step", torch.tensor(NAN)), r"step of model\.layers\.0\.\S+ is nan"),
        (entry("step", "seven"), r"step of model\.layers\.0\.\S+ is of type str"),
        (group("betas", (2.0, 0.9)), r"group 0: beta1 is 2\.0, expected at least 0 and below 1"),
        (group("betas", (0.9, -1.0)), r"group 0: beta2 is -1\.0"),
        (group("betas", (0.9, 1.0)), r"group 0: beta2 is 1\.0"),
        (group("betas", (NAN, 0.9)), r"group 0: beta1 is nan"),
        (group("betas", 0.9), "has no two betas"),
        (group("eps", -1e-8), r"group 0: eps is -1e-08, expected finite and at least 0"),
        (group("eps", None), "eps of a parameter group is of type NoneType"),
        (group("lr", -1.0), r"group 0: lr is -1\.0"),
        (group("lr", INF), r"group 0: lr is inf"),
        (group("lr", NAN), r"group 0: lr is nan"),
        (group("lr", 10**400), r"group 0: lr is inf"),
        (group("weight_decay", NAN), r"group 0: weight_decay is nan"),
        (group("weight_decay", -0.1), r"group 0: weight_decay is -0\.1"),
    ],
)
def test_impossible_optimizer_states_are_refused_by_load_and_check(
    tokenizer: Any,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    folder = save(cases.model(), tokenizer, tmp_path / "state", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert str(folder / "optimizer.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_fails_for_an_impossible_state(tokenizer: Any, tmp_path: Path) -> None:
    folder = save(cases.model(), tokenizer, tmp_path / "state", entry("exp_avg", NAN))
    assert any(f.level == "fail" and "exp_avg" in f.what for f in inspect_checkpoint(folder))


RANGES = [
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", NAN),
    ("temperature", INF),
    ("top_p", -1.0),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", NAN),
    ("group_size", -3),
    ("group_size", 0),
    ("prompts_per_step", 0),
    ("max_response_tokens", 0),
    ("max_prompt_tokens", 0),
    ("max_grad_norm", NAN),
    ("max_grad_norm", -1.0),
    ("max_grad_norm", INF),
    ("epsilon_low", -0.1),
    ("epsilon_high", NAN),
    ("beta", -0.1),
    ("beta", INF),
    ("format_weight", 1.1),
    ("seed", -1),
    ("num_iterations", 0),
]


@pytest.mark.parametrize(("name", "value"), RANGES)
def test_settings_out_of_range_are_refused_in_files_and_overrides_alike(
    saved: Path, name: str, value: float
) -> None:
    with pytest.raises(CheckpointError, match=f"settings out of range .*{name}: got {value}"):
        read_settings(saved, overrides={name: value})
    record = json.loads((saved / "stepscope.json").read_text()) | {name: value}
    (saved / "stepscope.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"stepscope\.json: settings out of range .*{name}: got"):
        read_settings(saved)
    with pytest.raises(CheckpointError, match=f"{name}: got"):
        StepSettings.from_plain({name: value}, where="here")


@pytest.mark.parametrize(
    "step", ["Infinity", "NaN", "-5", "1e30", '"7"', "null", "[1]", "true", "2.5", "1" + "0" * 5000]
)
def test_a_number_of_steps_that_cannot_be_is_refused(saved: Path, step: str) -> None:
    (saved / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: ") as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_what_is_sound_loads(saved: Path, tmp_path: Path) -> None:
    (saved / "trainer_state.json").write_text('{"global_step": 1}')
    policy = load_checkpoint(saved)
    assert policy.step == 1
    assert policy.optimizer is not None
    assert set(policy.optimizer.steps.values()) == {1}
    assert math.isfinite(policy.optimizer.groups[0].lr)
    shutil.rmtree(saved)
