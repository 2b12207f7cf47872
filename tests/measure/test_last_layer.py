"""The last layer's kernel and influence against autograd through the head's weight, token by token."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.criteria.leaderboard import RankingOptions, rank_criteria
from stepscope.measure.criteria.models import modelled_influence
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.kernel.last_layer import (
    entropy_influence,
    sequence_kernel,
    tied_parts,
    token_kernel,
)
from stepscope.measure.quantity.base import make_quantity
from stepscope.policy import last_layer as module
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.last_layer import UnknownHeadError, last_layer
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

VOCAB = cases.VOCAB


def policy_of(architecture: str, **shape: object) -> Policy:
    model = cases.model(architecture, vocab_size=VOCAB, **shape).double()
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    return Policy(model, None, StepSettings(temperature=0.7), cases.adamw_state(model))


def masked(batch: Rollouts) -> Rollouts:
    """The second token of each response is an environment's."""
    masks = tuple(np.arange(n) != 1 for n in batch.num_tokens)
    blank = {
        name: tuple(np.where(m, v, 0.0) for m, v in zip(masks, getattr(batch, name), strict=True))
        for name in ("logprobs", "entropies")
    }
    return replace(batch, response_masks=masks, **blank)


def head_gradients(policy: Policy, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """(tok, vocab, hidden) of log-probs and entropies in the head alone, by autograd; a bias as a column."""
    model = copy.deepcopy(policy.model)
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())  # no longer the embedding
    params = [p for p in (head.weight, head.bias) if p is not None]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    rows = zip(rollouts.prompt_token_ids, rollouts.response_token_ids, rollouts.written, strict=True)
    for prompt, response, mask in rows:
        out = forward(model, make_batch([prompt], [response]), temperature=rollouts.temperature)
        for own, values in zip(found, (out.logprobs[0], out.entropies[0]), strict=True):
            for k in np.flatnonzero(mask):
                parts = torch.autograd.grad(values[k], params, retain_graph=True)
                own.append(torch.cat([p.reshape(VOCAB, -1) for p in parts], 1))
    return torch.stack(found[0]), torch.stack(found[1])


@pytest.mark.parametrize(
    ("architecture", "chunk"), [("qwen2", 2**20), ("llama", 700), ("gpt2", 10_000), ("phi", 900)], ids=str
)
def test_kernels_and_influence_are_those_of_autograd(monkeypatch, architecture, chunk):
    """Tied, untied and with a bias; a temperature, tokens of an environment, the vocabulary in parts."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    policy = policy_of(architecture)
    batch = masked(cases.batch(policy, num_prompts=3, group_size=2))
    layer = last_layer(policy, batch, budget=Budget(max_sequences=4))
    assert layer.embeds == (architecture in ("qwen2", "gpt2"))
    assert (len(list(layer.slices())) > 1) == (chunk < 1000)
    logprobs, entropies = head_gradients(policy, batch)
    flat = logprobs.flatten(1)
    np.testing.assert_allclose(token_kernel(layer), flat @ flat.T, rtol=1e-9, atol=1e-12)
    owner, place = batch.places
    sums = torch.zeros(len(batch), len(owner), dtype=torch.float64)
    sums[owner, np.arange(len(owner))] = 1.0
    P, width = torch.rand(logprobs.shape[1:], dtype=torch.float64), layer.weight.shape[1]
    own = {layer.parameter: P[:, :width]}
    if architecture == "phi":
        own[layer.bias_parameter] = P[:, width]
    metrics = {"raw": None, "preconditioned": own, "elsewhere": {"other": P}}
    found = sequence_kernel(layer, batch, metrics)
    assert set(found) == {"raw", "preconditioned"}
    scaled = {"raw": flat, "preconditioned": (logprobs * P).flatten(1)}
    for name, K in found.items():
        np.testing.assert_allclose(K, sums @ scaled[name] @ flat.T @ sums.T, rtol=1e-9, atol=1e-12)

    weights = np.random.default_rng(0).normal(size=len(owner))
    pushed = entropy_influence(layer, batch, weights, metrics)
    prompt, entropy = batch.prompt_index[owner], batch.flat(batch.entropies)
    after = [
        sum(entropy[(owner == i) & (place > k)] - entropy.mean()) for i, k in zip(owner, place, strict=True)
    ]
    for t in range(len(owner)):
        others = prompt != prompt[t]
        for version in ("fixed_prefix", "on_policy"):
            slope = torch.zeros_like(P)
            for s in np.flatnonzero(others):
                slope += entropies[s]
                if version == "on_policy":
                    same = (prompt != prompt[s]) & (place == place[s])
                    base = np.mean(np.array(after)[same]) if same.any() else 0.0
                    slope += (after[s] - base) * logprobs[s]
            for name, own in (("raw", logprobs[t]), ("preconditioned", logprobs[t] * P)):
                expected = weights[t] * (own * slope).sum().item() / others.sum()
                assert pushed[name, version][t] == pytest.approx(expected, rel=1e-9, abs=1e-13)
    with pytest.raises(MeasurementError, match="one per token"):
        entropy_influence(layer, batch, weights[1:], metrics)


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_where_only_the_head_is_trained_it_is_the_whole_influence(architecture):
    """The measured influence of a prompt's tokens on the entropy of the other prompts, in both metrics."""
    model = cases.model(architecture, vocab_size=VOCAB).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    policy = Policy(model, None, StepSettings(group_size=3), cases.adamw_state(model))
    step = cases.step(policy, num_prompts=3, group_size=3)
    update = step.update
    found = modelled_influence(policy, step)
    owner, _ = update.places
    for g in range(3):
        others = update.select(np.flatnonzero(update.prompt_index != g))
        quantity = make_quantity("entropy", others, version="fixed_prefix")
        whole = influence(
            policy, step, update, others, quantity=quantity, options=InfluenceOptions(baseline="none")
        )
        own = update.prompt_index[owner] == g
        np.testing.assert_allclose(
            found["last_layer_p"][own], update.flat(whole.tokens)[own], rtol=1e-8, atol=1e-15
        )


def test_a_tied_matrix_has_a_second_part(tiny_policy):
    """Its three parts add up to the squared length of the parameter's gradient, by autograd."""
    batch = cases.batch(tiny_policy, num_prompts=2, group_size=2)
    layer = last_layer(tiny_policy, batch)
    parts = tied_parts(tiny_policy, batch, layer, budget=Budget(max_sequences=3))
    weight = tiny_policy.parameters[layer.parameter]
    for i, (p, r) in enumerate(zip(batch.prompt_token_ids, batch.response_token_ids, strict=True)):
        out = forward(tiny_policy.model, make_batch([p], [r]), temperature=batch.temperature)
        (whole,) = torch.autograd.grad(out.logprobs.sum(), [weight])
        assert sum(parts[n][i] for n in parts) == pytest.approx(whole.square().sum().item(), rel=1e-9)
    np.testing.assert_allclose(parts["head"], np.diag(sequence_kernel(layer, batch, {"r": None})["r"]))
    assert (parts["embedding"] > 0).all()
    untied = policy_of("llama")
    alone = tied_parts(untied, batch, last_layer(untied, batch))
    np.testing.assert_allclose(alone["embedding"], 0.0, atol=1e-20)


def test_heads_that_are_no_plain_product_are_refused(tiny_policy, caplog):
    capped = policy_of("gemma2", head_dim=8, final_logit_softcapping=2.0)
    batch = cases.batch(capped, num_prompts=2, group_size=2)
    with pytest.raises(UnknownHeadError, match=r"log-probs up to .* off the model's"):
        last_layer(capped, batch)
    step = cases.step(capped, num_prompts=2, group_size=2)
    assert modelled_influence(capped, step) == {}
    assert "left out" in caplog.text
    adapted = Policy(cases.adapted(tiny_policy.model, target_modules=["lm_head"]), None, StepSettings())
    with pytest.raises(UnknownHeadError, match=r"expected a plain nn\.Linear"):
        last_layer(adapted, cases.batch(adapted, num_prompts=2, group_size=2))
    with pytest.raises(MeasurementError, match="memory budget"):
        last_layer(capped, batch, budget=Budget(memory_bytes=100))


def test_models_stand_on_the_board(tiny_policy):
    step = cases.step(tiny_policy, num_prompts=3, group_size=3)
    probe = cases.batch(tiny_policy, num_prompts=4, group_size=2, seed=9)
    board = rank_criteria(tiny_policy, step, probe, options=RankingOptions(baseline="none", max_diagonal=4))
    truth = board.truth("column", "adamw", "fixed_prefix")
    row = board.row("last_layer_p", truth)
    assert row.kind == "model"
    assert row.gain_over_control is not None
    np.testing.assert_allclose(
        board.tokens().values["last_layer_p"], modelled_influence(tiny_policy, step)["last_layer_p"]
    )
    assert board.report().definitions["last_layer"].kind == "model"
