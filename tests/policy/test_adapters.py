"""PEFT adapters as they were in training: what the live model said before saving, or a refusal with why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, LoraGAConfig, RandLoraConfig, VeraConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import load_adapter, reference_adapter
from stepscope.policy.numerics.precision import matching_precision

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, and what measure warns of

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
TARGETS = ["q_proj", "down_proj"]


def logprobs(model: nn.Module) -> Tensor:
    with torch.no_grad(), matching_precision(model):
        found: Tensor = model(input_ids=IDS).logits.double().log_softmax(-1)
    return found


class Saved:
    """An adapter moved from its start, saved by PEFT, and what the model said before that."""

    def __init__(self, folder: Path, model: Any, config: Any, tokenizer: Any) -> None:
        self.base_logprobs = logprobs(model)
        adapted = get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        self.model = adapted
        self.logprobs = logprobs(adapted)
        self.folder = folder / "adapter"
        adapted.save_pretrained(self.folder)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    cases.model("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def save(base: Path, tokenizer: Any, tmp_path: Path) -> Callable[..., Saved]:
    def saved(config: Any, before: Callable[[Any], None] | None = None) -> Saved:
        model = AutoModelForCausalLM.from_pretrained(base)
        if before is not None:
            before(model)
        return Saved(tmp_path, model, config, tokenizer)

    return saved


ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"lora-{init}": (LoraConfig, {"lora_alpha": 4, "init_lora_weights": init})
        for init in (True, False, "gaussian", "pissa", "olora", "eva", "orthogonal", "mica")
    },
    "dora": (LoraConfig, {"use_dora": True}),
    "parameters": (LoraConfig, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "tokens": (LoraConfig, {"trainable_token_indices": [3, 4]}),
    "loha": (LoHaConfig, {}),
    "randlora": (RandLoraConfig, {}),
    "vera": (VeraConfig, {"target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_loaded_model_says_what_the_trained_one_did(
    save: Callable[..., Saved], name: str, dtype: torch.dtype
) -> None:
    """Random numbers drawn on the way do not matter; the reference is the base as it was."""
    kind, options = ADAPTERS[name]
    saved = save(kind(**({"r": 2, "target_modules": TARGETS} | options)))
    torch.manual_seed(7)
    loaded, _ = load_adapter(saved.folder, dtype=dtype, device="cpu")
    tolerance = 0.0 if dtype == torch.float32 else 2e-5
    torch.testing.assert_close(logprobs(loaded), saved.logprobs, rtol=0, atol=tolerance)
    with reference_adapter(loaded, as_trained=False):
        torch.testing.assert_close(logprobs(loaded), saved.base_logprobs, rtol=0, atol=tolerance)
    torch.testing.assert_close(logprobs(loaded), saved.logprobs, rtol=0, atol=tolerance)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_the_reference_of_trls_penalty_is_what_pissa_leaves_of_the_base(save: Callable[..., Saved]) -> None:
    saved = save(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"))
    loaded, _ = load_adapter(saved.folder, dtype=torch.float32, device="cpu")
    with saved.model.disable_adapter(), reference_adapter(loaded):
        left, ours = logprobs(saved.model), logprobs(loaded)
    torch.testing.assert_close(ours, left, rtol=0, atol=0)
    assert float((left - saved.base_logprobs).abs().max()) > 1


def gradients(model: Any) -> None:
    config = LoraConfig(
        r=2, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())


@pytest.mark.parametrize(
    ("options", "before"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, None),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, gradients),
    ],
    ids=["pissa_niter", "lora_ga"],
)
def test_a_base_rewritten_by_what_no_file_keeps_is_refused(
    save: Callable[..., Saved], options: dict[str, Any], before: Any
) -> None:
    saved = save(LoraConfig(r=2, target_modules=TARGETS, **options), before)
    with pytest.raises(
        CheckpointError, match=r"init_lora_weights is .* rewrites the base .*; save the adapter"
    ):
        load_adapter(saved.folder, dtype=torch.float32)


@pytest.mark.parametrize("init", ["corda", "loftq", "an_initialisation_to_come"])
def test_initialisations_that_need_data_or_a_quantizer_are_refused(
    save: Callable[..., Saved], init: str
) -> None:
    saved = save(LoraConfig(r=2, target_modules=TARGETS))
    file = saved.folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(CheckpointError, match=f"init_lora_weights is '{init}'"):
        load_adapter(saved.folder, dtype=torch.float32)


def test_a_vocabulary_that_grew_in_training_is_restored(save: Callable[..., Saved], tokenizer: Any) -> None:
    saved = save(
        LoraConfig(r=2, target_modules=TARGETS),
        before=lambda model: model.resize_token_embeddings(30, mean_resizing=False),
    )
    loaded, _ = load_adapter(saved.folder, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logprobs(loaded), saved.logprobs, rtol=0, atol=0)


def test_added_tokens_without_rows_are_refused(save: Callable[..., Saved], tokenizer: Any) -> None:
    saved = save(LoraConfig(r=2, target_modules=TARGETS))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(saved.folder)
    with pytest.raises(CheckpointError, match=r"tokenizer has 25 tokens and the model 23 embedding rows"):
        load_adapter(saved.folder, dtype=torch.float32)


def test_the_base_is_loaded_at_its_revision(
    save: Callable[..., Saved], base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hub cache with two commits of one model; the adapter was trained on the older."""
    saved = save(LoraConfig(r=2, target_modules=TARGETS))
    hub = tmp_path / "hub" / "models--org--base"
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        snapshot = hub / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in base.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / name).write_text(commit)
    other = AutoModelForCausalLM.from_pretrained(base)
    other.model.norm.weight.data.mul_(3)
    other.save_pretrained(hub / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = saved.folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "org/base"}
    for recorded, told in (("v1", None), (None, "v1"), ("b" * 40, "main")):
        file.write_text(json.dumps(config | {"revision": recorded}))
        loaded, _ = load_adapter(saved.folder, dtype=torch.float32, device="cpu", revision=told)
        torch.testing.assert_close(logprobs(loaded), saved.logprobs, rtol=0, atol=0)
    file.write_text(json.dumps(config | {"revision": None}))
    loaded, _ = load_adapter(saved.folder, dtype=torch.float32, device="cpu")
    assert float((logprobs(loaded) - saved.logprobs).abs().max()) > 1e-2
