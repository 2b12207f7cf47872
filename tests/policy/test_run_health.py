"""Is a run healthy? Real TRL runs, resumed with and without their state, and logs with known faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from typer.testing import CliRunner

import cases
from stepscope import cli
from stepscope.errors import CheckpointError
from stepscope.policy.check.findings import Finding
from stepscope.policy.check.health.log import log_findings
from stepscope.policy.check.health.moments import Moments, pair_findings, read_moments
from stepscope.policy.check.health.run import examine_run, is_run
from stepscope.policy.checkpoint.formats.plain import Plain
from stepscope.policy.checkpoint.formats.registry import format_of
from stepscope.policy.checkpoint.load import load_checkpoint

BETA = 0.999


def train(folder: Path, *, steps: int, resume: Path | None = None, **changes: Any) -> None:
    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(2 <= token < 12 for token in ids) / 6 for ids in completion_ids]

    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=24,
        max_steps=steps,
        save_steps=1,
        logging_steps=1,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
        **changes,
    )
    data = Dataset.from_dict({"prompt": [f"{i}+{j}=" for i in range(4) for j in (1, 22)]})
    trainer = GRPOTrainer(
        model=str(folder.parent / "base"),
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=cases.tokenizer(),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of plain TRL, to be gone on from."""
    folder = tmp_path_factory.mktemp("begun")
    cases.model().save_pretrained(folder / "base")
    cases.tokenizer().save_pretrained(folder / "base")
    train(folder / "run", steps=2)
    return folder


@pytest.fixture(scope="module")
def resumed(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, resumed with all that it had saved."""
    folder = Path(shutil.copytree(begun, tmp_path_factory.mktemp("resumed") / "run")) / "run"
    train(folder, steps=4, resume=folder / "checkpoint-2")
    return folder


@pytest.fixture(scope="module")
def lost(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, resumed from a checkpoint whose optimizer was removed: the Trainer says nothing."""
    folder = Path(shutil.copytree(begun, tmp_path_factory.mktemp("lost") / "run")) / "run"
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    train(folder, steps=4, resume=folder / "checkpoint-2", temperature=0.7)
    return folder


def of(findings: list[Finding], level: str) -> list[str]:
    return [finding.what for finding in findings if finding.level == level]


def test_a_proper_resume_keeps_the_moments(resumed: Path) -> None:
    assert is_run(resumed)
    found = examine_run(resumed)
    assert of(found, "fail") == []
    said = " | ".join(of(found, "ok"))
    for step in range(1, 5):
        assert f"checkpoint-{step}: AdamW state of 26 tensors, steps taken: {step};" in said
    assert "loss settings of 4 checkpoints agree" in said
    assert "logs of 4 checkpoints go on from one another" in said
    assert "learning rates are those logged, as far as they were (3 of 4 checkpoints)" in said
    assert found[-1].what == "the latest that can be measured is checkpoint-4"
    assert found[-1].cure == f"stepscope measure {resumed / 'checkpoint-4'} --task TASK --out DIR"


def test_norms_are_those_of_the_state_in_any_format(resumed: Path, tmp_path: Path) -> None:
    """Read from ``optimizer.pt`` by number, and from FSDP's full state by way of the model."""
    folder = Path(shutil.copytree(resumed / "checkpoint-3", tmp_path / "checkpoint-3"))
    moments = read_moments(folder)
    optimizer = load_checkpoint(folder).optimizer
    assert moments is not None
    assert optimizer is not None
    for key in ("exp_avg", "exp_avg_sq"):
        flat = torch.cat([t.double().flatten() for t in optimizer.tensors()[key].values()])
        assert moments.norms[key] == pytest.approx(float(flat.norm()), rel=1e-12)

    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for named, group in zip(optimizer.groups, saved["param_groups"], strict=True):
        for name, number in zip(named.names, group["params"], strict=True):
            saved["state"][name] = saved["state"].pop(number)
        group["params"] = list(named.names)
    torch.save(saved, folder / "optimizer.bin")
    (folder / "optimizer.pt").unlink()
    assert format_of(folder, "optimizer").name != Plain.name
    by_name = read_moments(folder)
    assert by_name is not None
    assert by_name.norms == pytest.approx(moments.norms, rel=1e-12)
    assert (by_name.steps, by_name.beta, by_name.rates) == (moments.steps, moments.beta, moments.rates)


def test_a_setting_that_is_nowhere_is_said(resumed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(resumed, tmp_path / "run"))
    (run / "checkpoint-4" / "training_args.bin").unlink()
    found = examine_run(run)
    assert any("loss settings of checkpoint-4 are not known" in what for what in of(found, "warn"))
    assert "the latest that can be measured is checkpoint-3 (1 later: " in found[-1].what


def test_a_resume_without_the_state_is_named(lost: Path) -> None:
    found = examine_run(lost)
    failed, warned = of(found, "fail"), " | ".join(of(found, "warn"))
    assert len(failed) == 1
    assert "moments were lost at a resume between checkpoint-1 and checkpoint-3" in failed[0]
    assert "step counter went from 1 to 1 in 2 steps" in failed[0]
    assert "checkpoint-2: no optimizer's state" in warned
    assert "between checkpoint-2 and checkpoint-3 loss settings change: temperature from 1.0 to 0.7" in warned
    assert "learning rate" not in warned


def test_the_state_of_a_fresh_optimizer_is_named(resumed: Path, tmp_path: Path) -> None:
    """Reset to what one step leaves, its counter kept: the norm of the second moment says it alone."""
    run = Path(shutil.copytree(resumed, tmp_path / "run"))
    first = torch.load(run / "checkpoint-1" / "optimizer.pt", weights_only=True)
    for entry in first["state"].values():
        entry["step"] = torch.tensor(4.0)
    torch.save(first, run / "checkpoint-4" / "optimizer.pt")
    failed = of(examine_run(run), "fail")
    assert len(failed) == 1
    assert "lost at a resume between checkpoint-3 and checkpoint-4: the norm of exp_avg_sq fell" in failed[0]

    first["state"] = {}
    torch.save(first, run / "checkpoint-4" / "optimizer.pt")
    found = examine_run(run)
    assert any("checkpoint-4" in what for what in of(found, "fail"))
    assert "the latest that can be measured is checkpoint-3" in found[-1].what


def test_a_replaced_counter_and_a_foreign_log_are_named(resumed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(resumed, tmp_path / "run"))
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    state["log_history"][0]["grad_norm"] += 1.0
    state["log_history"][1]["learning_rate"] = 0.5
    (run / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    last = run / "checkpoint-4" / "trainer_state.json"
    state = json.loads(last.read_text())
    state["log_history"][2]["learning_rate"] = 0.25
    state["log_history"][1]["learning_rate"] = 0.25
    last.write_text(json.dumps(state))
    warned = " | ".join(of(examine_run(run), "warn"))
    assert "logs of checkpoint-2 and checkpoint-3 differ at step 1: grad_norm" in warned
    assert "checkpoint-2: the optimizer's learning rate is 0.001, and step 3 was logged with 0.25" in warned


def test_a_damaged_log_is_one_clear_line(resumed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(resumed, tmp_path / "run"))
    (run / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_history": [3')
    failed = of(examine_run(run), "fail")
    assert len(failed) == 1
    assert "checkpoint-4/trainer_state.json: cannot be read" in failed[0]
    (run / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_history": [3]}')
    found = examine_run(run)
    assert "log_history is no list of objects" in of(found, "fail")[0]
    assert "the latest that can be measured is checkpoint-3" in found[-1].what


def test_the_command_takes_a_run_and_measure_refuses_it(lost: Path, resumed: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(cli.app, ["check", str(resumed)]).exit_code == 0
    result = runner.invoke(cli.app, ["check", str(lost)])
    assert result.exit_code == 2
    assert "moments were lost" in " ".join(result.output.split())
    with pytest.raises(CheckpointError, match="a run with 4 checkpoints, expected one checkpoint"):
        load_checkpoint(resumed)


def state(taken: int, norm: float, **norms: float) -> Moments:
    return Moments("AdamW", 2, (taken,), {"exp_avg_sq": norm} | norms, BETA, (1e-3,))


@pytest.mark.parametrize(
    ("steps", "states", "level", "what"),
    [
        ((10, 20), (state(10, 1.0), state(20, BETA**10)), None, ""),
        ((10, 20), (state(10, 1.0), state(20, 0.9 * BETA**10)), "fail", "leave at least 0.99"),
        ((10, 510), (state(10, 1.0), state(500, 2.0)), "fail", "counter went from 10 to 500 in 500 steps"),
        ((10, 20), (state(8, 1.0), state(17, 1.0)), "warn", "optimizer took 9 steps and the trainer 10"),
        ((10, 20), (state(10, 1.0, exp_avg=1.0), state(20, 1.0, exp_avg=11.0)), "warn", "exp_avg jumped"),
        ((1, 20), (state(1, 0.001), state(20, 0.02)), None, ""),  # the bias of the first steps is no jump
        ((10, 20), (state(10, 1.0, max_exp_avg_sq=2.0), state(20, 1.0, max_exp_avg_sq=1.0)), "fail", "max_"),
    ],
)
def test_pairs(steps: tuple[int, int], states: tuple[Moments, Moments], level: str | None, what: str) -> None:
    found = pair_findings(("a", "b"), steps, states)
    assert [finding.level for finding in found] == ([] if level is None else [level])
    assert level is None or what in found[0].what


def logged(**columns: list[float]) -> list[dict[str, Any]]:
    count = len(next(iter(columns.values())))
    names = {name: name.replace("__", "/") for name in columns}
    return [{"step": i + 1} | {names[k]: v[i] for k, v in columns.items()} for i in range(count)]


@pytest.mark.parametrize(
    ("log", "level", "what"),
    [
        (logged(completions__clipped_ratio=[0.9] * 5 + [0.05] * 20), "ok", "truncated responses: 0.05"),
        (logged(completions__clipped_ratio=[0.0] * 5 + [0.2] * 20), "warn", "truncated responses: 0.2"),
        (logged(completions__clipped_ratio=[1.0] * 3), "fail", "3 logged steps 1 to 3"),
        (logged(frac_reward_zero_std=[0.25, 0.85]), "warn", "without reward variance: 0.55"),
        (logged(frac_reward_zero_std=[1.0]), "fail", "on average in step 1"),
        (logged(sampling__sampling_logp_difference__mean=[0.01, 0.13]), "warn", "sampler to policy: 0.07"),
        (logged(sampling__sampling_logp_difference__max=[0.1, 9.0, 0.1]), "warn", "sampler to policy: 9"),
        (logged(sampling__importance_sampling_ratio__mean=[0.8, 0.8]), "warn", "policy to sampler: 0.8"),
        (logged(sampling__importance_sampling_ratio__mean=[0.95, 1.0]), "ok", "policy to sampler: 0.975"),
        (logged(grad_norm=[1.0, 2.0] * 4 + [7.6, 9.9, 1.0]), "warn", "gradient norm spikes at step 9 ("),
        (logged(grad_norm=[9.0, 1.0, 1.0, 1.0, 1.0, 4.9]), "ok", "without spikes"),
        (logged(grad_norm=[1.0, float("nan")]), "fail", "not finite at step 2"),
        (logged(entropy=[2.0] * 10 + [0.5] * 10), "warn", "entropy 2 at first, 0.5 at last"),
        (logged(entropy=[0.5] * 10 + [2.0] * 10), "warn", "entropy 0.5 at first, 2 at last"),
        (logged(entropy=[2.0] * 10 + [1.0] * 10), "ok", "entropy 2 at first, 1 at last"),
        ([{"step": 1, "eval_loss": 0.3}], "warn", "has none of what GRPO logs"),
        ([], "warn", "has none of what GRPO logs"),
    ],
)
def test_what_a_log_says(log: list[dict[str, Any]], level: str, what: str) -> None:
    (found,) = log_findings(log)
    assert found.level == level
    assert what in found.what
