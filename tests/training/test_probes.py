from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from killed import same_state
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

import cases
import stepscope as ss
from stepscope.errors import ConfigError
from stepscope.results import read_table
from stepscope.training import train


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(run / "probes.parquet").to_pylist()
    return rows


def test_a_probe_does_not_disturb_the_training(small_run: Path, probed_run: Path) -> None:
    for step in (2, 4):
        same_state(*(run / "checkpoints" / f"step-{step}" for run in (small_run, probed_run)))


def test_prediction_and_outcome_agree_within_their_errors(probed_run: Path) -> None:
    rows = rows_of(probed_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        parts = row["momentum"] + row["decay"] + row["batch"]
        assert parts == pytest.approx(row["predicted"], abs=1e-9)
        assert row["difference"] == pytest.approx(row["realised"] - row["predicted"], abs=1e-9)
        assert abs(row["difference"]) < 4 * row["difference_stderr"] + 0.1 * abs(row["predicted"])
        assert row["entropy"] > 0
    assert rows[0]["momentum"] == 0
    assert rows[1]["momentum"] != 0


def test_a_small_step_does_what_was_predicted(
    small_run: Path,
    tmp_path: Path,
) -> None:
    out = cases.start_from(small_run, tmp_path / "run")
    config = cases.training(
        rl={
            "probe": {"every": 1, "num_prompts": 8},
            "optimizer": {"lr": 1e-7, "weight_decay": 0.1, "max_grad_norm": 0.05},
            "steps": 2,
        }
    )
    in_float64 = config.model.model_copy(update={"dtype": "float64"})
    train(config.model_copy(update={"model": in_float64}), out, resume=True)
    rows = rows_of(out)
    assert len(rows) == 2
    for row in rows:
        assert row["realised"] == pytest.approx(row["predicted"], rel=1e-3)
        assert row["realised_reliable"]
        assert row["grad_norm"] == pytest.approx(0.05, rel=1e-3)


def test_the_batch_of_the_step_is_seen_as_the_loss_sees_it(probed_run: Path) -> None:
    rows = rows_of(probed_run)
    assert not any("token weights give" in row["noise_scale_reason"] for row in rows)
    tokens = read_table(probed_run / "probes_tokens.parquet").to_pylist()
    assert [row["step"] for row in tokens] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    for first, second in itertools.pairwise(tokens):
        if first["step"] == second["step"]:
            assert abs(first["influence"]) >= abs(second["influence"])
    assert all(row["token_weight"] and row["logprob"] < 0 for row in tokens)
    assert all(row["token"] in row["response"] for row in tokens)


def test_figures_are_in_the_log_of_the_step(probed_run: Path) -> None:
    state = json.loads((probed_run / "checkpoints/step-4/trainer_state.json").read_text())
    log = {entry["step"]: entry for entry in state["log_history"] if "reward" in entry}
    for row in rows_of(probed_run):
        entry = log[row["step"]]
        assert entry["probe/predicted"] == row["predicted"]
        assert entry["probe/realised"] == row["realised"]


def foreign_trainer(run: Path, out: Path, probe: ss.StepProbe | None, **arguments: Any) -> GRPOTrainer:
    """A trainer that knows nothing of stepscope but its callback; bfloat16 autocast is TRL's default."""
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 20,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    questions = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
    return GRPOTrainer(
        model=str(run / "base"),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        args=GRPOConfig(output_dir=str(out), **(settings | arguments)),
        train_dataset=Dataset.from_list(questions),
        callbacks=[] if probe is None else [probe],
    )


def test_one_line_in_a_trainer_of_somebody_else(small_run: Path, tmp_path: Path) -> None:
    probe = ss.StepProbe(task="arithmetic:terms=2,digits=1,ops=+", every=2, num_prompts=8)
    trainer = foreign_trainer(small_run, tmp_path, probe)
    trainer.train()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 3]
    for row in rows:
        assert row["noise_scale_reason"] == "2 prompts in the batch, a noise scale with an error needs 3"
        assert row["round_off"] < 1e-6  # float32, though the training runs under bfloat16 autocast
        assert abs(row["difference"]) < 4 * row["difference_stderr"] + 0.1 * abs(row["predicted"])
    logged = [entry for entry in trainer.state.log_history if "probe/realised" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]


def two_steps_are_predicted(rows: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["predicted"] != 0
        assert abs(row["difference"]) < 4 * row["difference_stderr"] + 0.1 * abs(row["predicted"])


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_bnb_8bit",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("sgd", "adafactor", "schedule_free_adamw", "lion_8bit")
        ),
    ],
)
def test_trainings_with_other_optimizers_are_probed(small_run: Path, tmp_path: Path, optim: str) -> None:
    probe = ss.StepProbe(task="arithmetic:terms=2,digits=1,ops=+", every=1, num_prompts=8)
    trainer = foreign_trainer(
        small_run, tmp_path, probe, optim=optim, max_steps=2, learning_rate=1e-4, bf16=False
    )
    trainer.train()
    two_steps_are_predicted(rows_of(tmp_path))


def test_a_training_with_muon_is_probed(small_run: Path, tmp_path: Path) -> None:
    """On the matrices of the layers; the gradients of the others count in the clip and move nothing."""
    probe = ss.StepProbe(task="arithmetic:terms=2,digits=1,ops=+", every=1, num_prompts=8, top_tokens=2)
    trainer = foreign_trainer(small_run, tmp_path, probe, max_steps=2, bf16=False)
    named = trainer.model.named_parameters()
    trainer.optimizer = torch.optim.Muon([p for n, p in named if p.ndim == 2 and "layers" in n], lr=1e-4)
    trainer.train()
    two_steps_are_predicted(rows_of(tmp_path))
    tokens = read_table(tmp_path / "probes_tokens.parquet").to_pylist()
    assert [token["step"] for token in tokens] == [1, 1, 2, 2]


def test_a_mixture_of_experts_is_probed_and_trains_as_without(small_run: Path, tmp_path: Path) -> None:
    """The probe loops over the experts, the training multiplies them at once, before the probe and after."""
    tokenizer = AutoTokenizer.from_pretrained(small_run / "base")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        initializer_range=0.1,
        router_aux_loss_coef=0.05,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trained = []
    for probe in (
        None,
        ss.StepProbe(task="arithmetic:terms=2,digits=1,ops=+", every=1, num_prompts=8, top_tokens=2),
    ):
        trainer = foreign_trainer(tmp_path, tmp_path, probe, max_steps=2, bf16=False)
        trainer.train()
        assert trainer.model.config._experts_implementation == "grouped_mm"
        trained.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
    for row in rows_of(tmp_path):
        assert abs(row["difference"]) < 4 * row["difference_stderr"] + 0.1 * abs(row["predicted"])


@pytest.mark.parametrize(
    ("probe", "arguments", "message"),
    [
        (
            {"task": "arithmetic"},
            {"optim": "rmsprop"},
            "the optimizer is RMSprop, and a step can be rebuilt of",
        ),
        ({"num_prompts": 64}, {}, "num_prompts is 64, the trainer's train_dataset has 16 rows; lower it"),
        (
            {"task": "arithmetic:terms=2,digits=1,ops=+", "num_prompts": 64},
            {},
            "num_prompts is 64, the test split of .* has 8; lower it",
        ),
    ],
)
def test_a_probe_that_cannot_work_warns_once_and_the_training_goes_on(
    small_run: Path, tmp_path: Path, probe: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    trainer = foreign_trainer(small_run, tmp_path, ss.StepProbe(**probe), **arguments)
    with pytest.warns(
        UserWarning, match=f"StepProbe probe: off from step 1 on, .* without it: {message}"
    ) as said:
        trainer.train()
    assert sum("StepProbe" in str(warning.message) for warning in said) == 1
    assert trainer.state.global_step == 3
    assert not (tmp_path / "probes.parquet").exists()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="every is 0, expected at least 1"):
        ss.StepProbe(task="arithmetic", every=0)
    with pytest.raises(ConfigError, match="num_prompts is 1"):
        ss.StepProbe(task="arithmetic", num_prompts=1)
