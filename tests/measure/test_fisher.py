"""The Fisher kernel against explicit gradients, its structure against constructed matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import BatchError, MeasurementError
from stepscope.measure.change.logprob_change import predict_logprobs
from stepscope.measure.kernel.fisher import fisher_kernel, split_tokens
from stepscope.measure.kernel.structure import (
    cosine_form,
    effective_rank,
    kernel_structure,
    shared_prefix_length,
    token_signs,
)
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.gradients.derivatives import directional_derivative, response_logprob
from stepscope.policy.gradients.projection import Sketch
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted
from stepscope.results import FloatArray, Rollouts, read_arrays, write_arrays
from stepscope.results.kernel import KernelReport

VOCAB = 12


def token_jacobian(policy: Policy, rollouts: Rollouts) -> FloatArray:
    """(token, params): gradient of every single log-prob, in order."""
    params = list(policy.parameters.values())
    rows = []
    for i in range(len(rollouts)):
        single = make_batch([rollouts.prompt_token_ids[i]], [rollouts.response_token_ids[i]])
        logprobs = forward(policy.model, single, temperature=rollouts.temperature).logprobs[0]
        for l_k in logprobs:
            grads = torch.autograd.grad(l_k, params, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).numpy()


def test_kernels_equal_explicit_gradients(tiny_policy: Policy) -> None:
    update, probe = (
        cases.batch(tiny_policy, num_prompts=3, group_size=3, seed=1),
        cases.batch(tiny_policy, num_prompts=4, group_size=1, seed=2),
    )
    P = reconstruct_step(tiny_policy, update).preconditioner
    p = torch.cat([P[n].reshape(-1) for n in tiny_policy.parameters]).numpy()
    T, H = token_jacobian(tiny_policy, update), token_jacobian(tiny_policy, probe)
    S = np.add.reduceat(T, np.append(0, np.cumsum(update.num_tokens)[:-1]))
    E = np.add.reduceat(H, np.append(0, np.cumsum(probe.num_tokens)[:-1]))
    weights = [np.random.default_rng(i).standard_normal(n) for i, n in enumerate(update.num_tokens)]
    kernel = fisher_kernel(
        tiny_policy,
        update,
        probe,
        preconditioner=P,
        token_weights=weights,
        tokens=True,
        budget=Budget(max_sequences=4),
    )
    starts = np.append(0, np.cumsum(update.num_tokens)[:-1])
    signs, w = np.concatenate(token_signs(update)), np.concatenate(weights)
    for factor, found in (
        (signs, kernel.null["preconditioned"]),
        (w, kernel.update["contributions"]),
        (w * signs, kernel.null["contributions"]),
    ):
        c = np.add.reduceat(T * factor[:, None], starts)
        np.testing.assert_allclose(found, (c * p) @ c.T, atol=1e-9 * abs((c * p) @ c.T).max())
    for metric, weights in (("raw", np.ones_like(p)), ("preconditioned", p)):
        K, C = (S * weights) @ S.T, (E * weights) @ S.T
        np.testing.assert_allclose(kernel.update[metric], K, rtol=1e-9, atol=1e-9 * abs(K).max())
        np.testing.assert_allclose(kernel.probe[metric], C, rtol=1e-9, atol=1e-9 * abs(C).max())
        expected = C / np.sqrt(np.outer((E * weights * E).sum(1), np.diag(K)))
        np.testing.assert_allclose(kernel.probe_cosine(metric), expected, atol=1e-9)
        assert np.diag(kernel.cosine(metric)) == pytest.approx(1.0)
        by_token = (T * weights) @ T.T
        np.testing.assert_allclose(kernel.tokens[metric], by_token, atol=1e-9 * abs(by_token).max())
    np.testing.assert_array_equal(
        kernel.token_index[:, 0], np.repeat(np.arange(len(update)), update.num_tokens)
    )


def test_contributions_add_up_to_the_step(tiny_policy: Policy) -> None:
    """All entries: |sum_i c_i|^2 in the metric P, the first-order decrease of the loss."""
    step = cases.step(tiny_policy, num_prompts=3, group_size=3, seed=1)
    kernel = fisher_kernel(
        tiny_policy, step.update, preconditioner=step.preconditioner, token_weights=step.token_weights
    )
    total = float(sum((step.ascent[n] * step.components["sequences"][n]).sum() for n in step.ascent))
    assert kernel.update["contributions"].sum() == pytest.approx(total, rel=1e-9)
    assert list(kernel.metrics) == ["contributions", "raw", "preconditioned"]


def test_preconditioner_enters_once(tiny_policy: Policy) -> None:
    """K_P(i, j) is the change of S_i under an Adam-scaled step on S_j: P once, not P^2."""
    update = cases.batch(tiny_policy, num_prompts=2, group_size=2, seed=1)
    P = reconstruct_step(tiny_policy, update).preconditioner
    kernel = fisher_kernel(tiny_policy, update, preconditioner=P).update["preconditioned"]
    lr = 1e-8
    batch = make_batch([update.prompt_token_ids[1]], [update.response_token_ids[1]])
    params = tiny_policy.parameters
    value = forward(tiny_policy.model, batch, temperature=update.temperature).logprobs.sum()
    grads = torch.autograd.grad(value, list(params.values()))
    step = {n: P[n] * g for n, g in zip(params, grads, strict=True)}
    change = []
    for sign in (1, -1):
        with shifted(params, step, sign * lr):
            change.append([float(v.sum()) for v in score_rollouts(tiny_policy, update)[0]])
    slope = (np.array(change[0]) - np.array(change[1])) / (2 * lr)
    np.testing.assert_allclose(kernel[:, 1], slope, rtol=1e-5)


@pytest.mark.parametrize("padding", [0, 3], ids=["padding unused", "padding sampled"])
def test_predicted_logprob_change(tiny_policy: Policy, padding: int) -> None:
    tiny_policy.model.get_input_embeddings().padding_idx = padding
    update, texts = (
        cases.batch(tiny_policy, num_prompts=3, group_size=3, seed=1),
        cases.batch(tiny_policy, num_prompts=4, group_size=1, seed=5),
    )
    step = reconstruct_step(tiny_policy, update)
    found = predict_logprobs(tiny_policy, step, texts)
    along = directional_derivative(tiny_policy, texts, response_logprob, step.direction, as_trained=False)
    np.testing.assert_allclose(found.total, [float(d.sum()) for d in along], rtol=1e-9)
    parts = found.sequences.sum(1) + sum(found.components.values())
    np.testing.assert_allclose(parts, found.total, rtol=1e-8)
    assert found.sequences.shape == (4, 9)


def test_projection_states_its_error() -> None:
    policy = cases.policy(dtype=torch.float32)
    update, probe = (
        cases.batch(policy, num_prompts=6, group_size=4, seed=1),
        cases.batch(policy, num_prompts=5, group_size=1, seed=2),
    )
    P = reconstruct_step(policy, update).preconditioner
    exact = fisher_kernel(policy, update, probe, preconditioner=P)
    found = {
        dim: fisher_kernel(policy, update, probe, preconditioner=P, sketch=Sketch(dim, 1))
        for dim in (64, 1024)
    }
    for dim, kernel in found.items():
        assert kernel.projection_error is not None
        for metric in ("raw", "preconditioned"):
            off = ~np.eye(len(update), dtype=bool)
            miss = (kernel.cosine(metric) - exact.cosine(metric))[off]
            assert float(np.sqrt((miss**2).mean())) < 1.5 * dim**-0.5
            assert np.abs(kernel.probe_cosine(metric) - exact.probe_cosine(metric)).max() < 5 * dim**-0.5
        assert 0.3 * dim**-0.5 < kernel.projection_error.value < 1.5 * dim**-0.5
    assert exact.projection_error is None


def test_sketches_are_unbiased_and_the_same_for_any_batch_size(tiny_policy: Policy) -> None:
    update = cases.batch(tiny_policy, num_prompts=2, group_size=2, seed=1)
    exact = fisher_kernel(tiny_policy, update).update["raw"]
    draws = [fisher_kernel(tiny_policy, update, sketch=Sketch(32, s)).update["raw"] for s in range(24)]
    error = np.std(draws, axis=0) / np.sqrt(24)
    assert (np.abs(np.mean(draws, axis=0) - exact) < 6 * error).all()
    again = fisher_kernel(tiny_policy, update, sketch=Sketch(32, 3), budget=Budget(max_sequences=1)).update[
        "raw"
    ]
    np.testing.assert_allclose(again, draws[3], rtol=1e-9)


def test_files(tiny_policy: Policy, tmp_path: Path) -> None:
    update, probe = (
        cases.batch(tiny_policy, num_prompts=3, group_size=3, seed=1),
        cases.batch(tiny_policy, num_prompts=4, group_size=1, seed=2),
    )
    P = reconstruct_step(tiny_policy, update).preconditioner
    kernel = fisher_kernel(tiny_policy, update, probe, preconditioner=P)
    write_arrays(kernel.arrays(), tmp_path / "kernel.safetensors")
    arrays = read_arrays(tmp_path / "kernel.safetensors")
    report = KernelReport.from_json(kernel.report().to_json(), "kernel.json")
    assert report.to_json() == kernel.report().to_json()
    np.testing.assert_array_equal(arrays["update_preconditioned"], kernel.update["preconditioned"])
    assert arrays["probe_raw_cosine"].shape == (4, 9)
    assert arrays["update_sequence_id"].tolist() == list(range(9))
    assert {name: arrays[name].shape for name in report.matrices} == dict(report.matrices)
    assert report.structure["preconditioned_cosine"].effective_rank == kernel.effective_rank
    assert not list(tmp_path.glob("*.partial"))


def test_too_many_tokens_are_refused(tiny_policy: Policy) -> None:
    batch = cases.batch(tiny_policy, num_prompts=2, group_size=2, seed=1)
    with pytest.raises(BatchError, match="at most 4096"):
        split_tokens(batch.select([0] * 5000))


def batch_of(prompts: list[int], responses: list[tuple[int, ...]] | None = None) -> Rollouts:
    ids = responses or [(1,)] * len(prompts)
    return cases.rollouts([(1,)] * len(ids), ids, prompt_ids=tuple(map(str, prompts)))


def test_components_of_a_constructed_kernel() -> None:
    """Gradients common + prompt + own with known variances."""
    rng = np.random.default_rng(0)
    prompts, group, dim = 40, 6, 4000
    index = np.repeat(np.arange(prompts), group)
    common = np.sqrt(2.0) * rng.standard_normal(dim)
    G = common + np.sqrt(3.0) * rng.standard_normal((prompts, dim))[index]
    G = (G + np.sqrt(5.0) * rng.standard_normal((len(index), dim))) / np.sqrt(dim)
    responses = [(i,) for i in range(len(index))]
    null = np.diag((G**2).sum(1))
    found = kernel_structure(G @ G.T, null, batch_of(index.tolist(), responses), unit="")
    for name, share in (("common", 0.2), ("prompt", 0.3), ("own", 0.5)):
        part = found.components[name]
        assert abs(part.value - share) < 0.02
        assert 0 < part.stderr < 0.02
    assert found.diagonal.count == len(index)
    assert found.same_prompt.count == prompts * group * (group - 1) // 2
    assert found.different_prompts.count == len(index) * (len(index) - group) // 2
    assert found.top_shares[1] > 0.19
    assert found.effective_rank.value < found.null_effective_rank


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.array([1.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(np.zeros(3)) == 0.0
    K = np.diag([1.0, 4.0])
    np.testing.assert_allclose(cosine_form(K), np.eye(2))


def test_shared_prefixes() -> None:
    assert shared_prefix_length((1, 2, 3), (1, 2, 4)) == 2
    assert shared_prefix_length((1, 2), (1, 2, 4)) == 2
    K = np.array([[9.0, 5.0, 1.0], [5.0, 9.0, 2.0], [1.0, 2.0, 9.0]])
    found = kernel_structure(K, K, batch_of([0, 0, 0], [(1, 2, 3), (1, 2, 4), (5, 2, 4)]), unit="")
    assert [(p.shared_from, p.shared_to, p.mean, p.count) for p in found.shared_prefix] == [
        (0, 0, 1.5, 2),
        (2, 3, 5.0, 1),
    ]
    assert not found.same_prompt.mean.reliable


def test_a_kernel_that_is_not_finite_is_refused(tiny_policy: Policy) -> None:
    kernel = fisher_kernel(tiny_policy, cases.batch(tiny_policy, num_prompts=2, group_size=2, seed=1))
    broken = kernel.update["raw"].copy()
    broken[2, 1] = np.inf
    with pytest.raises(MeasurementError, match="kernel update_raw: row 2 is not finite"):
        replace(kernel, update={"raw": broken})
