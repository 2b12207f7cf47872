from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepscope.config import TinyModelConfig
from stepscope.errors import ConfigError
from stepscope.training.setup.tiny import build_tiny, build_tokenizer

TEXT = "12+7-5=<think>12+7=19;19-5=14</think><answer>14</answer>"


def test_text_survives_encoding_and_decoding() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert len(ids) == len(TEXT) - sum(
        len(tag) - 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")
    )
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_a_saved_policy_is_an_ordinary_folder(tmp_path: Path) -> None:
    model, tokenizer = build_tiny(TinyModelConfig(hidden_size=16, heads=2, kv_heads=1, layers=1), seed=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.decode(again(TEXT)["input_ids"]) == TEXT
    assert again.eos_token_id == model.config.eos_token_id
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)


def test_the_seed_decides_the_weights() -> None:
    config = TinyModelConfig(hidden_size=16, heads=2, kv_heads=1, layers=1)
    one, two, other = (build_tiny(config, seed=s)[0].state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="heads must divide hidden_size"):
        build_tiny(TinyModelConfig(hidden_size=17, heads=2, kv_heads=1), seed=0)
