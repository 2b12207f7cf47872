"""What tests build: tiny models, tokenizers, policies, batches, real steps; in code and offline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from pydantic import TypeAdapter
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from stepscope.config import STAGES, TrainConfig, build_config
from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.loss.advantages import advantages
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import policy_loss
from stepscope.policy.optim.adamw import AdamWGroup, AdamWState
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.stats import Estimate

CHARACTERS = ("<pad>", "</s>", *"0123456789+=?abcdefgh")
VOCAB = 12  # of :func:`policy`

SHAPE = {
    "vocab_size": len(CHARACTERS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # tokens are far from uniform
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "olmoe": {"num_experts": 4},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "smollm": {
        "model_type": "llama",
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8},
    "gpt2": {},
}


def estimate_of(fields: Mapping[str, Any]) -> Estimate:
    """The estimate that a file has."""
    return TypeAdapter(Estimate).validate_python(fields)


def model(architecture: str = "qwen2", *, seed: int = 0, **shape: Any) -> Any:
    """A float32 model of a few thousand parameters, not training; ``shape`` changes its configuration."""
    torch.manual_seed(seed)
    special = ARCHITECTURES.get(architecture) or {"num_experts_per_tok": 2, **MIXTURES.get(architecture, {})}
    options = {"model_type": architecture, **SHAPE, **special, **shape}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(base: nn.Module, **options: Any) -> Any:
    """LoRA of rank 2 on ``base``, with both matrices random unless ``options`` say otherwise."""
    chosen = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return get_peft_model(base, LoraConfig(**chosen)).eval()  # type: ignore[arg-type]


def tokenizer(words: Sequence[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token for each of ``words``; those of one character are cut out of any text."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    tags = "|".join(w for w in words[2:] if len(w) > 1)
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"{tags}|." if tags else "."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def adamw_state(
    trained: nn.Module, *, steps: int = 3, lr: float = 1e-3, weight_decay: float = 0.1
) -> AdamWState:
    """AdamW's own state by name after steps on random tokens; parameters of one dimension do not decay."""
    named = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    decayed = [n for n, p in named.items() if p.dim() > 1]
    plain = [n for n, p in named.items() if p.dim() <= 1]
    groups = [(names, decay) for names, decay in ((decayed, weight_decay), (plain, 0.0)) if names]
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in names], "weight_decay": decay} for names, decay in groups], lr=lr
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(2, VOCAB, (4, 9), generator=generator)
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {n: optimizer.state[p] for n, p in named.items()}
    return AdamWState(
        groups=tuple(AdamWGroup(tuple(names), lr=lr, weight_decay=decay) for names, decay in groups),
        exp_avg={n: s["exp_avg"].clone() for n, s in state.items()},
        exp_avg_sq={n: s["exp_avg_sq"].clone() for n, s in state.items()},
        steps={n: int(s["step"]) for n, s in state.items()},
    )


class Largest(TorchDispatchMode):
    """The most numbers that a tensor of some kind holds, of all that are made in the block."""

    def __init__(self, counts: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.counts, self.found = counts, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self.counts(leaf):
                self.found = max(self.found, numbers_held(leaf))
        return result


class SmallDevice:
    """Has memory for so many sequences at a time; counts how often that did not suffice."""

    def __init__(self, model: nn.Module, room: int) -> None:
        self.room, self.failures = room, 0
        self.handle = model.model.layers[-1].mlp.register_forward_hook(self)  # type: ignore[union-attr, index]

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if len(output) > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


def numbers_held(tensor: Tensor) -> int:
    """Those of its memory, whatever part of it a view shows."""
    return tensor.untyped_storage().nbytes() // tensor.itemsize


def stepped() -> tuple[Any, dict[str, Any]]:
    """A Qwen2 after AdamW's first step along ones, and ``state_dict()`` of the optimizer with names."""
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved, names = optimizer.state_dict(), [n for n, _ in trained.named_parameters()]
    saved["state"] = {names[i]: entry for i, entry in saved["state"].items()}
    saved["param_groups"][0]["params"] = names
    return trained, saved


def policy(*, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any) -> Policy:
    """A two-layer Qwen2 policy over twelve tokens (0 pads, 1 ends) with AdamW state; no tokenizer."""
    trained = model(seed=seed, vocab_size=VOCAB).to(dtype)
    chosen = {"group_size": 2, "prompts_per_step": 2, "max_response_tokens": 6, **settings}
    return Policy(trained, None, StepSettings(**chosen), adamw_state(trained), step=3)


def rollouts(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], /, **fields: Any
) -> Rollouts:
    """A batch of these token ids; what ``fields`` do not say is blank: no text, no reward, zeros."""
    count = len(responses)
    blank: dict[str, Any] = {
        "prompt_ids": tuple(str(tuple(p)) for p in prompts),
        "prompts": ("",) * count,
        "responses": ("",) * count,
        "rewards": np.zeros(count),
        "correct": np.zeros(count, dtype=bool),
        "truncated": np.zeros(count, dtype=bool),
        "logprobs": tuple(np.zeros(len(r)) for r in responses),
        "entropies": tuple(np.zeros(len(r)) for r in responses),
        "temperature": 1.0,
        "max_response_tokens": max(map(len, responses)),
    }
    ids = {
        "prompt_token_ids": tuple(map(tuple, prompts)),
        "response_token_ids": tuple(map(tuple, responses)),
    }
    return Rollouts(**(blank | ids | fields))


def scored(judge: Policy, batch: Rollouts) -> Rollouts:
    """The batch with the log-probs and entropies that the policy gives it."""
    logprobs, entropies = score_rollouts(judge, batch)
    return replace(batch, logprobs=logprobs, entropies=entropies)


def batch(owner: Policy, *, num_prompts: int = 3, group_size: int = 3, seed: int = 0) -> Rollouts:
    """Random token ids as responses, scored by the policy; a step does not care who wrote them."""
    vocab = owner.model.config.vocab_size
    rng = np.random.default_rng(seed)
    count = num_prompts * group_size
    prompts = [rng.integers(2, vocab, rng.integers(2, 5)).tolist() for _ in range(num_prompts)]
    responses = [rng.integers(1, vocab, rng.integers(1, 6)).tolist() for _ in range(count)]
    index = np.repeat(np.arange(num_prompts), group_size)
    rewards = rng.random(count)
    drawn = rollouts(
        [prompts[i] for i in index],
        responses,
        prompt_ids=tuple(f"p{seed}/{i}" for i in index),
        rewards=rewards,
        correct=rewards > 0.5,
        temperature=owner.settings.temperature,
        max_response_tokens=6,
        advantages=advantages(rewards, index, owner.settings.scale_rewards),
    )
    return scored(owner, drawn)


def step(owner: Policy, *, num_prompts: int = 3, group_size: int = 3, seed: int = 0) -> Step:
    """The step that a :func:`batch` makes; the batch is its ``update``."""
    return reconstruct_step(owner, batch(owner, num_prompts=num_prompts, group_size=group_size, seed=seed))


def preferences(estimator: str) -> tuple[Policy, Rollouts, Policy]:
    """A policy in HyPO, four pairs, two samples to each of four other prompts, and the reference policy."""
    parameters = {"kl_weight": 0.5, "kl_group_size": 2, "kl_estimator": estimator}
    known = {"loss_type": "hypo", "beta": 0.7, "loss_parameters": parameters, "scale_rewards": "none"}
    owner, other = policy(**known), policy(seed=1, **known)
    pairs, samples = (batch(owner, num_prompts=4, group_size=2, seed=seed) for seed in (3, 4))
    together = rollouts(
        pairs.prompt_token_ids + samples.prompt_token_ids,
        pairs.response_token_ids + samples.response_token_ids,
        prompt_ids=tuple(f"{kind}/{i // 2}" for kind in ("pair", "sample") for i in range(8)),
        prompts=tuple(map(str, pairs.prompt_token_ids + samples.prompt_token_ids)),
        rewards=np.array([1.0, 0.0] * 4 + [0.0] * 8),
        advantages=np.array([0.5, -0.5] * 4 + [0.0] * 8),
    )
    return owner, scored(owner, together), other


def from_trl(batches: Iterable[Mapping[str, Tensor]], **fields: Any) -> Rollouts:
    """TRL's padded batches, one after the other, as one batch with the advantages they hold."""
    ids: dict[str, list[tuple[int, ...]]] = {"prompt": [], "completion": []}
    found: list[float] = []
    for padded in batches:
        for part, rows in ids.items():
            masks = padded[f"{part}_mask"].bool()
            rows += [
                tuple(row[mask].tolist()) for row, mask in zip(padded[f"{part}_ids"], masks, strict=True)
            ]
        found += padded["advantages"].double().tolist()
    return rollouts(ids["prompt"], ids["completion"], advantages=np.array(found), **fields)


def take_step(owner: Policy, optimizer: torch.optim.Optimizer, update: Rollouts) -> float:
    """What a trainer does: loss, backward, clip, step; the gradient's norm before the clip."""
    tokens = make_batch(update.prompt_token_ids, update.response_token_ids)
    now = forward(owner.model, tokens, temperature=update.temperature).logprobs
    weights = torch.as_tensor(update.advantages)
    optimizer.zero_grad()
    policy_loss(now, now.detach(), weights, tokens.response_mask, owner.settings).backward()
    return clipped_step(owner, optimizer)


def clipped_step(owner: Policy, optimizer: torch.optim.Optimizer) -> float:
    """The optimizer's step along the gradient that the parameters hold, clipped as the settings say."""
    limit = owner.settings.max_grad_norm
    found = torch.nn.utils.clip_grad_norm_(owner.parameters.values(), limit if limit > 0 else float("inf"))
    optimizer.step()
    return float(found)


TINY = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
TRAINING: dict[str, Any] = {
    "model": {"source": "tiny", "tiny": TINY},
    "task": "arithmetic:terms=2,digits=1,ops=+",
    "format_weight": 0.1,
    "sft": {
        "examples": 40,
        "epochs": 12,
        "batch_size": 20,
        "check_every": 8,
        "check_prompts": 16,
        "format_threshold": 1.0,
        "optimizer": {"lr": 0.01},
    },
    "rl": {
        "group_size": 4,
        "prompts_per_step": 4,
        "micro_batch_size": 8,
        "max_response_tokens": 20,
        "max_resample": 1,
        "steps": 4,
        "save_every": 2,
        "optimizer": {"lr": 0.001, "weight_decay": 0.01},
    },
}


MEASUREMENT: dict[str, Any] = {
    "task": "arithmetic:terms=2,digits=2,ops=+",
    "update": {"num_prompts": 4, "group_size": 4},
    "probe": {"num_prompts": 16, "group_size": 1},
    "lrs": [1e-5],
    "stages": [*STAGES, "validation", "models", "curvature", "kinship", "frontier"],
    "validation": {"num_subsets": 6, "num_single": 12, "removals": ["zeroed", "recomputed"]},
    "criteria": {"diagonal_tokens": 16, "drop_shares": [0.2]},
    "models": {"folds": 3, "inducing": 4, "pairs": 20, "steps": 5, "signs": 1, "draws": 19},
    "frontier": {"levels": 2},
    "batch_size": 64,
}
"""Settings of a measurement of every stage that takes seconds, besides checkpoint and out."""


def training(*, rl: Mapping[str, Any] | None = None, **sections: Any) -> TrainConfig:
    """A training of seconds: ``rl`` changes settings of that section, ``sections`` replace whole ones."""
    return build_config(TrainConfig, TRAINING | {"rl": TRAINING["rl"] | (rl or {})} | sections)


def start_from(run: Path, out: Path) -> Path:
    """A new run folder that has the warm-up of ``run`` behind it."""
    shutil.copytree(run / "base", out / "base")
    return out
