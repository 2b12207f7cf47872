"""Every loss of TRL against TRL's own ``_compute_loss``, run on a real trainer with log-probs as leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import cases
from stepscope.errors import ConfigError
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.loss.batch import Further
from stepscope.policy.loss.registry import LOSSES
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import entropy_weights, policy_loss, token_weights
from stepscope.rules import EntropyBonus

SHAPE = (6, 7)
LENGTH = 9


def make_trainer(folder: Path, kind: Any = GRPOTrainer, config: Any = GRPOConfig, **changes: Any) -> Any:
    arguments = {
        "per_device_train_batch_size": 6,
        "num_generations": 2,
        "max_completion_length": LENGTH,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "temperature": 0.7,
        "epsilon": 0.1,
        "epsilon_high": 0.3,
    }
    made = kind(
        model=cases.model(),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=config(output_dir=str(folder), **(arguments | changes)),
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        processing_class=cases.tokenizer(),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    made: GRPOTrainer = make_trainer(tmp_path_factory.mktemp("grpo"))
    return made


@contextmanager
def as_settings_say(trainer: Any, settings: StepSettings, **changes: Any) -> Iterator[None]:
    """TRL's trainer with the loss of some settings."""
    attributes: dict[str, Any] = {"loss_type": settings.loss_type, "beta": settings.beta, **changes}
    arguments: dict[str, Any] = {"use_bias_correction_kl": settings.bias_correction_kl}
    for name, value in settings.loss_parameters.items():
        kept = hasattr(trainer, name)
        (attributes if kept else arguments)[name] = value
    before = [
        (o, n, getattr(o, n))
        for o, names in ((trainer, attributes), (trainer.args, arguments))
        for n in names
    ]
    for o, values in ((trainer, attributes), (trainer.args, arguments)):
        for name, value in values.items():
            setattr(o, name, value)
    try:
        yield
    finally:
        for o, name, value in before:
            setattr(o, name, value)


def random_batch(seed: int, drift: float) -> dict[str, Any]:
    """Random log-probs in float64, with ties, tokens of tools, a truncated response and tokens at r = 1."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, SHAPE[1] + 1, SHAPE[0])
    inside = np.arange(SHAPE[1]) < lengths[:, None]
    completion = inside.copy()
    completion[rng.integers(SHAPE[0])] = False
    tools = rng.random(SHAPE) < 0.2
    now = -rng.exponential(1.0, SHAPE)
    old = now - drift * rng.standard_normal(SHAPE) * (rng.random(SHAPE) < 0.8)
    advantages = rng.standard_normal(SHAPE[0])
    advantages[1], advantages[2] = advantages[0], 0.0
    numbers = {
        "now": now,
        "old": np.minimum(old, 0.0),
        "ref": np.minimum(now + 0.5 * rng.standard_normal(SHAPE), 0.0),
        "sampler": np.where(
            rng.random(SHAPE) < 0.1, np.nan, np.minimum(old + 0.3 * rng.standard_normal(SHAPE), 0.0)
        ),
        "advantages": advantages,
        "entropies": rng.random(SHAPE),
    }
    masks = {"completion": completion, "tool": ~tools}
    return {name: torch.from_numpy(a) for name, a in (numbers | masks).items()}


def trl_gradient(trainer: Any, batch: Mapping[str, Tensor], **changes: Any) -> Tensor:
    """d Loss/d l of every token by TRL's own code."""
    leaves = batch["now"].clone().requires_grad_(True)
    count = len(leaves)
    inputs = {
        "prompt_ids": torch.full((count, 1), 5),
        "prompt_mask": torch.ones(count, 1, dtype=torch.long),
        "completion_ids": torch.full(leaves.shape, 6),
        "completion_mask": batch["completion"].long(),
        "tool_mask": batch["tool"].long(),
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["ref"],
        "num_items_in_batch": (batch["completion"] & batch["tool"]).sum(),
        **changes,
    }
    found = (leaves, batch["entropies"], None)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: found
    try:
        (gradient,) = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), leaves)
    finally:
        del trainer._get_per_token_logps_and_entropies
    return gradient


def our_gradient(batch: Mapping[str, Tensor], settings: StepSettings, **changes: Any) -> Tensor:
    leaves = batch["now"].clone().requires_grad_(True)
    mask = batch["completion"] & batch["tool"]
    given = batch["old"], batch["advantages"], mask, settings, batch["ref"]
    loss = policy_loss(leaves, *given, Further(**changes))
    (gradient,) = torch.autograd.grad(loss, leaves)
    return gradient


def make_settings(loss_type: str, *, beta: float = 0.0, **parameters: Any) -> StepSettings:
    return StepSettings(
        loss_type=loss_type,
        max_response_tokens=LENGTH,
        beta=beta,
        epsilon_low=0.1,
        epsilon_high=5.0 if loss_type == "cispo" else 0.3,
        loss_parameters=parameters,
    )


TRLS = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo", "sapo", "vespo")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TRLS),
    *((name, {"importance_sampling_level": "sequence"}) for name in TRLS),
    *((name, {"off_policy_mask_threshold": 0.05}) for name in TRLS),
    ("grpo", {"delta": 1.2}),
    ("luspo", {"delta": 0.9, "importance_sampling_level": "sequence"}),
    ("sapo", {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7}),
    ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.5}),
]


@pytest.mark.parametrize(("loss_type", "parameters"), VARIANTS)
@pytest.mark.parametrize("drift", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_by_each_log_prob_is_trls(
    trainer: GRPOTrainer, loss_type: str, parameters: dict[str, Any], drift: float, beta: float
) -> None:
    settings = make_settings(loss_type, beta=beta, **parameters)
    for seed in range(3):
        batch = random_batch(seed, drift)
        with as_settings_say(trainer, settings, epsilon_high=settings.epsilon_high):
            expected = trl_gradient(trainer, batch)
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(our_gradient(batch, settings), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss_type", TRLS)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_samplers_log_probs_correct_as_in_trl(trainer: GRPOTrainer, loss_type: str, mode: str) -> None:
    """The ratio as ``_generate_and_score_completions`` makes it (TRL 1.16, from "Compute the importance")."""
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL refuses it")
    parameters = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.3,
        "vllm_importance_sampling_clip_min": 0.8,
        "off_policy_mask_threshold": 0.02,
    }
    settings = make_settings(loss_type, **parameters)
    batch = random_batch(5, 0.3)
    gap = torch.nan_to_num((batch["old"] - batch["sampler"]) * (batch["completion"] & batch["tool"]), nan=0.0)
    ratio = torch.exp(gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap)
    if mode.endswith("truncate"):
        ratio = torch.clamp(ratio, min=0.8, max=1.3)
    else:
        ratio = ratio.masked_fill((ratio < 0.8) | (ratio > 1.3), value=0.0)
    with as_settings_say(
        trainer,
        settings,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        epsilon_high=settings.epsilon_high,
    ):
        expected = trl_gradient(
            trainer, batch, importance_sampling_ratio=ratio, sampling_per_token_logps=batch["sampler"]
        )
    found = our_gradient(batch, settings, sampler_logprobs=batch["sampler"])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(found, our_gradient(batch, settings))


@pytest.mark.parametrize("loss_type", TRLS)
def test_a_batch_in_pieces_has_the_gradient_that_trl_accumulates(
    trainer: GRPOTrainer, loss_type: str
) -> None:
    settings = make_settings(loss_type, beta=0.1)
    batch = random_batch(2, 0.4)
    pieces = [torch.tensor([4, 0, 5]), torch.tensor([1, 3, 2])]
    tokens = (batch["completion"] & batch["tool"]).sum()
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    steps = trainer.args.steps_per_generation
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = len(pieces)
    try:
        with as_settings_say(trainer, settings, epsilon_high=settings.epsilon_high):
            for rows in pieces:
                part = {name: values[rows] for name, values in batch.items()}
                expected[rows] = trl_gradient(trainer, part, num_items_in_batch=tokens)
    finally:
        trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 1, steps
    torch.testing.assert_close(our_gradient(batch, settings, pieces=pieces), expected, rtol=1e-12, atol=1e-15)
    whole = our_gradient(batch, settings)
    assert torch.allclose(whole, expected) == (loss_type != "bnpo")


def test_the_top_entropy_tokens_are_trls_under_every_ratio(trainer: GRPOTrainer) -> None:
    """The quantile leaves advantages of 0, which is TRL's mask, sequence ratios and KL included."""
    batch = random_batch(3, 0.3)
    for level in ("token", "sequence"):
        settings = make_settings("dapo", beta=0.2, importance_sampling_level=level)
        with as_settings_say(trainer, settings, top_entropy_quantile=0.4):
            expected = trl_gradient(trainer, batch)
        mask = batch["completion"] & batch["tool"]
        kept = batch["entropies"].float() >= torch.quantile(batch["entropies"][mask].float(), 0.6)
        shaped = batch | {"advantages": batch["advantages"].unsqueeze(1) * kept}
        torch.testing.assert_close(our_gradient(shaped, settings), expected, rtol=1e-12, atol=1e-15)


def test_rloo_is_trls(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, RLOOTrainer, RLOOConfig, beta=0.0)
    settings = make_settings("rloo")
    for seed, drift in ((0, 0.0), (1, 0.02), (2, 0.3)):
        batch = random_batch(seed, drift)
        batch["tool"] = torch.ones_like(batch["tool"])
        old = (batch["old"] * batch["completion"]).sum(1)
        expected = trl_gradient(made, batch, old_logps=old)
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(our_gradient(batch, settings), expected, rtol=1e-12, atol=1e-15)


def test_the_whole_loss_of_a_model_is_trls(trainer: GRPOTrainer) -> None:
    """Loss and gradient by the parameters, through TRL's own forward pass and ours."""
    tokens = make_batch(
        [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]], [[10, 11, 12, 1], [13, 1], [14, 15, 16], [3, 4, 1]]
    )
    width = tokens.input_ids.shape[1] - tokens.response_ids.shape[1]
    model = trainer.model
    with torch.no_grad():
        now = forward(model, tokens, temperature=0.7).logprobs
    noise = 0.5 * torch.randn(now.shape, generator=torch.Generator().manual_seed(3))
    inputs = {
        "prompt_ids": tokens.input_ids[:, :width],
        "prompt_mask": tokens.attention_mask[:, :width],
        "completion_ids": tokens.response_ids,
        "completion_mask": tokens.response_mask.long(),
        "advantages": torch.tensor([0.5, -0.5, -1.0, 1.0]),
        "old_per_token_logps": now + noise,
        "ref_per_token_logps": now + 2 * noise + 0.1,
        "num_items_in_batch": tokens.response_mask.sum(),
    }
    settings = make_settings("grpo", beta=0.3)
    with as_settings_say(trainer, settings):
        theirs = trainer._compute_loss(model, inputs)
    ours = policy_loss(
        forward(model, tokens, temperature=0.7).logprobs,
        inputs["old_per_token_logps"],
        inputs["advantages"],
        tokens.response_mask,
        settings,
        inputs["ref_per_token_logps"],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    params = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_parameters_of_a_loss_are_checked() -> None:
    assert set(TRLS) < set(LOSSES)
    batch = random_batch(0, 0.1)
    for parameters, message in (
        ({"deltas": 1.0}, r"loss_parameters\.deltas of grpo: .*it has importance_sampling_level"),
        ({"delta": "two"}, r"loss_parameters\.delta of grpo: .*got 'two'"),
        ({"delta": math.nan}, r"loss_parameters\.delta of grpo"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level of grpo"),
    ):
        with pytest.raises(ConfigError, match=message):
            our_gradient(batch, make_settings("grpo", **parameters))


def test_token_weights_cut_a_batch_in_random_order_like_the_run() -> None:
    """bnpo and an entropy bonus over micro-batches of 2 in a run of 4 sequences a step."""
    policy = cases.policy(
        loss_type="bnpo",
        micro_batch_size=2,
        objective=EntropyBonus(coefficient=0.1, scope=2),
    )
    update = cases.batch(policy, num_prompts=2, group_size=2)
    weights = token_weights(update, policy.settings, step=3)
    bonus = entropy_weights(update, policy.settings, step=3)
    order = np.random.default_rng([0, 3, 1]).permutation(4)
    lengths = update.num_tokens
    assert update.advantages is not None
    for rows in (order[:2], order[2:]):
        for i in rows:
            expected = update.advantages[i] / lengths[rows].sum() / 2
            np.testing.assert_allclose(weights[i], np.full(lengths[i], expected), rtol=1e-12)
            np.testing.assert_allclose(
                bonus[i], np.full(lengths[i], 0.1 / lengths[rows].sum() / 2), rtol=1e-12
            )
