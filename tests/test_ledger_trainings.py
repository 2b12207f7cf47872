"""The ledger of a LoRA training, and of a training by TRL's own trainer with nothing but the recorder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import stepscope as ss
from stepscope.config import TrainConfig, build_config
from stepscope.pipeline import run_ledger
from stepscope.reading.ledger import LedgerFolder
from stepscope.training import train
from test_ledger_pipeline import QUANTITIES, settings

TASK = "arithmetic:terms=2,digits=2,ops=+"
STEPS = 4


def closes(found: LedgerFolder, record: ss.RecordedTraining) -> None:
    """Entries, decay and momentum are the change along the displacements, and that is the realised change."""
    tokens, steps = found.tokens.to_pandas(), found.steps.to_pandas()
    written = sum(int(record.folder.batch(i).rollouts.num_policy_tokens.sum()) for i in record.steps)
    assert [a.quantity for a in found.ledger.accounts] == QUANTITIES
    for account in found.ledger.accounts:
        own = tokens[(tokens.quantity == account.quantity) & (tokens.through == "fixed")]
        mine = steps[steps.quantity == account.quantity].set_index("step")
        assert len(own) == written
        assert account.tokens.value == pytest.approx(own.influence.sum(), rel=1e-9)
        parts = account.tokens.value + account.decay.value + account.momentum_before.value
        assert account.predicted.value == pytest.approx(parts, rel=1e-12)
        assert mine.change.sum() == pytest.approx(parts, rel=1e-4)
        assert abs(account.rounding.value) < 1e-4 * np.abs(mine.change).max()
        assert account.momentum_before.value == 0
        assert np.abs(own.influence).max() > 0
    fixed = found.account("entropy_fixed_prefix")
    assert fixed.predicted.value == pytest.approx(fixed.realised.value, rel=0.02, abs=2e-5)
    assert abs(fixed.realised.value) > 1e-4
    entropy = found.account("entropy")
    assert entropy.closing_error.low < 0 < entropy.closing_error.high


def test_the_ledger_of_a_lora_training_closes(
    small_training: Path, trained_run: Path, tmp_path: Path
) -> None:
    """From the warmed-up base, of the adapter's parameters alone."""
    plain = yaml.safe_load(small_training.read_text())
    plain["model"] = {"source": str(trained_run / "base"), "lora": {"r": 4, "alpha": 8}}
    plain["rl"] |= {
        "steps": STEPS,
        "save_every": STEPS,
        "record": {"state_every": 2},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "max_grad_norm": 1e-3},
    }
    run = tmp_path / "run"
    train(build_config(TrainConfig, plain | {"sft": None}), run)
    record = ss.RecordedTraining.load(run)
    assert all("lora_" in name for name in record.state(0).parameters)
    assert min(record.folder.figures(i).clip_coefficient for i in record.steps) < 1
    run_ledger(settings(run, tmp_path / "ledger", kinship=None))
    closes(ss.load_ledger(tmp_path / "ledger"), record)


def test_the_ledger_of_a_plain_trl_training_closes(trained_run: Path, tmp_path: Path) -> None:
    """The trainer knows nothing of stepscope but one callback, and the checkpoint is its own."""
    run = tmp_path / "run"
    arguments = GRPOConfig(
        output_dir=str(run),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=24,
        learning_rate=3e-4,
        weight_decay=0.1,
        max_grad_norm=0.05,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=STEPS,
        disable_tqdm=True,
    )
    questions = [{"prompt": f"{a} + {b} ="} for a in range(10, 14) for b in range(20, 24)]
    trainer = GRPOTrainer(
        model=str(trained_run / "base"),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list(questions),
        callbacks=[ss.StepRecorder()],
    )
    trainer.train()
    record = ss.RecordedTraining.load(run)
    assert record.folder.record.complete
    run_ledger(settings(run, tmp_path / "ledger", task=TASK, kinship=None))
    closes(ss.load_ledger(tmp_path / "ledger"), record)
