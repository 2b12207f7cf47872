"""``check`` says of a checkpoint what ``measure`` does with it: verdicts on variants of a real one agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor
from trl import GRPOConfig
from trl.experimental.gmpo import GMPOConfig
from typer.testing import CliRunner

from stepscope import cli
from stepscope.policy.checkpoint.manifest import MANIFEST
from stepscope.policy.checkpoint.parameter_order import decay_parameter_names

TASK = ["--task", "arithmetic:terms=2,digits=2,ops=+"]
SMALL = [
    "loss.format_weight=0.1", "update.num_prompts=6", "update.group_size=4", "probe.num_prompts=8",
    "batch_size=64", "baseline=none", "lrs=[1e-4]", "resample=10",
]  # fmt: skip
FLAGS = [
    "loss_type=dapo",
    "scale_rewards=group",
    "temperature=0.9",
    "max_response_tokens=24",
    "max_grad_norm=1.0",
]


@dataclass
class OwnConfig(GRPOConfig):
    """A user's own arguments."""

    curriculum: str = field(default="none")


def args(folder: Path, kind: Any = GRPOConfig, **changes: Any) -> None:
    """A plain TRL run's arguments in place of this project's own settings."""
    for name in ("stepscope.json", MANIFEST):
        (folder / name).unlink(missing_ok=True)
    sizes = {"num_generations": 4, "per_device_train_batch_size": 16, "max_completion_length": 24}
    made = kind(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        temperature=0.9,
        **{**sizes, **changes},
    )
    torch.save(made, folder / "training_args.bin")


def by_args(kind: Any = GRPOConfig, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: args(folder, kind, **changes)


def stepped_by(make: Callable[[torch.nn.Module], torch.optim.Optimizer]) -> Callable[[Path], None]:
    """The state of another optimizer after a real step on this checkpoint's model; its rates are its own."""

    def change(folder: Path) -> None:
        args(folder)
        (folder / "scheduler.pt").unlink(missing_ok=True)
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = make(model)
        ids = torch.arange(4, 16)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    return change


def cautious(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": list(model.parameters()), "caution": True}], lr=1e-3)


def frozen_embeddings(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for n, p in model.named_parameters() if "embed_tokens" not in n], lr=1e-3)


def frozen_layer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for n, p in model.named_parameters() if ".layers.0." not in n], lr=1e-3)


def older_trainer(model: torch.nn.Module) -> torch.optim.Optimizer:
    decay = decay_parameter_names(model, ("bias",))
    named = list(model.named_parameters())
    groups = [[p for n, p in named if n in decay], [p for n, p in named if n not in decay]]
    return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3)


def in_bitsandbytes(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        args(folder)
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        for entry in saved["state"].values():
            moments = {"state1": entry.pop("exp_avg").to(dtype), "state2": entry.pop("exp_avg_sq").to(dtype)}
            entry["__bnb_optimizer_quant_state__"] = moments
        for group in saved["param_groups"]:
            kept = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "params")}
            group.clear()
            group.update(kept, alpha=0.0, t_alpha=None, t_beta3=None)
        torch.save(saved, folder / "optimizer.pt")

    return change


def adapted(config: Any) -> Callable[[Path], None]:
    """An adapter on this checkpoint's model, with the optimizer state of a real step."""

    def change(folder: Path) -> None:
        base = folder.with_name("base")
        folder.rename(base)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        ids = torch.arange(4, 16)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        for name in ("tokenizer.json", "tokenizer_config.json", "trainer_state.json"):
            shutil.copy(base / name, folder / name)
        args(folder)

    return change


def attention_dropout(folder: Path) -> None:
    args(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))


def without_settings(folder: Path) -> None:
    args(folder)
    (folder / "training_args.bin").unlink()


def in_zero(folder: Path) -> None:
    args(folder)
    (folder / "optimizer.pt").unlink()
    (folder / "global_step4").mkdir()
    for rank in (0, 1):
        (folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()


def untouched(folder: Path) -> None:
    pass


CORE: dict[str, tuple[Callable[[Path], None], bool | None, Sequence[str]]] = {
    "own run": (untouched, True, ()),
    "plain": (by_args(), True, ()),
    "gspo": (by_args(loss_type="grpo", importance_sampling_level="sequence"), True, ()),
    "neftune": (by_args(neftune_noise_alpha=5.0), False, ()),
    "KL penalty of a full model": (by_args(beta=0.1), False, ()),
    "RAdam": (stepped_by(lambda m: torch.optim.RAdam(m.parameters(), lr=1e-3)), False, ()),
    "no settings": (without_settings, False, ()),
    "DeepSpeed": (in_zero, False, ()),
    "LoHa": (adapted(LoHaConfig(r=2, target_modules="all-linear")), None, ()),
}
"""Name to what is done to the checkpoint, whether it can be measured (None: either), flags for both verbs."""

FURTHER: dict[str, tuple[Callable[[Path], None], bool | None, Sequence[str]]] = {
    "accumulation": (by_args(gradient_accumulation_steps=2), True, ()),
    "cispo": (by_args(loss_type="cispo", epsilon_high=5.0), True, ()),
    "sapo": (by_args(loss_type="sapo"), True, ()),
    "vespo": (by_args(loss_type="vespo"), True, ()),
    "luspo": (by_args(loss_type="luspo", importance_sampling_level="sequence"), True, ()),
    "delta": (by_args(delta=2.0), True, ()),
    "entropy bonus": (by_args(entropy_coef=0.01), True, ["criteria.drop_shares=[]"]),
    "entropy bonus in pieces": (by_args(entropy_coef=0.01, gradient_accumulation_steps=2), False, ()),
    "top entropy": (by_args(top_entropy_quantile=0.5), True, ()),
    "top entropy in pieces": (by_args(top_entropy_quantile=0.5, gradient_accumulation_steps=2), False, ()),
    "bnpo in pieces": (by_args(loss_type="bnpo", gradient_accumulation_steps=2), False, ()),
    "unknown loss": (by_args(loss_type="of_tomorrow"), False, ()),
    "unknown loss, known by a flag": (by_args(loss_type="of_tomorrow"), True, ["loss.loss_type=grpo"]),
    "unknown loss, left out": (by_args(loss_type="of_tomorrow"), False, ["loss.without=[loss_type]"]),
    "reused batches": (by_args(num_iterations=2), False, ()),
    "moving reference": (by_args(sync_ref_model=True, beta=0.1), False, ()),
    "tools": (by_args(max_tool_calling_iterations=2), False, ()),
    "top-k": (by_args(top_k=20), False, ()),
    "top-k, left out": (by_args(top_k=20), True, ["loss.without=[top_k]"]),
    "KL penalty, left out": (by_args(beta=0.1), True, ["loss.beta=0"]),
    "KL penalty to nothing": (by_args(beta=0.1), False, ["reference=/no/such/model"]),
    "GMPO": (by_args(GMPOConfig), False, ()),
    "own arguments": (by_args(OwnConfig), True, ()),
    "settings by flags": (without_settings, True, [f"loss.{flag}" for flag in FLAGS]),
    "attention dropout": (attention_dropout, True, ()),
    "NAdam": (stepped_by(lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3)), False, ()),
    "RMSprop": (stepped_by(lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3)), False, ()),
    "SGD": (stepped_by(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3)), True, ()),
    "cautious AdamW": (stepped_by(cautious), False, ()),
    "frozen embeddings": (stepped_by(frozen_embeddings), True, ()),
    "a frozen layer": (stepped_by(frozen_layer), False, ()),
    "transformers 4.49": (stepped_by(older_trainer), True, ()),
    "paged AdamW in 32 bits": (in_bitsandbytes(torch.float32), True, ()),
    "AdamW in 8 bits": (
        stepped_by(lambda m: bitsandbytes.optim.AdamW8bit(m.parameters(), lr=1e-3, min_8bit_size=64)),
        True,
        (),
    ),
    "transformers' Adafactor": (
        stepped_by(lambda m: Adafactor(m.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)),
        True,
        (),
    ),
    "AdamW in 8 bits without its map": (in_bitsandbytes(torch.uint8), False, ()),
    "LoRA with a KL penalty": (
        adapted(LoraConfig(r=2, target_modules="all-linear")),
        True,
        ["loss.beta=0.1"],
    ),
    "float64": (by_args(), True, ["precision=float64"]),
}


def test_what_8_bits_lost_stands_beside_the_step(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    change, *_ = (CORE | FURTHER)["AdamW in 8 bits"]
    change(folder)
    checked = CliRunner().invoke(cli.app, ["check", str(folder), *TASK, *SMALL])
    assert "moments are kept in 8 bits" in " ".join(checked.stdout.split())
    out = tmp_path / "m"
    stages = ["--out", str(out), "--stages", "rollouts,step"]
    measured = CliRunner().invoke(cli.app, ["measure", str(folder), *TASK, *stages, *SMALL])
    assert measured.exit_code == 0, (measured.output, measured.exception)
    stored = json.loads((out / "step.json").read_text())["storage"]
    assert set(stored["tensors"]) == {"exp_avg", "exp_avg_sq"}
    figures = json.loads((out / "summary.json").read_text())
    assert figures["storage_error"]["value"] == stored["direction"] > 0
    assert figures["storage_error_worst"]["value"] == stored["direction_worst"] > stored["direction"]
    assert "the step is the training's own" in figures["storage_error"]["method"]


def test_findings_about_a_run_folder_are_not_repeated(trained_run: Path) -> None:
    folder = trained_run / "checkpoints"
    result = CliRunner().invoke(cli.app, ["check", str(folder)])
    assert result.exit_code == 2
    assert result.stdout.count("fail") == 1


def test_evaluation_asks_for_nothing_that_only_a_step_needs(checkpoint: Path, tmp_path: Path) -> None:
    """Another trainer's arguments, noise in training, and an optimizer that no step can be rebuilt of."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-4"))
    stepped_by(lambda m: torch.optim.RAdam(m.parameters(), lr=1e-3))(folder)
    args(folder, GMPOConfig, neftune_noise_alpha=5.0)
    out = ["--out", str(tmp_path / "e.parquet"), "num_prompts=4"]
    result = CliRunner().invoke(cli.app, ["eval", str(folder), *TASK, *out])
    assert result.exit_code == 0, (result.output, result.exception)
    (folder / "training_args.bin").unlink()
    result = CliRunner().invoke(cli.app, ["eval", str(folder), *TASK, "--out", str(tmp_path / "f.parquet")])
    assert result.exit_code == 2
    assert "give loss.temperature=..., loss.max_response_tokens=..." in result.stderr


def test_what_a_step_is_measured_without_stands_with_it(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    args(folder, top_k=20)
    out = ["--out", str(tmp_path / "m"), "--stages", "rollouts", "loss.without=[top_k]"]
    with pytest.warns(UserWarning, match="measured without the run's top_k"):
        result = CliRunner().invoke(cli.app, ["measure", str(folder), *TASK, *out, *SMALL])
    assert result.exit_code == 0, (result.output, result.exception)
    provenance = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert provenance["limits"] == ["the step is measured without the run's top_k"]


def test_a_bonus_and_steps_made_again_are_told_apart_before_work_starts(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    args(folder, entropy_coef=0.01)
    checked = CliRunner().invoke(cli.app, ["check", str(folder), *TASK, *SMALL])
    measured = CliRunner().invoke(
        cli.app, ["measure", str(folder), *TASK, "--out", str(tmp_path / "m"), *SMALL, "--validate"]
    )
    assert (checked.exit_code, measured.exit_code) == (2, 2)
    assert "criteria.drop_shares=[]" in measured.stderr
    assert "--validate" in measured.stderr
    assert not (tmp_path / "m" / "step.json").exists()


@pytest.mark.parametrize("name", [*CORE, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)])
def test_check_says_what_measure_does(checkpoint: Path, tmp_path: Path, name: str) -> None:
    change, fit, flags = (CORE | FURTHER)[name]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    change(folder)
    checked = CliRunner().invoke(cli.app, ["check", str(folder), *TASK, *SMALL, *flags])
    out = ["--out", str(tmp_path / "m"), "--stages", "rollouts,step,change"]
    measured = CliRunner().invoke(cli.app, ["measure", str(folder), *TASK, *out, *SMALL, *flags])
    assert measured.exit_code in (0, 2), (measured.output, measured.exception)
    assert checked.exit_code == measured.exit_code, (checked.output, measured.stderr)
    if fit is not None:
        assert measured.exit_code == (0 if fit else 2), measured.stderr
    if measured.exit_code:
        assert measured.stderr.count("\n") == 1
        assert not (tmp_path / "m" / "step.json").exists()
    else:
        assert (tmp_path / "m" / "change.json").is_file()
