"""What a recorder keeps of a training is what the training did, and the training does not notice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from killed import same_state
from peft import LoraConfig
from recorded_steps import contents, errors_of_gradients, made_gradient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.kernels import ChunkedLogProbFunction

import cases
import stepscope as ss
from stepscope.errors import ConfigError
from stepscope.policy import vectors
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import true_float64
from stepscope.policy.recorded import RecordedTraining
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.reading.recording import find_record
from stepscope.results.recording import RunRecord
from stepscope.training import train
from stepscope.training.record.size import RecordSize

RECORD = {"state_every": 3}


@pytest.fixture(scope="session")
def recorded_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_run`` again, from the same warm-up, with a recorder."""
    out = cases.start_from(small_run, tmp_path_factory.mktemp("recorded") / "run")
    train(cases.training(rl={"record": RECORD}), out, resume=True)
    return out


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder."""
    folder = tmp_path_factory.mktemp("model") / "base"
    cases.model().save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    return folder


def foreign_trainer(base: Path, out: Path, callbacks: list[Any], **arguments: Any) -> GRPOTrainer:
    """A trainer that knows nothing of stepscope but its callback: two micro-batches, clipped, with decay."""
    extra = {"peft_config": arguments.pop("peft_config", None)}
    if "model" in arguments:  # in float64, to which a checkpoint's second pass is not lifted
        arguments["gradient_checkpointing"] = False
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    questions = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]
    return GRPOTrainer(
        model=arguments.pop("model", str(base)),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        args=GRPOConfig(output_dir=str(out), **(settings | arguments)),
        train_dataset=Dataset.from_list(questions),
        callbacks=callbacks,
        **extra,
    )


def in_float64(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)


@pytest.fixture
def exact_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's head sums its gradient in float32, whatever the model computes in; here in float64."""
    backward = ChunkedLogProbFunction.backward

    def lifted(ctx: Any, *gradients: Any) -> Any:
        with true_float64():
            return backward(ctx, *gradients)

    monkeypatch.setattr(ChunkedLogProbFunction, "backward", staticmethod(lifted))


def lora_of(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


def test_a_recorder_does_not_disturb_the_training(small_run: Path, recorded_run: Path) -> None:
    for step in (2, 4):
        same_state(*(run / "checkpoints" / f"step-{step}" for run in (small_run, recorded_run)))


def test_replay_comes_to_the_checkpoints_bit_for_bit(recorded_run: Path) -> None:
    training = ss.RecordedTraining.load(recorded_run)
    assert training.steps == range(1, 5)
    assert training.folder.record.complete
    assert [training.folder.state(i) is not None for i in range(5)] == [True, False, False, True, True]
    for index in (2, 4):
        checkpoint = ss.load_checkpoint(recorded_run / "checkpoints" / f"step-{index}")
        state = training.state(index)
        assert state.parameters.keys() == checkpoint.parameters.keys()
        assert all(torch.equal(p, state.parameters[n]) for n, p in checkpoint.parameters.items())
        assert checkpoint.optimizer is not None
        moments = checkpoint.optimizer.tensors()
        assert all(torch.equal(m, state.exp_avg[n]) for n, m in moments["exp_avg"].items())
        assert all(torch.equal(m, state.exp_avg_sq[n]) for n, m in moments["exp_avg_sq"].items())
        assert set(state.steps.values()) == {index}
    assert training.verify()


def test_the_batch_is_that_of_the_step(recorded_run: Path) -> None:
    log = json.loads((recorded_run / "checkpoints/step-4/trainer_state.json").read_text())["log_history"]
    entries = {entry["step"]: entry for entry in log if "reward_kept" in entry}
    training = RecordedTraining.load(recorded_run)
    for step in training:
        batch, entry = step.rollouts, entries[step.index]
        assert len(batch) == 16
        assert batch.advantages is not None
        for group in np.unique(batch.group_index):
            own = batch.group_index == group
            assert own.sum() == 4
            assert batch.advantages[own] == pytest.approx(
                batch.rewards[own] - batch.rewards[own].mean(), abs=1e-6
            )
        assert batch.rewards.mean() == pytest.approx(entry["reward_kept"], abs=1e-6)
        assert step.grad_norm == pytest.approx(entry["grad_norm"], rel=1e-6)
        assert [g.lr for g in step.groups] == [entry["learning_rate"]] * 2
        assert [g.weight_decay for g in step.groups] == [0.01, 0.0]
        assert all(text.startswith("arithmetic") for text in batch.prompt_ids)
        assert batch.questions is not None
        assert all(q in p for q, p in zip(batch.questions, batch.prompts, strict=True))
        assert all((batch.rewards >= 1) == batch.correct)
        # dr_grpo at the first update: w = A / (sequences x longest response)
        for weights, advantage in zip(step.token_weights, batch.advantages, strict=True):
            assert weights == pytest.approx(np.full(len(weights), advantage / (16 * 20)), abs=1e-8)
        assert "".join(training.folder.batch(step.index).texts[0]) == batch.responses[0]


def test_the_record_reads_without_torch(recorded_run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stepscope.reading.recording import find_record; "
        f"batch = find_record(Path({str(recorded_run)!r})).batch(2); assert len(batch.rollouts) == 16; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.usefixtures("exact_head")
def test_recorded_weights_give_the_gradient_that_was_used(base: Path, tmp_path: Path, adapter: bool) -> None:
    """In float64: every step, over two micro-batches, clipped; of a LoRA its own parameters alone."""
    model = in_float64(base)
    lora = lora_of() if adapter else None
    trainer = foreign_trainer(
        base, tmp_path, [ss.StepRecorder(tmp_path)], model=model, peft_config=lora, learning_rate=1e-2
    )
    with true_float64():
        trainer.train()
    training = RecordedTraining.load(tmp_path)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert training.state(0).parameters.keys() == trained
    assert all("lora" in name for name in trained) == adapter
    assert all(step.clip_coefficient < 1 for step in training)
    assert training.verify()
    assert max(errors_of_gradients(training, trainer.model, trainer.processing_class)) < 1e-9
    assert training.folder.figures(1).gradient_error < 1e-9
    final = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, final[n]) for n, p in training.state(3).parameters.items())


def test_in_float32_they_give_it_up_to_rounding(base: Path, tmp_path: Path) -> None:
    trainer = foreign_trainer(base, tmp_path, [ss.StepRecorder(tmp_path)])
    trainer.train()
    training = RecordedTraining.load(tmp_path)
    assert max(errors_of_gradients(training, trainer.model, trainer.processing_class)) < 1e-5
    step = training.step(2)
    policy = Policy(trainer.model.eval(), trainer.processing_class, StepSettings())
    with vectors.placed(policy.parameters, step.before.parameters):
        logprobs, entropies = score_rollouts(policy, step.rollouts)
    for name, own in (("logprobs", logprobs), ("entropies", entropies)):
        for recorded, now in zip(getattr(step.rollouts, name), own, strict=True):
            assert recorded == pytest.approx(now, abs=1e-5)


@pytest.mark.usefixtures("exact_head")
def test_an_entropy_bonus_is_recorded_as_one(base: Path, tmp_path: Path) -> None:
    trainer = foreign_trainer(
        base, tmp_path, [ss.StepRecorder(tmp_path)], model=in_float64(base), entropy_coef=0.1
    )
    with true_float64():
        trainer.train()
    training = RecordedTraining.load(tmp_path)
    assert max(errors_of_gradients(training, trainer.model, trainer.processing_class)) < 1e-9
    step = training.step(1)
    assert step.entropy_weights is not None
    assert sum(w.sum() for w in step.entropy_weights) == pytest.approx(0.1)
    plain = replace(step, entropy_weights=None)
    policy = Policy(trainer.model.eval(), trainer.processing_class, StepSettings())
    assert vectors.norm(made_gradient(policy, plain)) != pytest.approx(step.grad_norm, rel=1e-3)


@pytest.mark.usefixtures("exact_head")
def test_a_second_update_on_a_batch_has_the_log_probs_it_divides_by(base: Path, tmp_path: Path) -> None:
    trainer = foreign_trainer(
        base,
        tmp_path,
        [ss.StepRecorder(tmp_path)],
        model=in_float64(base),
        num_iterations=2,
        max_steps=4,
        beta=0.05,
        learning_rate=0.02,
    )
    with true_float64():
        trainer.train()
    training = RecordedTraining.load(tmp_path)
    first, second, third, _ = training
    assert first.rollouts.response_token_ids == second.rollouts.response_token_ids
    assert first.rollouts.response_token_ids != third.rollouts.response_token_ids
    for old, now in zip(second.rollouts.behaviour, second.rollouts.logprobs, strict=True):
        assert np.abs(old - now).max() > 1e-3
    for old, before in zip(second.rollouts.behaviour, first.rollouts.logprobs, strict=True):
        assert old == pytest.approx(before, abs=1e-9)
    assert max(errors_of_gradients(training, trainer.model, trainer.processing_class)) < 1e-9


@pytest.mark.usefixtures("exact_head")
def test_a_training_with_rloo_is_recorded(base: Path, tmp_path: Path) -> None:
    like = foreign_trainer(base, tmp_path, [], model=in_float64(base))
    kept = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    kept += ("max_completion_length", "learning_rate", "use_cpu", "bf16", "report_to", "save_strategy")
    kept += ("gradient_checkpointing",)
    trainer = RLOOTrainer(
        model=in_float64(base),
        reward_funcs=like.reward_funcs,
        args=RLOOConfig(output_dir=str(tmp_path), **{k: getattr(like.args, k) for k in kept}),
        train_dataset=like.train_dataset,
        callbacks=[ss.StepRecorder(tmp_path)],
    )
    with true_float64():
        trainer.train()
    training = RecordedTraining.load(tmp_path)
    assert training.steps == range(1, 4)
    assert max(errors_of_gradients(training, trainer.model, trainer.processing_class)) < 1e-9


def test_advantages_of_tokens_are_recorded(small_run: Path, tmp_path: Path) -> None:
    out = cases.start_from(small_run, tmp_path / "run")
    config = cases.training(
        rl={"record": {}, "steps": 2, "objective": {"name": "top_entropy", "fraction": 0.5}}
    )
    train(config, out, resume=True)
    for step in RecordedTraining.load(out):
        batch = step.rollouts
        assert batch.advantages is not None
        assert batch.token_advantages is not None
        kept = [row != 0 for row in batch.token_advantages]
        assert 0.4 < np.mean(np.concatenate(kept)) < 0.6
        for weights, row in zip(step.token_weights, batch.token_advantages, strict=True):
            assert weights == pytest.approx(row / (16 * 20), abs=1e-8)


def warns_once(trainer: GRPOTrainer, message: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"StepRecorder: off from step \d on, .* without it: {message}"
    ) as s:
        trainer.train()
    assert sum("StepRecorder" in str(warning.message) for warning in s) == 1
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("recorder", "arguments", "message"),
    [
        ({}, {"optim": "adafactor"}, "the optimizer is Adafactor, and steps are recorded of torch's AdamW"),
        ({}, {"optim": "rmsprop"}, "the optimizer is RMSprop, and a step can be rebuilt of"),
        ({"max_bytes": 50_000}, {}, r"a record of 3 steps takes \d+ kB .*, and max_bytes is 50 kB; train an"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_the_training_goes_on(
    base: Path, tmp_path: Path, recorder: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    warns_once(foreign_trainer(base, tmp_path, [ss.StepRecorder(**recorder)], **arguments), message)
    assert not (tmp_path / "record").exists()


def test_dropout_is_found_by_holding_the_weights_against_the_gradient(base: Path, tmp_path: Path) -> None:
    lora = lora_of(lora_dropout=0.5)
    trainer = foreign_trainer(base, tmp_path, [ss.StepRecorder()], peft_config=lora)
    warns_once(trainer, r"the recorded token weights give a gradient that is .* away from the one in use")
    assert "dropout" in find_record(tmp_path).record.fault


def test_a_recorder_that_fails_ends_its_record_there(base: Path, tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    trainer = foreign_trainer(base, once, [ss.StepRecorder(), Breaks(once / "record" / "steps", at=2)])
    warns_once(trainer, "FileExistsError at pathlib.py")
    folder = find_record(once)
    assert folder.steps == range(1, 2)
    assert folder.record.fault.startswith("from step 2 on nothing is recorded: FileExistsError")
    assert not folder.record.complete
    undisturbed = foreign_trainer(base, again, [])
    undisturbed.train()
    pairs = zip(trainer.model.parameters(), undisturbed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not {"compute_loss", "_calculate_rewards"} & vars(trainer).keys()


@dataclass
class Breaks(TrainerCallback):  # type: ignore[misc]
    """Puts something in the way of the recorder."""

    folder: Path
    at: int

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at:
            (self.folder / f"{self.at:06d}.partial").mkdir()


def test_a_recorder_that_comes_late_begins_there(base: Path, tmp_path: Path) -> None:
    trainer = foreign_trainer(base, tmp_path, [])
    trainer.add_callback(Brings(trainer, ss.StepRecorder(), at=1))
    trainer.train()
    training = RecordedTraining.load(tmp_path)
    assert training.steps == range(2, 4)
    assert set(training.state(1).steps.values()) == {1}
    assert training.folder.record.complete
    assert training.verify()


@dataclass
class Brings(TrainerCallback):  # type: ignore[misc]
    """Adds a recorder to a training under way."""

    trainer: GRPOTrainer
    recorder: ss.StepRecorder
    at: int

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            self.trainer.add_callback(self.recorder)


def test_a_finished_record_is_not_written_over(base: Path, tmp_path: Path) -> None:
    foreign_trainer(base, tmp_path, [ss.StepRecorder()]).train()
    before = find_record(tmp_path).batch(1).rollouts.responses
    trainer = foreign_trainer(base, tmp_path, [ss.StepRecorder()], seed=7)
    warns_once(trainer, ".*holds the record of a finished training of 3 steps; delete it")
    assert find_record(tmp_path).batch(1).rollouts.responses == before
    assert find_record(tmp_path).record.complete


def test_an_unfinished_record_is_not_lost_to_another_training(base: Path, tmp_path: Path) -> None:
    foreign_trainer(base, tmp_path, [ss.StepRecorder()]).train()
    path = tmp_path / "record" / "record.json"
    replace(RunRecord.read(path), complete=False).write(path)
    before = contents(tmp_path / "record")
    other = in_float64(base).float()
    other.model.norm.weight.data += 0.1
    warns_once(
        foreign_trainer(base, tmp_path, [ss.StepRecorder()], model=other), ".*began from another state"
    )
    assert contents(tmp_path / "record").keys() == before.keys()
    assert find_record(tmp_path).steps == range(1, 4)
    foreign_trainer(base, tmp_path, [ss.StepRecorder()]).train()
    assert find_record(tmp_path).record.complete


@pytest.mark.filterwarnings("ignore:.*has no manifest.json")
def test_another_training_does_not_go_on_with_a_record(recorded_run: Path, tmp_path: Path) -> None:
    """The checkpoint that it goes on from has other weights than those recorded after its step."""
    out = tmp_path / "run"
    shutil.copytree(recorded_run, out)
    weights = out / "checkpoints" / "step-4" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1e-3
    vectors.save(tensors, weights)
    (out / "checkpoints" / "step-4" / "manifest.json").unlink()
    config = cases.training(rl={"record": RECORD, "steps": 6})
    with pytest.warns(UserWarning, match="goes on from another state than the one recorded after step 4"):
        train(config, out, resume=True)
    assert find_record(out).steps == range(1, 5)


def test_sizes_are_bounds_and_a_budget_thins_states_out() -> None:
    size = RecordSize(gradient=1000, batch=100, state=3000, steps=60, state_every=4)
    assert size.total == 60 * 1100 + 17 * 3000
    assert size.within(size.total, "max_bytes") is size
    thinner = size.within(90_000, "max_bytes")
    assert thinner.total <= 90_000
    assert thinner.state_every == 9
    assert size.within(72_000, "max_bytes").state_every == 0
    with pytest.raises(ConfigError, match=r"takes 72 kB \(1.1 kB a step\), and max_bytes is 71.9 kB"):
        size.within(71_900, "max_bytes")


def test_what_is_said_before_the_start_is_not_exceeded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_trainer(base, tmp_path, [ss.StepRecorder(state_every=1)]).train()
    line = next(s for s in capsys.readouterr().err.splitlines() if "of parameters and moments" in s)
    assert line.startswith(f"{tmp_path / 'record'}: ")
    taken = sum(p.stat().st_size for p in (tmp_path / "record").rglob("*") if p.is_file())
    said = float(line.split(": ")[2].split(" kB")[0]) * 1000
    assert taken <= said <= 4 * taken


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="state_every is 0, expected at least 1"):
        ss.StepRecorder(state_every=0)
