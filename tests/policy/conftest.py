"""Tiny models and a tiny tokenizer, built in code; a tiny task that needs no file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from enumerable import MIXTURES
from stepscope.tasks.problem import Problem, Score

VOCAB = ["<pad>", "</s>", *"0123456789+=?abcdefgh"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCAB)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def build_model(architecture: str = "qwen2", *, seed: int = 0, vocab: int = len(VOCAB)) -> nn.Module:
    """A model of a few thousand parameters whose tokens are far from uniform."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    model: nn.Module
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif architecture == "smollm":
        shape |= {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, rope_theta=100000.0))
    elif architecture == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8, sliding_window=8))
    elif architecture in MIXTURES:
        config, kind, more = MIXTURES[architecture]
        model = kind(config(**shape, num_experts_per_tok=2, **more))
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab,
                n_positions=128,
                n_embd=16,
                n_layer=2,
                n_head=2,
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
    else:
        raise ValueError(architecture)
    return model.eval()


ARCHITECTURES = ("qwen2", "qwen3", "llama", "smollm", "gemma3", "gpt2")


@dataclass(frozen=True)
class LetterTask:
    """Reward is the share of digits in the response, so that a random policy has reward variance."""

    size: int = 32
    spec: str = "letters"

    def formatted(self, response: str) -> bool:
        return bool(response)

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"letters/{split}/{i}", f"{i}+{i % 7}=", str(i + i % 7)) for i in range(self.size)]

    def prompt(self, problem: Problem, tokenizer: Any) -> str:
        return problem.question

    def score(self, problem: Problem, response: str) -> Score:
        digits = sum(c.isdigit() for c in response)
        return Score(round(digits / max(len(response), 1), 3), problem.answer in response, bool(response))

    def demonstration(self, problem: Problem) -> str:
        return problem.answer


@pytest.fixture(name="build_tokenizer", scope="session")
def _build_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(name="build_model", scope="session")
def _build_model() -> Callable[..., nn.Module]:
    return build_model


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def letters() -> LetterTask:
    return LetterTask()
