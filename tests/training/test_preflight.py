"""What can be known to fail is refused before any work; what fails on the way is one line."""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import DigitTask, digit_config, reinforced
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import cases
from stepscope import cli
from stepscope.config import TrainConfig
from stepscope.errors import ConfigError, RunFolderError, TrainingError
from stepscope.policy.checkpoint.models import usable_device
from stepscope.training import run, train
from stepscope.training.rl import reinforce
from stepscope.training.setup.start import starting_model, writing
from stepscope.training.setup.tiny import build_tokenizer

MODEL = {"source": "tiny", "tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}}


def refused(config: TrainConfig, out: Path) -> str:
    """The error of a training that is refused before its warm-up."""
    with pytest.raises(ConfigError) as error:
        train(config, out)
    assert not (out / "base").exists()
    assert not (out / "warmup").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rl": {"report_to": ["wand"]}},
            "rl.report_to: 'wand' is none of the trackers .* did you mean wandb?",
        ),
        (
            {"rl": {"report_to": ["tensorboard", "comet_ml"]}},
            r"rl.report_to: comet_ml is not installed; install it \(pip install comet-ml\), or take it out",
        ),
        (
            {"model": MODEL | {"lora": {"targets": ["q_proj", "query"]}}},
            "model.lora.targets: 'query' names no module of the model; .* down_proj, .*, or all-linear",
        ),
        (
            {"model": MODEL | {"lora": {"targets": ["lm_head"]}}},
            "model.lora.targets: 'lm_head' cannot have an adapter",
        ),
        (
            {"model": MODEL | {"lora": {"targets": ["norm"]}}},
            "model.lora.targets: 'norm' cannot have an adapter",
        ),
        (
            {"rl": {"max_response_tokens": 1021}},
            "1021 and the longest prompt \\(arithmetic.*/train/0, 4 tokens\\) exceed the model's 1024 "
            "positions; lower rl.max_response_tokens",
        ),
        (
            {
                "task": "arithmetic:terms=3,digits=1,ops=+",
                "template": "{question}",
                "rl": {"max_response_tokens": 1021},
            },
            "exceed the model's 1024 positions; lower",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_warm_up(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    found = refused(cases.training(**changes), tmp_path / "run")
    assert re.search(message, found), found


def test_a_tokenizer_without_an_end_is_refused(small_run: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    AutoModelForCausalLM.from_pretrained(small_run / "base").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    message = refused(cases.training(model={"source": str(tmp_path / "model")}), tmp_path / "run")
    assert "has no end-of-sequence token" in message


def test_long_prompts_are_counted_and_named(tmp_path: Path) -> None:
    """Sums of numbers of 1 or 2 digits have 4 to 6 tokens; 1018 + 6 fit into 1024 positions."""
    mixed = {"task": "arithmetic:terms=2,digits=2,ops=+", "sft": None}
    message = refused(cases.training(**mixed, rl={"max_response_tokens": 1019}), tmp_path / "run")
    assert "6 tokens) exceed the model's 1024 positions; set rl.max_prompt_tokens to 5, which" in message


def test_a_diverged_training_ends_with_the_step_and_what_to_try(tmp_path: Path) -> None:
    expected = (
        r"rl: the training diverged at step 2: the gradient is not finite; the checkpoints so far are kept; "
        r"train into another folder with a lower rl.optimizer.lr"
    )
    with pytest.raises(TrainingError, match=expected):
        reinforced(digit_config(optimizer={"lr": 1e30}, save_every=1), tmp_path, DigitTask(0))
    assert (tmp_path / "checkpoints" / "step-1").is_dir()


def test_a_policy_that_cannot_be_sampled_has_diverged(tmp_path: Path) -> None:
    config = digit_config()
    model, tokenizer = starting_model(config.model, seed=0)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(TrainingError, match="at step 1: the policy's probabilities are not finite"):
        reinforce(config, model, tokenizer, DigitTask(0), tmp_path, resume=None)


def test_a_diverged_warm_up_is_one_line(tmp_path: Path) -> None:
    config = cases.training(sft=cases.TRAINING["sft"] | {"optimizer": {"lr": 1e30, "max_grad_norm": 0.0}})
    with pytest.raises(TrainingError, match=r"sft: the training diverged at step \d+: .*sft.optimizer.lr"):
        train(config, tmp_path / "run")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 KiB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, kept)


BIG = torch.zeros(100_000)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(BIG, path),
        lambda path: save_file({"big": BIG}, path),
        lambda path: path.write_text("x" * 200_000),
    ],
)
def test_a_full_disk_is_one_line(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    with pytest.raises(RunFolderError, match=r"cannot be written .* on with --resume"), writing(tmp_path):
        write(tmp_path / "file")


def test_a_folder_that_is_gone_on_the_way_is_one_line(tmp_path: Path) -> None:
    inside, elsewhere = tmp_path / "run" / "gone" / "file", tmp_path / "elsewhere" / "file"
    guard = run._faults_of_the_disk(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"run: cannot be written .* on with --resume"), guard:
        inside.write_text("")
    with pytest.raises(FileNotFoundError), run._faults_of_the_disk(tmp_path / "run"):
        elsewhere.write_text("")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "meta"])
def test_a_device_that_is_not_there_is_one_line(small_run: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device: '{device}' .*; give cpu"):
        usable_device(device)
    checkpoint = str(small_run / "checkpoints" / "step-2")
    out = str(small_run.parent / "eval.parquet")
    result = CliRunner().invoke(cli.app, ["eval", checkpoint, "--device", device, "--out", out])
    assert result.exit_code == 2
    assert f"error: device: '{device}'" in result.stderr
    assert "Traceback" not in result.output
    assert str(usable_device(None)) == str(usable_device("cpu")) == "cpu"
