"""Shared fixtures: a tiny policy with a real AdamW state, built in code, offline and on one thread."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.state import OptimizerState, ParameterGroup, Policy

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")

VOCAB = 12


def adamw_state(
    model: nn.Module, *, steps: int = 3, lr: float = 1e-3, weight_decay: float = 0.1
) -> OptimizerState:
    """Take AdamW steps on random tokens and hand over the optimizer's own state, by parameter name."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [n for n, p in named.items() if p.dim() > 1]
    plain = [n for n, p in named.items() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in decayed], "weight_decay": weight_decay},
            {"params": [named[n] for n in plain], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(2, VOCAB, (4, 9), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {n: optimizer.state[p] for n, p in named.items()}
    return OptimizerState(
        groups=tuple(
            ParameterGroup(names=tuple(names), lr=lr, weight_decay=decay)
            for names, decay in ((decayed, weight_decay), (plain, 0.0))
            if names
        ),
        exp_avg={n: s["exp_avg"].clone() for n, s in state.items()},
        exp_avg_sq={n: s["exp_avg_sq"].clone() for n, s in state.items()},
        steps={n: int(s["step"]) for n, s in state.items()},
    )


def build_policy(*, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: object) -> Policy:
    """A two-layer Qwen2 policy over twelve tokens (0 pads, 1 ends) with AdamW state; no tokenizer."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    ).to(dtype)
    optimizer = adamw_state(model)
    chosen = {"group_size": 2, "prompts_per_step": 2, "max_response_tokens": 6, **settings}
    return Policy(model.eval(), None, StepSettings(**chosen), optimizer, step=3)  # type: ignore[arg-type]


@pytest.fixture
def tiny_policy() -> Policy:
    """A float64 policy with AdamW state."""
    return build_policy()


@pytest.fixture(name="build_policy")
def _build_policy() -> Callable[..., Policy]:
    return build_policy


SMALL_TRAINING = """
model:
  source: tiny
  tiny: {hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64}
task: arithmetic:terms=2,digits=2,ops=+
format_weight: 0.1
sft:
  examples: 40
  epochs: 12
  batch_size: 20
  check_every: 8
  check_prompts: 16
  format_threshold: 1.0
  optimizer: {lr: 0.01}
rl:
  group_size: 4
  prompts_per_step: 4
  micro_batch_size: 16
  max_response_tokens: 24
  max_resample: 1
  steps: 4
  save_every: 2
  report_to: []
  optimizer: {lr: 0.001, weight_decay: 0.01}
"""


@pytest.fixture(scope="session")
def small_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file whose training takes seconds."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL_TRAINING)
    return path


@pytest.fixture(scope="session")
def trained_run(small_training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a real small training: warm-up, then four steps of reinforcement learning."""
    from stepscope.config import TrainConfig, load_config
    from stepscope.pipeline import run_train

    out = tmp_path_factory.mktemp("trained") / "run"
    run_train(load_config(TrainConfig, small_training, [], {"out": str(out)}))
    return out


@pytest.fixture(scope="session")
def checkpoint(trained_run: Path) -> Path:
    """The last checkpoint of the small training; not to be changed, copy it."""
    return trained_run / "checkpoints" / "step-4"
