"""The kernel's null and its mean-zero check against gradients whose law is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.measure.kernel.fisher import fisher_kernel
from stepscope.measure.kernel.structure import (
    KernelStructure,
    eigenvalues,
    kernel_structure,
    token_signs,
)
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts

PROMPTS, GROUP, TOKENS, DIM = 32, 4, 6, 2048


def batch(responses: list[tuple[int, ...]], prompts: FloatArray) -> Rollouts:
    return cases.rollouts([(1,)] * len(responses), responses, prompt_ids=tuple(map(str, prompts)))


class Gradients:
    """Token gradients with covariance spectrum k^-power along directions that span all parameters."""

    def __init__(self, power: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.prompts = np.repeat(np.arange(PROMPTS), GROUP)
        responses = [(i, *range(TOKENS - 1)) for i in range(len(self.prompts))]
        self.rollouts = batch(responses, self.prompts)
        scale = np.arange(1, DIM + 1) ** (-power / 2)
        self.tokens = rng.standard_normal((len(responses), TOKENS, DIM)) * scale / np.sqrt(TOKENS)
        self.length = float(np.sqrt((scale**2).sum()))

    def add(self, direction: FloatArray, share: float) -> None:
        """Plant (seq, params) directions of unit length in the gradients, spread over the tokens."""
        self.tokens += share * self.length * direction[:, None] / TOKENS

    def structure(self, *, cosine: bool = True) -> KernelStructure:
        signs = np.stack(token_signs(self.rollouts))[:, :, None]
        G, G0 = self.tokens.sum(1), (self.tokens * signs).sum(1)
        return kernel_structure(G @ G.T, G0 @ G0.T, self.rollouts, unit="", cosine=cosine)


@pytest.mark.parametrize(("power", "rank"), [(1.0, 73), (1.5, 21)])
def test_uneven_but_independent_gradients_are_no_structure(power: float, rank: float) -> None:
    """Random directions of equal length would give 124 of 128 in both cases."""
    found = [Gradients(power, seed).structure() for seed in range(8)]
    assert np.mean([f.effective_rank.value for f in found]) == pytest.approx(rank, abs=4)
    deficits = np.array([f.rank_deficit.value for f in found])
    assert abs(deficits.mean()) < 3 * deficits.std(ddof=1) / np.sqrt(8)
    assert np.mean([f.null_spectrum[:5] / f.spectrum[:5] for f in found]) == pytest.approx(1.0, abs=0.1)
    covered = [abs(f.rank_deficit.value) < 2 * f.rank_deficit.stderr for f in found]
    assert sum(covered) >= 6
    for f in found:
        assert f.null_effective_rank == pytest.approx(f.effective_rank.value, rel=0.12)


@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize("planted", ["common", "prompt"])
def test_planted_couplings_exceed_the_null(power: float, planted: str) -> None:
    """A shared direction takes rank away; where few directions had it all, one per prompt adds some."""
    gradients = Gradients(power, 3)
    rng = np.random.default_rng(4)
    unit = rng.standard_normal((1 if planted == "common" else PROMPTS, DIM))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    gradients.add(unit[np.zeros_like(gradients.prompts) if planted == "common" else gradients.prompts], 1.5)
    found = gradients.structure()
    assert abs(found.rank_deficit.value) > 3 * found.rank_deficit.stderr > 0
    assert found.rank_deficit.value > 0 or (planted, power) == ("prompt", 1.5)
    if planted == "common":
        assert found.spectrum[0] > 1.5 * found.null_spectrum[0]
    check = gradients.structure(cosine=False).mean_zero["same_prompt"]
    assert check.z > 5
    assert check.p < 0.001
    assert "another policy" in check.mean.reason


def test_mean_zero_check_is_calibrated() -> None:
    checks = [Gradients(1.0, seed).structure(cosine=False).mean_zero for seed in range(8)]
    z = np.array([c["off_diagonal"].z for c in checks])
    assert abs(z.mean()) < 1
    assert 0.4 < np.sqrt((z**2).mean()) < 1.7
    p = np.array([c["off_diagonal"].p for c in checks])
    assert p.min() > 0.002
    assert 0.2 < p.mean() < 0.8
    mean = checks[0]["off_diagonal"].mean
    assert mean.value / mean.stderr == pytest.approx(z[0])


def sampled(policy: Policy) -> Rollouts:
    """Eight responses of four tokens to each of eight prompts, drawn from the policy."""
    generator = torch.Generator().manual_seed(0)
    index = np.repeat(np.arange(8), 8)
    prompts = torch.randint(2, 12, (8, 3), generator=generator)
    ids = prompts[torch.from_numpy(index)]
    for _ in range(4):
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[:, -1] / policy.settings.temperature
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    drawn = batch([tuple(r) for r in ids[:, 3:].tolist()], index)
    drawn = replace(
        drawn,
        prompt_token_ids=tuple(tuple(p) for p in ids[:, :3].tolist()),
        temperature=policy.settings.temperature,
    )
    logprobs, entropies = score_rollouts(policy, drawn)
    return replace(drawn, logprobs=logprobs, entropies=entropies)


def test_own_responses_average_to_zero_and_others_do_not(tiny_policy: Policy) -> None:
    """The identity on a model: responses it sampled pass; copies of one response in their place do not."""
    own = sampled(tiny_policy)
    found = fisher_kernel(tiny_policy, own).structure("raw").mean_zero
    for check in found.values():
        assert abs(check.z) < 3.5
        assert check.mean.reliable
    forced = own.select(np.arange(64) // 8 * 8)
    broken = fisher_kernel(tiny_policy, forced).structure("raw").mean_zero["same_prompt"]
    assert broken.z > 5
    assert not broken.mean.reliable


def test_copies_are_one_response() -> None:
    rng = np.random.default_rng(0)
    G, rows = rng.standard_normal((4, 50)), np.array([0, 1, 1, 2, 3, 3, 3])
    responses = [[(1, 2), (1, 3), (4,), (5,)][i] for i in rows]
    rollouts = batch(responses, np.array([0, 0, 0, 0, 1, 1, 1]))
    K, once = G[rows] @ G[rows].T, G @ G.T
    found = kernel_structure(K, K, rollouts, unit="", cosine=True)
    alone = kernel_structure(once, once, rollouts.select([0, 1, 3, 4]), unit="", cosine=True)
    assert found.distinct == 4
    np.testing.assert_allclose(found.spectrum, alone.spectrum)
    assert found.same_prompt.mean.value == pytest.approx(alone.same_prompt.mean.value)
    # parts of a step add up
    counts = np.bincount(rows)
    summed = kernel_structure(K, K, rollouts, unit="", contributions=True)
    np.testing.assert_allclose(summed.spectrum, eigenvalues(once * np.outer(counts, counts)))
    assert not summed.mean_zero
    signs = token_signs(rollouts)
    np.testing.assert_array_equal(signs[1], signs[2])
    # a response without a gradient has no direction
    nothing = np.array([0.0, 1, 1, 1, 1, 1, 1])
    gone = kernel_structure(K * np.outer(nothing, nothing), K, rollouts, unit="", cosine=True)
    assert gone.distinct == 3
    assert gone.diagonal.mean.value == pytest.approx(1.0)


def test_signs_depend_on_the_seed_only() -> None:
    rollouts = batch([(1, 2, 3)] * 3, np.arange(3))
    first, again, other = (np.stack(token_signs(rollouts, seed=s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert set(np.unique(first)) == {-1.0, 1.0}
