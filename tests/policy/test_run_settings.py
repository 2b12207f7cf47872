"""What a TRL run's own arguments say about its next step, what stands against it, and what a user adds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.gmpo import GMPOConfig
from trl.experimental.sdpo import SDPOConfig

from stepscope.errors import CheckpointError, ConfigError
from stepscope.policy.checkpoint.settings.run_settings import run_settings
from stepscope.policy.checkpoint.settings.trl_run import run_notes
from stepscope.policy.loss.registry import LOSSES
from stepscope.policy.loss.settings import StepSettings
from stepscope.rules import EntropyBonus, TopEntropy

FLAGS = {
    "loss_type": "grpo",
    "scale_rewards": "none",
    "temperature": 1.0,
    "max_response_tokens": 5,
    "max_grad_norm": 0.0,
}


@dataclass
class OwnConfig(GRPOConfig):
    """What a user adds to TRL's arguments."""

    curriculum: str = field(default="none")


def save_args(folder: Path, kind: Any = GRPOConfig, **changes: Any) -> Path:
    args = kind(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], **changes)
    torch.save(args, folder / "training_args.bin")
    return folder


def test_settings_of_a_grpo_run(tmp_path: Path) -> None:
    folder = save_args(
        tmp_path,
        loss_type="bnpo",
        scale_rewards="batch",
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=33,
        temperature=0.7,
        max_grad_norm=0.0,
        epsilon=0.1,
        epsilon_high=0.28,
        beta=0.04,
        use_bias_correction_kl=False,
        mask_truncated_completions=True,
        seed=7,
        top_p=0.95,
        disable_dropout=True,
    )
    assert run_settings(folder) == StepSettings(
        loss_type="bnpo",
        scale_rewards="batch",
        group_size=4,
        prompts_per_step=2,
        max_response_tokens=33,
        temperature=0.7,
        max_grad_norm=0.0,
        epsilon_low=0.1,
        epsilon_high=0.28,
        beta=0.04,
        bias_correction_kl=False,
        mask_truncated=True,
        seed=7,
        top_p=0.95,
        disable_dropout=True,
        micro_batch_size=8,
    )


def test_trls_entropy_terms_are_objectives_of_a_batch_in_one_piece(tmp_path: Path) -> None:
    save_args(tmp_path, top_entropy_quantile=0.2, per_device_train_batch_size=8, num_generations=4)
    assert run_settings(tmp_path).objective == TopEntropy(fraction=0.2, scope=8)
    save_args(tmp_path, entropy_coef=0.01)
    assert run_settings(tmp_path).objective == EntropyBonus(coefficient=0.01)


def test_flags_add_to_what_the_run_says(tmp_path: Path) -> None:
    """All that used to be enough for settings of one's own changes nothing but itself."""
    save_args(tmp_path, beta=0.04, mask_truncated_completions=True, epsilon=0.3, top_p=0.9, num_generations=4)
    settings = run_settings(tmp_path, FLAGS)
    assert (settings.loss_type, settings.max_response_tokens) == ("grpo", 5)
    assert (settings.beta, settings.mask_truncated, settings.epsilon_low, settings.top_p) == (
        0.04,
        True,
        0.3,
        0.9,
    )
    StepSettings(beta=0.5, task="arithmetic").save(tmp_path)
    settings = run_settings(tmp_path, FLAGS)
    assert (settings.loss_type, settings.beta, settings.task) == ("grpo", 0.5, "arithmetic")


TWO_PIECES = {"gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps_per_generation": 1, **TWO_PIECES}, "steps_per_generation"),
        (
            {"steps_per_generation": 1, "loss_type": "grpo", "scale_rewards": "batch", **TWO_PIECES},
            "steps_per_generation",
        ),
        ({"loss_type": "of_tomorrow"}, "loss_type"),
        ({"top_entropy_quantile": 0.2, "entropy_coef": 0.01}, "entropy_coef"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model"),
        ({"max_tool_calling_iterations": 3}, "max_tool_calling_iterations"),
        ({"top_k": 50}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "generation_kwargs"),
    ],
)
def test_what_no_measurement_follows_is_named_and_can_be_left_out(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    save_args(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf" {name}: .*loss\.without=\[{name}\]") as caught:
        run_settings(tmp_path)
    assert "\n" not in str(caught.value)
    settings = run_settings(tmp_path, {"without": [name]})
    assert settings.without == [name]
    if name in ("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"):
        assert settings.objective is None
    assert run_settings(tmp_path, for_step=False).temperature == 1.0, "evaluation asks for none of it"


@pytest.mark.parametrize(
    "changes",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"importance_sampling_level": "sequence", "beta": 0.1, "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5, "loss_type": "grpo"},
        {"delta": 2.0},
        {"delta": 0.9},
        {"off_policy_mask_threshold": 0.5},
        {"off_policy_mask_threshold": -0.5},
        {"num_iterations": 2},
        {"steps_per_generation": 4, **TWO_PIECES},
        {"steps_per_generation": 1, "loss_type": "grpo", **TWO_PIECES},
        {"loss_type": "bnpo", **TWO_PIECES},
        {"top_entropy_quantile": 0.2, **TWO_PIECES},
        {"entropy_coef": 0.01, **TWO_PIECES},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
        {"loss_type": "dapo", **TWO_PIECES},
        {"max_steps": 3, "optim": "adamw_torch"},
    ],
)
def test_every_loss_of_trl_is_measured(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = run_settings(save_args(tmp_path, **changes))
    assert settings.loss_type == changes.get("loss_type", "dapo")
    assert settings.without == []
    of_loss = LOSSES[settings.loss_type].read(settings.loss_parameters).model_dump()
    for name in of_loss.keys() & changes.keys():
        assert of_loss[name] == changes[name]
    assert settings.num_iterations == changes.get("num_iterations", 1)


def test_settings_of_a_rloo_run(tmp_path: Path) -> None:
    save_args(
        tmp_path,
        RLOOConfig,
        beta=0.03,
        normalize_advantages=True,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=33,
        epsilon=0.1,
    )
    assert run_settings(tmp_path) == StepSettings(
        loss_type="rloo",
        kl_in_reward=0.03,
        advantage_estimator="rloo",
        advantage_parameters={"normalize_advantages": True},
        group_size=4,
        prompts_per_step=2,
        max_response_tokens=33,
        epsilon_low=0.1,
        epsilon_high=0.1,
        micro_batch_size=8,
        router_loss=None,
        seed=42,
    )
    save_args(tmp_path, RLOOConfig, beta=0.0, reward_clip_range=(-1.0, 1.0), num_generations=4)
    with pytest.raises(CheckpointError, match="reward_clip_range: the run clipped its rewards"):
        run_settings(tmp_path)
    save_args(tmp_path, RLOOConfig, normalize_advantages=True, steps_per_generation=1, **TWO_PIECES)
    with pytest.raises(CheckpointError, match="2 generations, and its advantages are scaled over each"):
        run_settings(tmp_path)


def test_settings_of_runs_on_pairs(tmp_path: Path) -> None:
    save_args(
        tmp_path,
        DPOConfig,
        beta=0.2,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.5],
        label_smoothing=0.1,
        max_length=77,
        per_device_train_batch_size=4,
    )
    settings = run_settings(tmp_path)
    assert (settings.loss_type, settings.beta, settings.prompts_per_step) == ("dpo", 0.2, 4)
    assert (settings.max_response_tokens, settings.temperature, settings.group_size) == (77, 1.0, 2)
    assert settings.loss_parameters == {
        "dpo_loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.5],
        "label_smoothing": 0.1,
    }
    save_args(tmp_path, DPOConfig, gradient_accumulation_steps=2)
    assert run_settings(tmp_path).loss_parameters == {}
    for changes, name in (
        ({"use_weighting": True}, "use_weighting"),
        ({"loss_type": ["sft"], "gradient_accumulation_steps": 2}, "loss_type"),
        ({"sync_ref_model": True}, "sync_ref_model"),
    ):
        save_args(tmp_path, DPOConfig, **changes)
        with pytest.raises(CheckpointError, match=f" {name}: "):
            run_settings(tmp_path)
    save_args(
        tmp_path, CPOConfig, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=1.0, gradient_accumulation_steps=2
    )
    settings = run_settings(tmp_path)
    assert (settings.loss_type, settings.beta) == ("cpo", 0.1)
    assert settings.loss_parameters == {"cpo_loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0}
    (tmp_path / "README.md").write_text(
        "It has been trained using [TRL](x).\n\nThis model was trained with ORPO, a"
    )
    with pytest.raises(CheckpointError, match="trained with ORPO, not CPO"):
        run_settings(tmp_path)


def test_rewards_normalised_one_by_one_are_measured_where_there_is_one(tmp_path: Path) -> None:
    save_args(tmp_path, multi_objective_aggregation="normalize_then_sum")
    state = tmp_path / "trainer_state.json"
    log: list[dict[str, Any]] = [{"rewards/accuracy/mean": 0.5, "rewards/accuracy/std": 0.1, "reward": 0.5}]
    state.write_text(json.dumps({"log_history": log}))
    assert run_settings(tmp_path).advantage_estimator == "normalize_then_sum"
    state.write_text(json.dumps({"log_history": [*log, {"rewards/length/mean": 3.0}]}))
    with pytest.raises(CheckpointError, match=r"multi_objective_aggregation: .*logged 2 of them"):
        run_settings(tmp_path)


def test_two_processes_cut_a_batch(tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type="bnpo")
    args.distributed_state.__dict__ = {**vars(args.distributed_state), "num_processes": 2}
    torch.save(args, tmp_path / "training_args.bin")
    settings = run_settings(tmp_path)
    assert (settings.group_size * settings.prompts_per_step, settings.micro_batch_size) == (16, 8)


def test_several_updates_on_a_batch_are_noted(tmp_path: Path) -> None:
    save_args(tmp_path, num_iterations=2, steps_per_generation=4, gradient_accumulation_steps=2)
    (note,) = run_notes(tmp_path)
    assert note.startswith("each batch made 4 steps")
    save_args(tmp_path)
    assert run_notes(tmp_path) == ()


def test_an_entropy_bonus_that_adapts_goes_on_where_trl_left_it(tmp_path: Path) -> None:
    """As ``_load_optimizer_and_scheduler`` and ``_compute_loss`` of TRL 1.16 take it up."""
    save_args(tmp_path, use_adaptive_entropy=True, entropy_target=0.7, gradient_accumulation_steps=2)
    state = tmp_path / "entropy_ctrl_state.json"
    for last, expected in ((0.6, EntropyBonus(coefficient=0.03, scope=8)), (0.8, None), (float("inf"), None)):
        state.write_text(json.dumps({"entropy_coef": 0.03, "last_world_entropy": last}))
        assert run_settings(tmp_path).objective == expected
    state.write_text(json.dumps({"entropy_coef": [0.03]}))
    with pytest.raises(CheckpointError, match=r"entropy_ctrl_state\.json: cannot be read .*copy it again"):
        run_settings(tmp_path)


def test_parameters_of_the_loss_are_changed_one_by_one(tmp_path: Path) -> None:
    save_args(tmp_path, loss_type="sapo", sapo_temperature_pos=2.0, importance_sampling_level="sequence")
    changed = run_settings(tmp_path, {"loss_parameters": {"sapo_temperature_pos": 3.0}}).loss_parameters
    assert changed["sapo_temperature_pos"] == 3.0
    assert changed["importance_sampling_level"] == "sequence"
    assert run_settings(tmp_path, {"loss_type": "grpo"}).loss_parameters == {}
    with pytest.raises(ConfigError, match="loss_type: got 'gspo', expected one of grpo"):
        run_settings(tmp_path, {"loss_type": "gspo"})
    save_args(tmp_path, sapo_temperature_pos=2.0)
    assert "sapo_temperature_pos" not in run_settings(tmp_path).loss_parameters
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    args.delta = "wide"
    torch.save(args, tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match=r"loss_parameters\.delta of dapo: .*copy the file again"):
        run_settings(tmp_path)


@pytest.mark.parametrize(("kind", "name"), [(GMPOConfig, "GMPOConfig"), (SDPOConfig, "SDPOConfig")])
def test_other_trainers_are_not_taken_for_grpo(tmp_path: Path, kind: Any, name: str) -> None:
    save_args(tmp_path, kind)
    with pytest.raises(CheckpointError) as caught:
        run_settings(tmp_path)
    assert f"trainer: its arguments are TRL's {name}" in str(caught.value) or "not that of a GRPO" in str(
        caught.value
    )
    with pytest.raises(CheckpointError):
        run_settings(tmp_path, {k: v for k, v in FLAGS.items() if k != "scale_rewards"})


def test_the_model_card_tells_of_a_trainer_with_grpos_arguments(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    save_args(checkpoint)
    card = (
        "It has been trained using [TRL](https://...).\n\nThis model was trained with {}, a method introduced"
    )
    (tmp_path / "README.md").write_text(card.format("GRPO"))
    assert run_settings(checkpoint).loss_type == "dapo"
    (tmp_path / "README.md").write_text(card.format("MyPO"))
    with pytest.raises(CheckpointError, match=r"trainer: README\.md says that it was trained with MyPO"):
        run_settings(checkpoint)


def test_tools_are_known_by_the_log(tmp_path: Path) -> None:
    """TRL's trainer takes them beside its arguments, which do not tell."""
    save_args(tmp_path)
    log: list[dict[str, Any]] = [{"step": 1, "loss": 0.1}, {"step": 2, "tools/call_frequency": 0.5}]
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 2, "log_history": log[:1]}))
    assert run_settings(tmp_path).loss_type == "dapo"
    state.write_text(json.dumps({"global_step": 2, "log_history": log}))
    with pytest.raises(CheckpointError, match=r"tools: the run logged tool calls.*loss\.without=\[tools\]"):
        run_settings(tmp_path)
    assert run_settings(tmp_path, {"without": ["tools"]}).without == ["tools"]
    state.write_text(json.dumps({"global_step": 2, "log_history": [3]}))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: cannot be read .*copy it again"):
        run_settings(tmp_path)


def test_a_subclass_of_grpos_arguments_is_read_and_noted(tmp_path: Path) -> None:
    save_args(tmp_path, OwnConfig, beta=0.04, curriculum="easy first")
    assert run_settings(tmp_path).beta == 0.04
    (note,) = run_notes(tmp_path)
    assert f"{OwnConfig.__module__}.OwnConfig" in note
    save_args(tmp_path, use_vllm=True)
    (note,) = run_notes(tmp_path)
    assert "vLLM" in note
    assert run_settings(tmp_path).loss_parameters == {"vllm_importance_sampling_mode": "sequence_mask"}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"neither .* is there .*; give loss\.loss_type=\.\.\., loss\.scale"
    ):
        run_settings(tmp_path)
    assert run_settings(tmp_path, FLAGS) == StepSettings(**FLAGS)
    assert (
        run_settings(tmp_path, {"temperature": 0.5, "max_response_tokens": 9}, for_step=False).temperature
        == 0.5
    )
    save_args(tmp_path, SFTConfig, max_grad_norm=0.7)
    with pytest.raises(CheckpointError, match=r"not that of a GRPO run .*; give loss\.loss_type=") as caught:
        run_settings(tmp_path)
    assert "max_grad_norm" not in str(caught.value), "a supervised run says that much"
    given = {name: value for name, value in FLAGS.items() if name != "max_grad_norm"}
    assert run_settings(tmp_path, given).max_grad_norm == 0.7


def test_a_file_that_cannot_be_read_leaves_the_settings_to_the_user(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match=r"pass the loss settings yourself: loss\.loss_type="):
        run_settings(tmp_path)
    assert run_settings(tmp_path, FLAGS) == StepSettings(**FLAGS)
    assert run_notes(tmp_path) == ("training_args.bin cannot be read; the settings are the given ones alone",)


@pytest.mark.parametrize("name", ["num_generations", "per_device_train_batch_size", "beta", "entropy_coef"])
def test_values_of_the_wrong_type_are_one_line(tmp_path: Path, name: str) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    setattr(args, name, {"a": [1] * 1000})
    torch.save(args, tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match=f"{name} is a dict") as caught:
        run_settings(tmp_path)
    assert len(str(caught.value)) < 400


def test_nothing_can_be_left_out_that_is_not_there(tmp_path: Path) -> None:
    save_args(tmp_path, top_k=50)
    with pytest.raises(CheckpointError, match=r"loss\.without names entropy, .* \(top_k\)"):
        run_settings(tmp_path, {"without": ["entropy", "top_k"]})
