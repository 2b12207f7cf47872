"""Losses of preferences against TRL's own trainers, with log-probs as leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer

import cases
from stepscope.errors import BatchError, ConfigError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy import vectors
from stepscope.policy.forward import make_batch
from stepscope.policy.loss.batch import Further
from stepscope.policy.loss.preference import DPO_LOSSES
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import policy_loss, token_weights
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

PAIRS, WIDTH = 4, 6


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    made = DPOTrainer(
        model=cases.model(),
        ref_model=cases.model(),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("dpo")),
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+1="], "chosen": ["2"], "rejected": ["3"]}),
        processing_class=cases.tokenizer(),
    )
    made.model.train()
    return made


def random_pairs(seed: int) -> dict[str, Tensor]:
    """(2 x pairs, tok) log-probs of chosen responses and then of rejected ones, a tie among the margins."""
    rng = np.random.default_rng(seed)
    mask = np.arange(WIDTH) < rng.integers(1, WIDTH + 1, 2 * PAIRS)[:, None]
    now = -rng.exponential(1.0, mask.shape) * mask
    ref = np.minimum(now + 0.7 * rng.standard_normal(mask.shape), 0.0) * mask
    ref[0], ref[PAIRS] = now[0], now[PAIRS]
    return {"now": torch.from_numpy(now), "ref": torch.from_numpy(ref), "mask": torch.from_numpy(mask)}


def dpo_gradient(trainer: DPOTrainer, batch: dict[str, Tensor], ld_alpha: float | None) -> Tensor:
    leaves = batch["now"].clone().requires_grad_(True)
    zero = torch.zeros_like(leaves)

    def model(**kwargs: Any) -> SimpleNamespace:
        values = leaves * batch["mask"] if "model" not in kwargs else zero
        return SimpleNamespace(
            log_probs=values, entropy=zero, mean_logits=zero, is_top1=zero.bool(), log_sum_sq_probs=zero
        )

    def reference(**kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(log_probs=batch["ref"] * batch["mask"])

    mask = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.long), batch["mask"].long()], dim=1)
    inputs = {
        "input_ids": torch.full_like(mask, 5),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    kept, trainer.ref_model = trainer.ref_model, reference
    try:
        loss = trainer._compute_loss(model, inputs, return_outputs=False)
    finally:
        trainer.ref_model = kept
    return torch.autograd.grad(loss, leaves)[0]


def our_gradient(batch: dict[str, Tensor], settings: StepSettings) -> Tensor:
    """The pairs come shuffled: rewards and prompts say who is who."""
    order = torch.from_numpy(np.random.default_rng(1).permutation(2 * PAIRS))
    leaves = batch["now"].clone().requires_grad_(True)
    loss = policy_loss(
        leaves[order],
        leaves.detach()[order],
        torch.zeros(2 * PAIRS, dtype=torch.float64),
        batch["mask"][order],
        settings,
        batch["ref"][order],
        Further(
            rewards=torch.tensor([1.0] * PAIRS + [0.0] * PAIRS)[order],
            group=torch.arange(2 * PAIRS)[order] % PAIRS,
        ),
    )
    return torch.autograd.grad(loss, leaves)[0]


CASES: list[dict[str, Any]] = [
    *({"dpo_loss_type": (name,), "label_smoothing": 0.1} for name in DPO_LOSSES),
    *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence")),
    {"dpo_loss_type": ("sigmoid", "sft"), "loss_weights": (0.7, 0.2)},
    {"dpo_loss_type": ("hinge", "bco_pair", "sft")},
    *({"ld_alpha": 0.3, "dpo_loss_type": (name,)} for name in ("sigmoid", "ipo", "aot")),
    {"dpo_loss_type": ("discopop",), "discopop_tau": 0.5},
]


@pytest.mark.parametrize("parameters", CASES)
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_the_gradient_by_each_log_prob_is_trls(
    trainer: DPOTrainer, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], beta: float
) -> None:
    names = parameters.get("dpo_loss_type", ("sigmoid",))
    monkeypatch.setattr(trainer, "loss_types", list(names))
    monkeypatch.setattr(trainer, "loss_weights", list(parameters.get("loss_weights", (1.0,) * len(names))))
    for name in ("label_smoothing", "f_divergence_type", "ld_alpha"):
        default = {"label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "ld_alpha": None}[name]
        monkeypatch.setattr(trainer, name, parameters.get(name, default))
    monkeypatch.setattr(trainer, "beta", beta)
    monkeypatch.setattr(trainer.args, "discopop_tau", parameters.get("discopop_tau", 0.05))
    settings = StepSettings(loss_type="dpo", beta=beta, loss_parameters=parameters)
    for seed in range(3):
        batch = random_pairs(seed)
        expected = dpo_gradient(trainer, batch, parameters.get("ld_alpha"))
        assert float(expected.abs().max()) > 1e-4
        rounded = "exo_pair" in names  # TRL keeps its label smoothing in float32
        torch.testing.assert_close(
            our_gradient(batch, settings),
            expected,
            rtol=1e-6 if rounded else 1e-12,
            atol=1e-9 if rounded else 1e-15,
        )


def test_the_alpha_divergence_is_trls_in_float32(
    trainer: DPOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL has it for the types of trainings alone."""
    monkeypatch.setattr(trainer, "f_divergence_type", "alpha_divergence")
    monkeypatch.setattr(trainer, "f_alpha_divergence_coef", 0.4)
    batch = random_pairs(3)
    narrow = {name: v.float() if v.is_floating_point() else v for name, v in batch.items()}
    parameters = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4}
    settings = StepSettings(loss_type="dpo", beta=trainer.beta, loss_parameters=parameters)
    torch.testing.assert_close(
        our_gradient(batch, settings).float(), dpo_gradient(trainer, narrow, None), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "simpo"])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_cpo_and_simpo_are_trls(kind: str, alpha: float) -> None:
    """``cpo_loss`` on the sums (means for ipo and simpo) that ``get_batch_logps`` makes, and the mean NLL."""
    batch = random_pairs(0)
    leaves = batch["now"].clone().requires_grad_(True)
    weight = batch["mask"].double()
    sums = (leaves * weight).sum(-1)
    totals = sums / weight.sum(-1) if kind in ("ipo", "simpo") else sums
    own = {"loss_type": kind, "alpha": alpha, "beta": 0.5, "simpo_gamma": 0.3, "label_smoothing": 0.1}
    this: Any = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **own)
    losses, _, _ = CPOTrainer.cpo_loss(this, totals[:PAIRS], totals[PAIRS:])
    chosen = weight[:PAIRS]
    loss = losses.mean() - 0.7 * (leaves[:PAIRS] * chosen).sum() / chosen.sum()
    (expected,) = torch.autograd.grad(loss, leaves)
    parameters = {
        "cpo_loss_type": kind,
        "alpha": alpha,
        "simpo_gamma": 0.3,
        "label_smoothing": 0.1,
        "cpo_alpha": 0.7,
    }
    settings = StepSettings(loss_type="cpo", beta=0.5, loss_parameters=parameters)
    torch.testing.assert_close(our_gradient(batch, settings), expected, rtol=1e-12, atol=1e-15)


def pairs_of(policy: Policy) -> Rollouts:
    """A batch of two responses to each prompt, the first the chosen one."""
    update = cases.batch(policy, num_prompts=3, group_size=2)
    return replace(update, rewards=np.tile([1.0, 0.0], 3), advantages=np.tile([0.5, -0.5], 3))


def test_the_step_of_a_model_is_that_of_trls_loss(
    trainer: DPOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient by the parameters: TRL's own forward pass and loss, against the step as it is rebuilt."""
    policy = replace(cases.policy(loss_type="dpo", beta=0.2, max_grad_norm=0.0, temperature=1.0), path=None)
    reference = replace(policy, model=cases.policy(seed=1).model)
    update = pairs_of(policy)
    step = reconstruct_step(policy, update, reference=reference)
    order = [0, 2, 4, 1, 3, 5]
    tokens = make_batch(
        [update.prompt_token_ids[i] for i in order], [update.response_token_ids[i] for i in order]
    )
    width = tokens.input_ids.shape[1] - tokens.response_ids.shape[1]
    mask = torch.zeros_like(tokens.input_ids)
    mask[:, width:] = tokens.response_mask.long()
    refs = [row.sum() for row in score_rollouts(reference, update)[0]]
    inputs = {
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor([refs[i] for i in order[:3]]),
        "ref_rejected_logps": torch.tensor([refs[i] for i in order[3:]]),
    }
    for name, value in (("loss_types", ["sigmoid"]), ("loss_weights", [1.0]), ("beta", 0.2)):
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer, "precompute_ref_logps", True)

    def model(**kwargs: Any) -> SimpleNamespace:
        ids = kwargs["input_ids"]
        positions = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = policy.model(
            input_ids=ids, attention_mask=kwargs["attention_mask"], position_ids=positions
        ).logits
        found = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
        zero = torch.zeros_like(found)
        return SimpleNamespace(
            log_probs=found * mask[:, 1:],
            entropy=zero,
            mean_logits=zero,
            is_top1=zero.bool(),
            log_sum_sq_probs=zero,
        )

    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    theirs = dict(
        zip(policy.parameters, torch.autograd.grad(loss, list(policy.parameters.values())), strict=True)
    )
    difference = vectors.add(step.ascent, theirs)
    assert vectors.norm(difference) <= 2e-6 * vectors.norm(theirs)  # norms inside the model are in float32


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], "has 2 responses with rewards 1, 1, expected two, the chosen"),
        ([1.0] * 6, "rewards 1, 1"),
    ],
)
def test_a_batch_without_pairs_is_refused(rewards: list[float], message: str) -> None:
    policy = cases.policy()
    update = replace(pairs_of(policy), rewards=np.array(rewards))
    settings = StepSettings(loss_type="cpo", beta=0.1)
    with pytest.raises(BatchError, match=message):
        token_weights(update, settings)
    with pytest.raises(BatchError, match="has 3 responses"):
        token_weights(cases.batch(policy), settings)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dpo_loss_type": ("exo_pair",)}, "exo_pair needs a label_smoothing above 0"),
        ({"dpo_loss_type": ("robust",), "label_smoothing": 0.6}, "robust needs a label_smoothing below 0.5"),
        ({"dpo_loss_type": ("kto",)}, "dpo_loss_type"),
        ({"loss_weights": (1.0, 2.0)}, "as many as dpo_loss_type"),
    ],
)
def test_parameters_that_trl_refuses_are_refused(parameters: dict[str, Any], message: str) -> None:
    update = pairs_of(cases.policy())
    with pytest.raises(ConfigError, match=message):
        token_weights(update, StepSettings(loss_type="dpo", beta=0.1, loss_parameters=parameters))
    with pytest.raises(ConfigError, match="needs beta above 0 and a reference policy"):
        token_weights(update, StepSettings(loss_type="dpo"))


def test_parameters_come_back_from_a_file(tmp_path: Path) -> None:
    parameters = {"dpo_loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    settings = StepSettings(loss_type="dpo", beta=0.1, loss_parameters=parameters)
    settings.save(tmp_path)
    assert StepSettings.load(tmp_path) == settings
    update = pairs_of(cases.policy())
    weights = token_weights(update, settings, ref_logprobs=update.logprobs)
    assert all((row > 0).all() for row in weights[::2])
