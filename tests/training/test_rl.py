from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import SHAPE, DigitTask, digit_config, log_of, reinforced
from safetensors.torch import load_file

import cases
from stepscope.errors import ConfigError, RunFolderError
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.loss.settings import StepSettings
from stepscope.tasks import Problem
from stepscope.training import last_checkpoint, train
from stepscope.training.rl import OnPolicyTrainer
from stepscope.training.setup.prompts import prompt_rows
from stepscope.training.setup.tiny import build_tokenizer


def test_a_checkpoint_holds_all_that_a_step_needs(small_run: Path) -> None:
    assert sorted(p.name for p in (small_run / "checkpoints").iterdir()) == ["step-0", "step-2", "step-4"]
    last = small_run / "checkpoints" / "step-4"
    names = {p.name for p in last.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "stepscope.json",
    } <= names
    settings = StepSettings.load(last)
    assert settings == StepSettings(
        group_size=4,
        prompts_per_step=4,
        max_response_tokens=20,
        task="arithmetic:terms=2,digits=1,ops=+",
        format_weight=0.1,
        micro_batch_size=8,
    )
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    assert {float(state["step"]) for state in optimizer["state"].values()} == {4.0}
    assert sorted(group["weight_decay"] for group in optimizer["param_groups"]) == [0.0, 0.01]
    assert all(group["lr"] == 0.001 for group in optimizer["param_groups"])
    log = log_of(last)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all({"entropy", "correct", "formatted", "reward_kept"} <= entry.keys() for entry in log)
    assert log[0]["reward"] == pytest.approx(log[0]["correct"] + 0.1 * log[0]["formatted"])


def test_step_0_is_the_policy_before_the_first_step(small_run: Path) -> None:
    start = small_run / "checkpoints" / "step-0"
    assert not (start / "optimizer.pt").exists()
    weights, base = (load_file(folder / "model.safetensors") for folder in (start, small_run / "base"))
    assert all(torch.equal(weights[name], base[name]) for name in base)


def test_an_interrupted_run_continues_as_if_it_had_not_been(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(small_run, out)
    shutil.rmtree(out / "checkpoints" / "step-4")
    with pytest.raises(RunFolderError, match="already holds a training"):
        train(cases.training(), out)
    assert train(cases.training(), out, resume=True) == out / "checkpoints" / "step-4"
    again, once = (load_file(run / "checkpoints/step-4/model.safetensors") for run in (out, small_run))
    assert all(torch.equal(again[name], once[name]) for name in once)
    finished = last_checkpoint(out)
    assert train(cases.training(), out, resume=True) == finished


def test_an_adapter_finds_its_base_in_a_run_that_moved(tmp_path: Path) -> None:
    config = cases.training(
        model={"source": "tiny", "tiny": SHAPE.model_dump(), "lora": {"r": 2}},
        sft={"examples": 8, "batch_size": 8, "check_prompts": 4},
    )
    train(config, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    last = tmp_path / "moved" / "checkpoints" / "step-4"
    adapter = json.loads((last / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["lora_dropout"]) == ("../../base", 0.0)
    policy = load_checkpoint(last)
    assert policy.step == 4
    assert policy.settings.task == "arithmetic:terms=2,digits=1,ops=+"
    assert policy.optimizer is not None
    assert policy.optimizer.exp_avg.keys() == policy.parameters.keys()
    assert all("lora_" in name for name in policy.parameters)


def logged(task: DigitTask, out: Path, **rl: Any) -> list[dict[str, Any]]:
    changes = {"prompts_per_step": 8, "micro_batch_size": 16, "max_response_tokens": 40, "optimizer": {}}
    return log_of(reinforced(digit_config(**changes, **rl), out, task))


def test_dead_groups_are_replaced(tmp_path: Path) -> None:
    task = DigitTask(num_dead=16)
    before = logged(task, tmp_path / "kept", max_resample=0)
    after = logged(task, tmp_path / "replaced", max_resample=20)
    assert all(entry["frac_reward_zero_std"] > 0 for entry in before)
    assert all(entry["frac_reward_zero_std"] == 0 for entry in after)
    assert all(entry["resampled_groups"] >= 1 for entry in after)
    assert after[0]["reward"] == before[0]["reward"]
    assert after[0]["reward_kept"] > after[0]["reward"]


class Copies(DigitTask):
    """Every question twice, under two ids."""

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"copies/{i}", str(i // 2), "") for i in range(self.size)]


@pytest.mark.parametrize("curriculum", [None, {}])
def test_dead_groups_are_replaced_by_other_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curriculum: dict[str, Any] | None
) -> None:
    draw, rounds = OnPolicyTrainer._unused_rows, []

    def watched(trainer: OnPolicyTrainer, *args: Any) -> list[dict[str, Any]]:
        fresh = draw(trainer, *args)
        rounds.append((prompts_of(trainer._rows), prompts_of(fresh)))
        return fresh

    def prompts_of(rows: list[dict[str, Any]]) -> list[str]:
        return [row["prompt"] for row in rows]

    monkeypatch.setattr(OnPolicyTrainer, "_unused_rows", watched)
    logged(Copies(num_dead=32), tmp_path, max_resample=2, curriculum=curriculum)
    assert len(rounds) == 4
    for used, fresh in rounds:
        assert fresh
        assert len(set(fresh)) == len(fresh)
        assert not set(fresh) & set(used)
        assert curriculum is None or len(set(used)) == 8


def test_replacement_stops_at_the_limit(tmp_path: Path) -> None:
    log = logged(DigitTask(num_dead=32), tmp_path, max_resample=3)
    assert [entry["resampled_groups"] for entry in log] == [24.0, 24.0]
    assert [entry["frac_reward_zero_std"] for entry in log] == [1.0, 1.0]
    assert [entry["grad_norm"] for entry in log] == [0.0, 0.0]


def test_long_prompts_are_left_out_and_too_few_prompts_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rl.prompts_per_step: 8 .* has 5"):
        logged(DigitTask(num_dead=0, size=5), tmp_path)
    task, tokenizer = DigitTask(num_dead=0, size=32), build_tokenizer()
    rows = prompt_rows(task, task.problems("train"), tokenizer, longest=2)
    assert rows["index"][:] == list(range(10))
    with pytest.raises(ConfigError, match=r"shorter than every prompt, the shortest has 2 tokens"):
        logged(DigitTask(num_dead=0), tmp_path, max_prompt_tokens=1)
