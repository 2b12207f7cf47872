"""Files that are not the model they claim to be: refused, with the names that tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from trl import GRPOConfig

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.check.examination import examine
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.load import load_model
from stepscope.policy.checkpoint.models import stored_types
from stepscope.policy.checkpoint.settings.training_args import base_revision
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.optim.rounding import rounding_doubt
from stepscope.policy.state import Policy


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    def save(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        cases.model(architecture).to(dtype).save_pretrained(tmp_path / architecture)
        tokenizer.save_pretrained(tmp_path / architecture)
        return tmp_path / architecture

    return save


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, **changes: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file, metadata={"format": "pt"})


def test_a_config_with_fewer_layers_than_the_file_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved()
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"9 stored weights have no place in LlamaForCausalLM, model.layers.1"
    ):
        load_model(folder, dtype=torch.float32)


def test_a_config_that_contradicts_itself_is_refused(saved: Callable[..., Path]) -> None:
    """Architectures that list the kind of every layer: transformers' own validation refuses them."""
    folder = saved()
    cases.model("qwen2").save_pretrained(folder)
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"cannot be loaded \(.*num_hidden_layers.*must be equal to.*layer_types"
    ):
        load_model(folder, dtype=torch.float32)


def test_a_config_with_other_sizes_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved()
    change_config(folder, intermediate_size=48)
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight among them: got \(16, 32\), expected \(16, 48\)"
    ):
        load_model(folder, dtype=torch.float32)


def test_a_value_head_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved()
    change_weights(folder, **{"v_head.summary.weight": torch.ones(1, 16)})
    with pytest.raises(CheckpointError, match=r"1 stored weights have no place .* v_head.summary.weight"):
        load_model(folder, dtype=torch.float32)


def test_what_is_no_weight_or_stored_twice_is_passed_over(saved: Callable[..., Path]) -> None:
    """Buffers of old transformers versions, and the head of a model that ties it."""
    folder = saved("gpt2")
    buffers = {"attn.bias": torch.ones(1, 1, 4, 4), "attn.masked_bias": torch.tensor(-1e4)}
    change_weights(folder, **{f"transformer.h.0.{name}": value for name, value in buffers.items()})
    load_model(folder, dtype=torch.float32)
    folder = saved()
    change_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load_model(folder, dtype=torch.float32)
    folder = saved("qwen2")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(folder, **{"lm_head.weight": embedding.clone()})
    model: Any = load_model(folder, dtype=torch.float32)[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_quantized_weights_are_refused_as_such(
    saved: Callable[..., Path], settings: dict[str, Any], said: str
) -> None:
    folder = saved()
    change_config(folder, quantization_config=settings)
    with pytest.raises(
        CheckpointError, match=rf"the weights are quantized \({said}\), .*; dequantize the model"
    ):
        load_model(folder, dtype=torch.float32)


def test_what_trl_was_told_of_the_base_is_read(tmp_path: Path) -> None:
    def written(**told: Any) -> Path:
        args = GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], model_init_kwargs=told
        )
        torch.save(args, tmp_path / "training_args.bin")
        return tmp_path / "training_args.bin"

    assert base_revision(tmp_path / "training_args.bin") is None
    (tmp_path / "training_args.bin").write_bytes(b"no pickle")
    with pytest.raises(
        CheckpointError, match=r"not known which base the adapter was trained on; .* remove this"
    ):
        base_revision(tmp_path / "training_args.bin")
    assert base_revision(written(dtype="float32")) is None
    assert base_revision(written(revision="v1")) == "v1"
    for told in (
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        {"quantization_config": {"load_in_4bit": True}},
        {"load_in_8bit": True},
    ):
        with pytest.raises(
            CheckpointError, match=r"the base was quantized in training .*; dequantize that base"
        ):
            base_revision(written(**told))
    plain = {"attn_implementation": "eager", "device_map": None, "use_cache": False, "load_in_4bit": False}
    assert base_revision(written(**plain, dtype="bfloat16")) is None
    with pytest.raises(
        CheckpointError, match=r"another config in training \(rope_scaling, sliding_window in"
    ):
        base_revision(written(sliding_window=8, rope_scaling={"rope_type": "linear", "factor": 2.0}))


def test_a_model_without_tokenizer_says_so(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"there is no tokenizer beside the model; save it there"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_types_are_read_and_half_types_doubted(saved: Callable[..., Path], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    folder = saved(dtype=dtype)
    assert stored_types(folder) == (name,)
    assert (rounding_doubt((name,)) == "") == (dtype == torch.float32)
    StepSettings().save(folder)
    found = [f for f in inspect_checkpoint(folder) if "weights are stored" in f.what]
    assert [f.level for f in found] == ["ok" if dtype == torch.float32 else "warn"]
    assert name in found[0].what
    shutil.rmtree(folder)


def test_an_adapter_on_a_base_in_a_half_type_says_so(saved: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT keeps the adapter in float32, and the file of the adapter tells nothing of its base."""
    base = saved(dtype=torch.bfloat16)
    adapted = get_peft_model(cases.model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    args = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": []}
    torch.save(GRPOConfig(**args), folder / "training_args.bin")

    def warned() -> list[str]:
        found = inspect_checkpoint(folder)
        return [f.what for f in found if f.level == "warn" and "in float32 differs" in f.what]

    assert [w.startswith("the base of the adapter is stored in bfloat16") for w in warned()] == [True]
    torch.save(GRPOConfig(**args, model_init_kwargs={"dtype": "bfloat16"}), folder / "training_args.bin")
    assert len(warned()) == 2
    cases.model("llama").save_pretrained(base)
    assert [w.startswith("the model was loaded in bfloat16") for w in warned()] == [True]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=24, hidden_size=16, n_layer=2, n_head=2)),
        lambda: MptForCausalLM(MptConfig(vocab_size=24, d_model=16, n_layers=2, n_heads=2, max_seq_len=64)),
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=24,
                hidden_size=16,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
                dropout=0.0,
            )
        ),
    ],
    ids=["bloom", "mpt", "opt"],
)
def test_models_that_find_positions_themselves_are_measured(
    make: Callable[[], nn.Module], tokenizer: Any
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert {f.level for f in examine(Policy(model, tokenizer, StepSettings()))} == {"ok"}


def test_positions_that_trl_counts_from_the_padding_are_told(tokenizer: Any) -> None:
    for architecture, told in (("gpt2", True), ("llama", False), ("gemma3", False)):
        found = examine(Policy(cases.model(architecture), tokenizer, StepSettings()))
        assert any("TRL's loss counts them from the padding" in f.what for f in found) == told
