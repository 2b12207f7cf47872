"""Checkpoints written by plain TRL code: loaded, matched by name, and the next step of that run predicted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import cases
from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy import vectors
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.adapters import reference_adapter
from stepscope.policy.checkpoint.load import (
    checkpoint_digest,
    load_checkpoint,
    load_model,
    read_settings,
)
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import is_float64
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

LR = 5e-3
STEPS = 3


class Run:
    """A finished TRL run and the generation batch of each of its steps."""

    def __init__(self, folder: Path, batches: list[dict[str, Tensor]]) -> None:
        self.folder = folder
        self.batches = batches

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, **({"target_modules": ["q_proj", "v_proj", "down_proj"]} | options))


def run_trl(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    *,
    peft: PeftConfig | None,
    loss_type: str,
    accumulation: int = 1,
    beta: float = 0.0,
    adapter: Path | None = None,
) -> Run:
    """Plain TRL: nothing of stepscope has a part in it."""
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    batches: list[dict[str, Tensor]] = []

    class Recording(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            batch: dict[str, Tensor] = super()._generate_and_score_completions(inputs)
            batches.append({k: v.clone() for k, v in batch.items() if isinstance(v, Tensor)})
            return batch

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(2 <= token < 12 for token in ids) / 6 for ids in completion_ids]

    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=12 // accumulation,
        gradient_accumulation_steps=accumulation,
        num_generations=4,
        max_completion_length=6,
        max_steps=STEPS,
        save_steps=1,
        learning_rate=LR,
        weight_decay=0.1,
        max_grad_norm=0.3,
        loss_type=loss_type,
        beta=beta,
        temperature=0.9,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    start: Any = str(base)
    if adapter is not None:
        start = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True
        )
    Recording(
        model=start,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{i}+{j}=" for i in range(4) for j in (1, 22, 333)]}),
        processing_class=tokenizer,
        peft_config=peft,
    ).train()
    return Run(folder, batches)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Run]:
    made = {}
    for name, architecture, peft, loss_type, accumulation, beta in (
        ("full", "qwen2", None, "dapo", 1, 0.0),
        ("lora", "qwen2", lora(), "dr_grpo", 3, 0.0),
        ("lora-kl", "qwen2", lora(), "grpo", 1, 0.1),
        ("mixtral", "mixtral", None, "dapo", 1, 0.0),
        ("qwen3_moe", "qwen3_moe", lora(target_parameters=["experts.down_proj"]), "grpo", 1, 0.0),
        ("dora", "llama", lora(use_dora=True), "grpo", 1, 0.0),
        ("pissa-kl", "llama", lora(init_lora_weights="pissa"), "grpo", 1, 0.1),
        ("loha", "llama", LoHaConfig(r=2, alpha=128, target_modules=["q_proj", "down_proj"]), "grpo", 1, 0.0),
    ):
        made[name] = run_trl(
            tmp_path_factory.mktemp(name),
            cases.model(architecture),
            cases.tokenizer(),
            peft=peft,
            loss_type=loss_type,
            accumulation=accumulation,
            beta=beta,
        )
    made["lora-ref"] = run_trl(
        tmp_path_factory.mktemp("lora-ref"),
        cases.model(),
        cases.tokenizer(),
        peft=None,
        loss_type="dr_grpo",
        beta=0.2,
        adapter=made["lora"].checkpoint(3),
    )
    return made


@pytest.fixture
def copied(runs: dict[str, Run], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs[name].checkpoint(2), tmp_path / name))

    return copy


def trained_on(policy: Policy, batch: dict[str, Tensor]) -> Rollouts:
    return cases.scored(
        policy,
        cases.from_trl(
            [batch],
            temperature=policy.settings.temperature,
            max_response_tokens=policy.settings.max_response_tokens,
        ),
    )


NEXT_STEPS = [
    *((name, "float32") for name in ("full", "lora", "lora-kl", "lora-ref")),
    *((name, "float64") for name in ("full", "lora", "lora-kl", "lora-ref")),
    *((name, "float64") for name in ("mixtral", "qwen3_moe", "dora", "pissa-kl", "loha")),
    ("mixtral", "float32"),
]


@pytest.mark.parametrize(("name", "precision"), NEXT_STEPS)
def test_the_next_step_of_a_trl_run_is_predicted(runs: dict[str, Run], name: str, precision: str) -> None:
    """Parameters k+1 from checkpoint k and batch k.

    The run is in float32 whatever we load it at. Its parameters, about 0.3, are stored to 2e-8 and its
    displacements are about lr = 3e-3, so 1e-5 of a displacement and 1e-10 of a cosine are round-off.
    Measured: 1 - cosine at most 8e-11, norms to 3e-7.
    """
    run = runs[name]
    for k in (1, 2):
        before = load_checkpoint(run.checkpoint(k), precision=precision)
        after = load_checkpoint(run.checkpoint(k + 1), precision=precision)
        step = reconstruct_step(before, trained_on(before, run.batches[k]), budget=Budget(max_sequences=5))
        assert step.lr == pytest.approx(LR * (1 - k / STEPS))
        assert 0 < step.clip_coefficient < 1
        assert ("router" in step.components) == (name in ("mixtral", "qwen3_moe"))
        displacement = {
            n: after.parameters[n].detach().double() - p.detach().double()
            for n, p in before.parameters.items()
        }
        predicted = vectors.scale(step.direction, step.lr)
        assert vectors.cosine(predicted, displacement) >= 1 - 1e-8
        assert vectors.norm(predicted) == pytest.approx(vectors.norm(displacement), rel=1e-5)


def test_the_starting_adapter_is_the_reference_of_a_continued_run(runs: dict[str, Run]) -> None:
    policy = load_checkpoint(runs["lora-ref"].checkpoint(2), precision="float64")
    start = load_checkpoint(runs["lora"].checkpoint(3), precision="float64")
    batch = trained_on(policy, runs["lora-ref"].batches[2])
    names = set(policy.parameters)
    with reference_adapter(policy.model):
        found, _ = score_rollouts(policy, batch)
    expected, _ = score_rollouts(start, batch)
    again, _ = score_rollouts(policy, batch)
    assert set(policy.parameters) == names
    for ours, theirs, own, before in zip(found, expected, again, batch.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(own, before)
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, again, strict=True)) > 1e-3


def test_settings_come_from_the_training_arguments(runs: dict[str, Run]) -> None:
    assert read_settings(runs["lora-kl"].checkpoint(1)) == StepSettings(
        loss_type="grpo",
        scale_rewards="group",
        group_size=4,
        prompts_per_step=3,
        temperature=0.9,
        max_response_tokens=6,
        max_grad_norm=0.3,
        beta=0.1,
        seed=42,
        micro_batch_size=12,
    )
    assert read_settings(runs["lora"].checkpoint(1)).prompts_per_step == 3


def test_state_is_matched_by_name_in_the_order_of_the_trainer(runs: dict[str, Run]) -> None:
    policy = load_checkpoint(runs["full"].checkpoint(2))
    saved = torch.load(runs["full"].checkpoint(2) / "optimizer.pt", weights_only=True)
    assert policy.optimizer is not None
    decaying, exempt = policy.optimizer.groups
    assert decaying.weight_decay == 0.1
    assert exempt.weight_decay == 0.0
    assert all("norm" in n or "bias" in n for n in exempt.names)
    assert set(decaying.names) | set(exempt.names) == set(policy.parameters)
    for number, name in enumerate((*decaying.names, *exempt.names)):
        assert torch.equal(policy.optimizer.exp_avg[name], saved["state"][number]["exp_avg"])
    assert set(policy.optimizer.steps.values()) == {2}
    assert policy.step == 2
    assert not policy.model.training


def test_an_adapter_is_trainable_and_its_base_is_not(runs: dict[str, Run]) -> None:
    policy = load_checkpoint(runs["lora"].checkpoint(1))
    assert len(policy.parameters) == 12
    assert all("lora_" in n for n in policy.parameters)
    assert policy.tokenizer.eos_token == "</s>"


def test_precisions(runs: dict[str, Run]) -> None:
    for name in ("full", "lora"):
        exact = load_checkpoint(runs[name].checkpoint(2))
        wide = load_checkpoint(runs[name].checkpoint(2), precision="float64")
        assert is_float64(wide.model)
        assert wide.optimizer is not None
        assert {t.dtype for t in wide.optimizer.exp_avg_sq.values()} == {torch.float64}
        for n, p in exact.parameters.items():
            assert torch.equal(p.double(), wide.parameters[n])
        narrow = load_checkpoint(runs[name].checkpoint(2), precision="bfloat16")
        assert next(narrow.model.parameters()).dtype == torch.bfloat16
        assert narrow.optimizer is not None
        assert {t.dtype for t in narrow.optimizer.exp_avg.values()} == {torch.float32}
    with pytest.raises(CheckpointError, match="precision: got 'float16'"):
        load_checkpoint(runs["full"].checkpoint(2), precision="float16")


def test_parameters_without_state_are_frozen(copied: Callable[[str], Path]) -> None:
    folder = copied("full")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    del saved["state"][0]
    torch.save(saved, folder / "optimizer.pt")
    policy = load_checkpoint(folder)
    assert "model.embed_tokens.weight" not in policy.parameters
    assert len(policy.parameters) == 25


def test_names_in_the_optimizer_win_over_the_order(copied: Callable[[str], Path]) -> None:
    folder = copied("full")
    policy = load_checkpoint(folder)
    names = [f"module.{n}" for n in reversed(policy.parameters)]
    optimizer = torch.optim.AdamW(
        [(f"module.{n}", policy.parameters[n]) for n in reversed(policy.parameters)]
    )
    for i, p in enumerate(reversed(list(policy.parameters.values()))):
        p.grad = torch.full_like(p, float(i + 1))
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "scheduler.pt").unlink()
    again = load_checkpoint(folder).optimizer
    assert again is not None
    for i, name in enumerate(names):
        assert float(again.exp_avg[name.removeprefix("module.")].flatten()[0]) == pytest.approx(0.1 * (i + 1))


def test_a_single_group_is_in_model_order(copied: Callable[[str], Path]) -> None:
    folder = copied("lora")
    policy = load_checkpoint(folder)
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=0.5)
    for i, p in enumerate(policy.parameters.values()):
        p.grad = torch.full_like(p, float(i + 1))
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "scheduler.pt").unlink()
    again = load_checkpoint(folder).optimizer
    assert again is not None
    assert again.groups[0].names == tuple(policy.parameters)
    for i, name in enumerate(policy.parameters):
        assert float(again.exp_avg[name].flatten()[0]) == pytest.approx(0.1 * (i + 1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite_optimizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        torch.save(change(saved) or saved, folder / "optimizer.pt")

    return damage


def other_shape(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = torch.zeros(3, 5)


def eight_bit(saved: dict[str, Any]) -> None:
    saved["state"] = {
        i: {"step": 2, "state1": torch.zeros(4, dtype=torch.uint8), "state2": torch.zeros(4)}
        for i in saved["state"]
    }
    kept = ("lr", "betas", "eps", "weight_decay", "params")
    saved["param_groups"] = [{key: group[key] for key in kept} for group in saved["param_groups"]]


def missing_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def missing_adapter_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, folder / "adapter_model.safetensors")


def base_gone(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/no/such/base"})
    )


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("full", lambda f: (f / "optimizer.pt").unlink(), r"optimizer\.pt: no optimizer state"),
        ("full", lambda f: truncate(f / "optimizer.pt"), r"optimizer\.pt: damaged"),
        (
            "full",
            lambda f: (f / "optimizer.pt").write_bytes(b""),
            r"optimizer\.pt: damaged",
        ),
        ("full", lambda f: truncate(f / "model.safetensors"), "the model cannot be loaded"),
        ("full", lambda f: (f / "model.safetensors").unlink(), "the model cannot be loaded"),
        ("full", missing_weight, r"1 weights of Qwen2ForCausalLM are missing, model\.norm\.weight"),
        ("full", lambda f: (f / "config.json").write_text("{"), "the model cannot be loaded"),
        (
            "full",
            lambda f: (f / "trainer_state.json").write_text("{"),
            r"trainer_state\.json: cannot be read",
        ),
        ("full", lambda f: (f / "config.json").unlink(), "it is no checkpoint of a model"),
        (
            "full",
            rewrite_optimizer(other_shape),
            r"exp_avg of model\.layers\.\S+ has shape \(3, 5\), expected",
        ),
        ("full", rewrite_optimizer(eight_bit), "has codes without a map and the magnitude of each block"),
        ("full", rewrite_optimizer(lambda s: s["state"].clear()), "no state for any of 26 parameters"),
        ("full", rewrite_optimizer(lambda s: {"weights": 1}), "without 'state' and 'param_groups'"),
        ("lora", lambda f: truncate(f / "adapter_model.safetensors"), r"adapter_model\.safetensors: damaged"),
        ("lora", lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter weights"),
        ("lora", missing_adapter_weight, "is not stored"),
        ("lora", base_gone, "/no/such/base: no such model folder"),
        (
            "lora",
            lambda f: (f / "adapter_config.json").write_text("[]"),
            r"adapter_config\.json: cannot be read",
        ),
    ],
)
def test_damage_is_one_clear_line(
    copied: Callable[[str], Path], name: str, damage: Callable[[Path], Any], message: str
) -> None:
    folder = copied(name)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    findings = inspect_checkpoint(folder)
    assert any(f.level == "fail" and f.cure for f in findings)


def test_state_of_another_model_is_refused(copied: Callable[[str], Path], runs: dict[str, Run]) -> None:
    folder = copied("lora")
    shutil.copy(runs["full"].checkpoint(2) / "optimizer.pt", folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"groups of \[15, 11\] parameters, expected \[12, 0\]"):
        load_checkpoint(folder)


def test_missing_folder_and_run_folder(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"a run with 3 checkpoints, .*checkpoint-3"):
        load_checkpoint(runs["full"].folder)


def test_without_optimizer_on_request_only(copied: Callable[[str], Path]) -> None:
    folder = copied("full")
    (folder / "optimizer.pt").unlink()
    policy = load_checkpoint(folder, require_optimizer=False)
    assert policy.optimizer is None
    assert policy.step == 2


def test_where_settings_come_from(copied: Callable[[str], Path]) -> None:
    folder = copied("full")
    given = StepSettings(loss_type="bnpo", temperature=0.3)
    assert load_checkpoint(folder, settings=given).settings == given
    assert read_settings(folder, overrides={"temperature": 0.5}) == replace(
        read_settings(folder), temperature=0.5
    )
    given.save(folder)
    assert load_checkpoint(folder).settings == given
    (folder / "stepscope.json").unlink()
    (folder / "training_args.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"give loss\.loss_type=..., loss\.scale_rewards=..., loss\.temperature=\.\.\."
    ):
        load_checkpoint(folder)
    flags = {
        "loss_type": "grpo",
        "scale_rewards": "none",
        "temperature": 1.0,
        "max_response_tokens": 5,
        "max_grad_norm": 0.0,
    }
    assert read_settings(folder, overrides=flags) == StepSettings(**flags)


def test_digest_follows_weights_and_optimizer(copied: Callable[[str], Path], runs: dict[str, Run]) -> None:
    folder = copied("full")
    digest = checkpoint_digest(folder)
    assert digest == checkpoint_digest(runs["full"].checkpoint(2))
    assert digest != checkpoint_digest(runs["full"].checkpoint(1))
    (folder / "README.md").write_text("a note")
    assert checkpoint_digest(folder) == digest
    data = bytearray((folder / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(bytes(data))
    assert checkpoint_digest(folder) != digest


def test_inspection_of_a_sound_checkpoint_has_no_failure(runs: dict[str, Run]) -> None:
    for name in ("full", "lora"):
        findings = inspect_checkpoint(runs[name].checkpoint(2))
        assert {f.level for f in findings} == {"ok"}
        assert any("matched by name" in f.what for f in findings)
        assert any("depend on batch size" in f.what for f in findings)


def test_inspection_names_what_limits_a_measurement(
    copied: Callable[[str], Path], runs: dict[str, Run]
) -> None:
    folder = copied("full")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    for name in ("optimizer.pt", "scheduler.pt"):
        shutil.copy(runs["full"].checkpoint(3) / name, folder / name)
    replace(read_settings(folder), top_p=0.9).save(folder)
    warned = [f.what for f in inspect_checkpoint(folder) if f.level == "warn"]
    assert len(warned) == 4
    for part in (
        "dropout = 0.1",
        "learning rate of the next step is 0",
        "has taken [3] steps",
        "top_p = 0.9",
    ):
        assert any(part in w for w in warned)


def test_load_model_names_what_does_not_exist(tmp_path: Path) -> None:
    for name, message in (
        ("nobody-here/no-such-model", "cannot be loaded"),
        (str(tmp_path / "absent"), "no such model folder"),
        (str(tmp_path / "absent.gguf"), "no such GGUF file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(name, dtype=torch.float32)
