"""Advantages and losses against TRL's own code, run for real on a GRPOTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import cases
from stepscope.errors import BatchError, ConfigError, MeasurementError
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import advantages, policy_loss, token_weights
from stepscope.results import Rollouts

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]]
RESPONSES = [[10, 11, 12, 1], [13, 1], [14, 15, 16, 17, 18], [3, 4, 1]]
REWARDS = np.array([1.0, 0.25, 0.0, 2.0])


@pytest.fixture(scope="module")
def trainer(
    tmp_path_factory: pytest.TempPathFactory,
) -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        use_cpu=True,
        bf16=False,
        report_to=[],
        temperature=0.7,
        epsilon=0.1,
        epsilon_high=0.3,
    )
    made = GRPOTrainer(
        model=cases.model(),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        processing_class=cases.tokenizer(),
    )
    made.current_gradient_accumulation_steps = 1
    made.args.steps_per_generation = 1
    return made


def padded_inputs(shift: float) -> tuple[dict[str, torch.Tensor], Any]:
    """The batch as TRL wants it, and as forward.py makes it."""
    batch = make_batch(PROMPTS, RESPONSES)
    width = batch.input_ids.shape[1] - batch.response_ids.shape[1]
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "prompt_ids": batch.input_ids[:, :width],
        "prompt_mask": batch.attention_mask[:, :width],
        "completion_ids": batch.response_ids,
        "completion_mask": batch.response_mask.long(),
        "advantages": torch.tensor([0.5, -0.5, -1.0, 1.0]),
        "noise": shift * torch.randn(batch.response_ids.shape, generator=generator),
        "num_items_in_batch": batch.response_mask.sum(),
    }
    return inputs, batch


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("correction", [True, False])
def test_loss_and_its_gradient_equal_trls(
    trainer: GRPOTrainer, loss_type: str, beta: float, shift: float, correction: bool
) -> None:
    trainer.loss_type, trainer.beta = loss_type, beta
    trainer.args.use_bias_correction_kl = correction
    inputs, batch = padded_inputs(shift)
    settings = StepSettings(
        loss_type=loss_type,
        temperature=0.7,
        max_response_tokens=6,
        beta=beta,
        epsilon_low=0.1,
        epsilon_high=0.3,
        bias_correction_kl=correction,
    )
    model = trainer.model.train()
    with torch.no_grad():
        now = forward(model, batch, temperature=0.7).logprobs
    old, ref = now + inputs["noise"], now + 2 * inputs["noise"] + 0.1
    if shift:
        inputs["old_per_token_logps"] = old
    if beta:
        inputs["ref_per_token_logps"] = ref
    theirs = trainer._compute_loss(model, inputs)
    outputs = forward(model, batch, temperature=0.7)
    ours = policy_loss(
        outputs.logprobs,
        old if shift else outputs.logprobs.detach(),
        inputs["advantages"],
        batch.response_mask,
        settings,
        ref if beta else None,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    params = [p for p in model.parameters() if p.requires_grad]
    our_grads = torch.autograd.grad(ours, params)
    assert max(float(g.abs().max()) for g in our_grads) > 1e-3
    for a, b in zip(our_grads, torch.autograd.grad(theirs, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_advantages_equal_what_trl_computes_while_training(tmp_path: Path, scale: str) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Recording(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = super()._generate_and_score_completions(inputs)
            seen.append(found)
            return found

    rewards: list[list[float]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        rewards.append([0.1 * sum(ids) for ids in completion_ids])
        return rewards[-1]

    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        scale_rewards=scale,
        shuffle_dataset=False,
        disable_tqdm=True,
    )
    trainer = Recording(
        model=cases.model(),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        processing_class=cases.tokenizer(),
    )
    trainer.train()
    ours = advantages(np.array(rewards[0]), np.array([0] * 4 + [1] * 4), scale)
    theirs = seen[0]["advantages"].numpy()
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-4, atol=1e-5)
    assert np.ptp(ours) > 0


def test_groups_are_found_by_prompt_not_by_position() -> None:
    shuffled = advantages(np.array([1.0, 5.0, 3.0, 7.0]), np.array([0, 1, 0, 1]), "none")
    np.testing.assert_array_equal(shuffled, [-1, -1, 1, 1])


def test_equal_rewards_give_exactly_zero() -> None:
    values = np.full(7, 0.1)
    for scale in ("none", "group", "batch"):
        assert not advantages(values, np.zeros(7, dtype=np.int64), scale).any()


def test_non_finite_reward_and_unknown_scaling_are_refused() -> None:
    with pytest.raises(BatchError, match="sequence 1: reward is nan"):
        advantages(np.array([0.0, np.nan]), np.array([0, 0]), "none")
    with pytest.raises(ConfigError, match="scale_rewards"):
        advantages(np.array([0.0, 1.0]), np.array([0, 0]), "std")


def make_rollouts(rewards: np.ndarray = REWARDS, **changes: Any) -> Rollouts:
    rng = np.random.default_rng(0)
    known: dict[str, Any] = {
        "prompt_ids": ("a", "a", "b", "b"),
        "rewards": rewards,
        "truncated": np.array([False, False, True, False]),
        "logprobs": tuple(-rng.random(len(r)) for r in RESPONSES),
        "entropies": tuple(rng.random(len(r)) for r in RESPONSES),
        "max_response_tokens": 6,
        "advantages": advantages(rewards, np.array([0, 0, 1, 1]), "none"),
    }
    return cases.rollouts(PROMPTS, RESPONSES, **(known | changes))


def test_on_policy_weights_are_the_closed_form_of_each_loss() -> None:
    rollouts = make_rollouts()
    lengths, adv = rollouts.num_tokens, rollouts.advantages
    assert adv is not None
    expected = {
        "dr_grpo": adv / (4 * 6),
        "grpo": adv / (4 * lengths),
        "bnpo": adv / lengths.sum(),
        "dapo": adv / lengths.sum(),
    }
    for loss_type, per_token in expected.items():
        found = token_weights(rollouts, StepSettings(loss_type=loss_type, max_response_tokens=6))
        for i, weights in enumerate(found):
            np.testing.assert_allclose(weights, np.full(lengths[i], per_token[i]), rtol=1e-12)


def test_truncated_responses_leave_the_loss_on_request() -> None:
    rollouts = make_rollouts()
    kept = token_weights(rollouts, StepSettings(loss_type="dapo", mask_truncated=True))
    assert not kept[2].any()
    assert rollouts.advantages is not None
    np.testing.assert_allclose(kept[0], rollouts.advantages[0] / (4 + 2 + 3))


def test_clipped_tokens_have_no_weight_off_policy() -> None:
    rollouts = make_rollouts()
    now = [row + 1.0 for row in rollouts.logprobs]
    weights = token_weights(rollouts, StepSettings(max_response_tokens=6), logprobs=now)
    assert rollouts.advantages is not None
    for w, a in zip(weights, rollouts.advantages, strict=True):
        expected = 0.0 if a > 0 else a * np.e / 24
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_kl_penalty_pulls_towards_the_reference() -> None:
    rollouts = make_rollouts(np.zeros(4))
    ref = [row + 0.5 for row in rollouts.logprobs]
    for correction, pull in ((True, 0.5), (False, np.exp(0.5) - 1)):
        settings = StepSettings(beta=0.2, max_response_tokens=6, bias_correction_kl=correction)
        weights = token_weights(rollouts, settings, ref_logprobs=ref)
        np.testing.assert_allclose(weights[0], 0.2 * pull / 24, rtol=1e-12)
    with pytest.raises(ConfigError, match="pass ref_logprobs"):
        token_weights(rollouts, StepSettings(beta=0.2))


def test_batch_without_signal_is_refused_with_the_cure() -> None:
    with pytest.raises(BatchError, match=r"all 4 advantages are zero .* resample"):
        token_weights(make_rollouts(np.ones(4)), StepSettings())
    with pytest.raises(BatchError, match="no advantages"):
        token_weights(make_rollouts(advantages=None), StepSettings())


LOSSES = [
    ("cispo", "token", None, 5.0),
    ("cispo", "token", None, 0.3),
    ("luspo", "token", None, 0.3),
    ("luspo", "sequence", None, 0.3),
    ("sapo", "token", None, 0.3),
    ("sapo", "sequence", None, 0.3),
    ("vespo", "token", None, 0.3),
    ("grpo", "sequence", None, 0.3),
    ("grpo", "sequence", 1.5, 0.3),
    ("bnpo", "sequence", None, 0.3),
    ("dr_grpo", "sequence", None, 0.3),
    ("dapo", "sequence", None, 0.3),
    ("dapo", "token", 1.5, 0.3),
]


@pytest.mark.parametrize(("loss_type", "level", "delta", "epsilon_high"), LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_token_weights_on_policy_are_the_derivatives_of_trls_loss(
    trainer: GRPOTrainer, loss_type: str, level: str, delta: float | None, epsilon_high: float, beta: float
) -> None:
    """TRL's own ``_compute_loss`` on log-probs that are leaves: its derivative by each, against ours."""
    trainer.loss_type, trainer.beta, trainer.importance_sampling_level = loss_type, beta, level
    before = trainer.epsilon_high
    trainer.epsilon_high, trainer.args.delta = epsilon_high, delta
    trainer.args.use_bias_correction_kl = level == "token"
    inputs, batch = padded_inputs(0.0)
    generator = torch.Generator().manual_seed(4)
    leaves = -torch.rand(batch.response_ids.shape, generator=generator, dtype=torch.float64) - 0.1
    leaves.requires_grad_(True)
    if beta:
        inputs["ref_per_token_logps"] = leaves.detach() + 0.2
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaves, torch.ones_like(leaves), None)
    try:
        theirs = trainer._compute_loss(trainer.model.train(), inputs)
    finally:
        del trainer._get_per_token_logps_and_entropies
        trainer.importance_sampling_level, trainer.args.delta, trainer.epsilon_high = "token", None, before
    (expected,) = torch.autograd.grad(theirs, leaves)
    settings = StepSettings(
        loss_type=loss_type,
        max_response_tokens=6,
        beta=beta,
        epsilon_low=0.1,
        epsilon_high=epsilon_high,
        bias_correction_kl=level == "token",
        on_policy_only=level == "sequence" or delta is not None,
    )
    ours = leaves.detach().requires_grad_(True)
    ref = inputs.get("ref_per_token_logps")
    loss = policy_loss(ours, leaves.detach(), inputs["advantages"], batch.response_mask, settings, ref)
    (found,) = torch.autograd.grad(loss, ours)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_cispo_and_luspo_equal_trls_off_policy_too(trainer: GRPOTrainer, shift: float) -> None:
    inputs, batch = padded_inputs(shift)
    leaves = -torch.rand(batch.response_ids.shape, generator=torch.Generator().manual_seed(4)) - 0.1
    leaves.requires_grad_(True)
    inputs["old_per_token_logps"] = old = leaves.detach() + inputs["noise"]
    for loss_type in ("cispo", "luspo"):
        trainer.loss_type, trainer.beta = loss_type, 0.0
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaves, torch.ones_like(leaves), None)
        try:
            (expected,) = torch.autograd.grad(trainer._compute_loss(trainer.model.train(), inputs), leaves)
        finally:
            del trainer._get_per_token_logps_and_entropies
        settings = StepSettings(loss_type=loss_type, epsilon_low=0.1, epsilon_high=0.3)
        loss = policy_loss(leaves, old, inputs["advantages"], batch.response_mask, settings)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves)[0], expected, rtol=1e-5, atol=1e-7)


def test_losses_known_on_policy_are_refused_off_policy() -> None:
    rollouts = make_rollouts()
    now = [row + 1.0 for row in rollouts.logprobs]
    for settings in (StepSettings(loss_type="sapo"), StepSettings(loss_type="grpo", on_policy_only=True)):
        token_weights(rollouts, settings)
        with pytest.raises(MeasurementError, match="known on policy only"):
            token_weights(rollouts, settings, logprobs=now)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="'reinforce'"):
        token_weights(make_rollouts(), StepSettings(loss_type="reinforce"))
