"""Models of the kernel where the law is known, and on a policy; size and power of its null."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import cases
from measure.test_last_layer import masked
from stepscope.errors import MeasurementError
from stepscope.measure.kernel import models as models_module
from stepscope.measure.kernel.fisher import fisher_kernel
from stepscope.measure.kernel.models import MODELS, ModelOptions, judge, predicted
from stepscope.measure.kernel.null import (
    STATISTICS,
    WITHIN,
    NullOptions,
    exchanged,
    p_value,
    prompt_signs,
    spectrum_tests,
)
from stepscope.measure.kernel.pairs import KINDS, Pairs, pairs_of
from stepscope.measure.kernel.structure import cosine_form, eigenvalues
from stepscope.policy.forward import forward
from stepscope.policy.last_layer import last_layer, layer_states
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget, gather
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, IntArray


class Gradients:
    """Token gradients of unequal responses whose covariance falls off; responses to a prompt share some."""

    def __init__(self, rng: np.random.Generator, *, shared: float, small: bool = False) -> None:
        prompts, group, tokens, dim = (8, 3, 4, 100) if small else (12, 4, 5, 300)
        self.prompts = np.repeat(np.arange(prompts), group)
        own = rng.standard_normal((len(self.prompts), tokens, dim))
        common = rng.standard_normal((prompts, tokens, dim))[self.prompts]
        lengths = rng.lognormal(0.0, 0.7, (len(self.prompts), 1, 1))
        self.tokens = (own + shared * common) * np.arange(1, dim + 1) ** -0.6 * lengths
        self.rng = rng

    def plant(self) -> None:
        """A direction that all responses have, as long as the rest, with signs of their prompts' own."""
        unit = self.rng.standard_normal(self.tokens.shape[2])
        unit /= np.linalg.norm(unit)
        lengths = np.linalg.norm(self.tokens.sum(1), axis=1)[:, None, None] / self.tokens.shape[1]
        signs = self.rng.choice([-1.0, 1.0], len(self.prompts))[self.prompts][:, None, None]
        self.tokens += lengths * signs * unit

    def test(self, coupling: str, draws: int = 39) -> FloatArray:
        """P-values of the statistics, with one version of the signs."""
        units = self.prompts if coupling == "prompts" else np.arange(len(self.prompts))
        signed = self.tokens * self.rng.choice([-1.0, 1.0], (len(units), self.tokens.shape[1], 1))[units]
        G = np.stack([self.tokens.sum(1), signed.sum(1)]).reshape(-1, self.tokens.shape[2])
        K = (G @ G.T).reshape(2, len(units), 2, len(units))
        found = exchanged(K, units, self.prompts, draws=draws, seed=int(self.rng.integers(2**31)))
        return np.array([p_value(found[name]) for name in STATISTICS])


def p_values(
    coupling: str, count: int, *, shared: float, plant: bool = False, small: bool = False
) -> FloatArray:
    """(data set, statistic)."""
    rng, found = np.random.default_rng(11), []
    for _ in range(count):
        gradients = Gradients(rng, shared=shared, small=small)
        if plant:
            gradients.plant()
        found.append(gradients.test(coupling))
    return np.array(found)


@pytest.mark.parametrize(("coupling", "shared"), [("responses", 0.0), ("prompts", 1.0)])
def test_the_null_has_its_size(coupling: str, shared: float) -> None:
    """Independent but for the prompt's block, of unequal length: p is uniform on 1/40, 2/40, ..., 1."""
    count = 200
    found = p_values(coupling, count, shared=shared, small=True)
    spread = np.random.default_rng(0).uniform(0, 1 / 40, count)
    for p in found[:, : 3 if coupling == "responses" else 2].T:
        assert kstest(p - spread, "uniform").pvalue > 0.01
        for level in (0.05, 0.1):
            assert (p <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / count)


def test_equal_directions_are_another_law() -> None:
    """Marchenko and Pastur's edge for equal rows, which the same independent gradients exceed every time."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        G = Gradients(rng, shared=0.0).tokens.sum(1)
        edge = (1 + np.sqrt(G.shape[0] / G.shape[1])) ** 2
        assert eigenvalues(cosine_form(G @ G.T))[0] > 1.5 * edge


@pytest.mark.parametrize(("coupling", "shared"), [("responses", 0.0), ("prompts", 1.0)])
def test_a_planted_direction_is_found(coupling: str, shared: float) -> None:
    found = p_values(coupling, 20, shared=shared, plant=True)
    assert ((found[:, :2] <= 0.05).mean(0) >= 0.9).all()


def drawn_from_a_policy(rng: np.random.Generator) -> tuple[FloatArray, IntArray]:
    """(seq, tok, params) token gradients (e_y - pi) h' of a tree of contexts, copies merged, and prompts."""
    rows, prompts, symbols = [], [], 3
    for prompt in range(8):
        steady, nodes, seen = rng.normal(size=15), {}, set()
        for _ in range(6):
            text: tuple[int, ...] = ()
            gradients = []
            for _ in range(3):
                if text not in nodes:
                    logits = 1.5 * rng.normal(size=symbols)
                    nodes[text] = (steady + rng.normal(size=15), np.exp(logits) / np.exp(logits).sum())
                h, probs = nodes[text]
                token = int(rng.choice(symbols, p=probs))
                gradients.append(np.outer(np.eye(symbols)[token] - probs, h).ravel())
                text += (token,)
            if text not in seen:
                seen.add(text)
                rows.append(gradients)
                prompts.append(prompt)
    return np.array(rows), np.array(prompts)


def test_responses_that_a_policy_draws_are_not_found_coupled() -> None:
    """They are independent; a third are copies, which are merged: p may be too large, not too small."""
    rng, count = np.random.default_rng(0), 120
    found: dict[str, list[list[float]]] = {"responses": [], "prompts": []}
    for _ in range(count):
        tokens, prompts = drawn_from_a_policy(rng)
        for coupling, values in found.items():
            units = prompts if coupling == "prompts" else np.arange(len(prompts))
            signed = tokens * rng.choice([-1.0, 1.0], (len(units), 3, 1))[units]
            G = np.stack([tokens.sum(1), signed.sum(1)]).reshape(-1, tokens.shape[2])
            K = (G @ G.T).reshape(2, len(units), 2, len(units))
            drawn = exchanged(K, units, prompts, draws=39, seed=int(rng.integers(2**31)))
            values.append([p_value(drawn[name]) for name in STATISTICS])
    for coupling, values in found.items():
        p = np.array(values)[:, : 3 if coupling == "responses" else 2]
        assert ((p <= 0.05).mean(0) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / count)).all()
    assert np.array(found["responses"])[:, STATISTICS.index(WITHIN)].mean() > 0.7  # they part, so they differ


def test_what_a_prompt_shares_is_coupling_of_responses_and_none_of_prompts() -> None:
    within = p_values("responses", 20, shared=1.0)[:, STATISTICS.index(WITHIN)]
    assert (within <= 0.05).mean() >= 0.9


def test_signs_of_a_prompt_belong_to_positions() -> None:
    batch = cases.rollouts([(1,), (1,), (2,)], [(3, 4, 5), (6, 7), (3, 4, 5)])
    signs = prompt_signs(batch, seed=3)
    np.testing.assert_array_equal(signs[0][:2], signs[1])
    assert [len(s) for s in signs] == [3, 2, 3]
    assert set(np.concatenate([prompt_signs(batch, seed=s)[2] for s in range(9)])) == {-1.0, 1.0}


def test_versions_of_a_batch_are_its_own_kernels(tiny_policy: Policy) -> None:
    """The statistic of the batch is that of its cosine kernel in the metric."""
    batch = cases.batch(tiny_policy, num_prompts=4, group_size=3)
    metric = {n: torch.rand_like(p) for n, p in tiny_policy.parameters.items()}
    options = NullOptions(signs=1, draws=19)
    found = spectrum_tests(tiny_policy, batch, metric=metric, name="preconditioned", options=options)
    cosine = fisher_kernel(tiny_policy, batch, preconditioner=metric).cosine("preconditioned")
    apart = batch.prompt_index[:, None] != batch.prompt_index[None, :]
    within = ~apart & ~np.eye(len(batch), dtype=bool)
    own = (eigenvalues(cosine)[0], (cosine[apart] ** 2).mean(), (cosine[within] ** 2).mean())
    known = dict(zip(STATISTICS, own, strict=True))
    assert [t.coupling for t in found] == ["responses"] * 3 + ["prompts"] * 2
    for test in found:
        assert test.value == pytest.approx(known[test.statistic], rel=1e-9)
        assert 1 / 20 <= test.p <= 1
        assert (test.metric, test.draws) == ("preconditioned", 19)
    with pytest.raises(MeasurementError, match="expected 2 prompts"):
        spectrum_tests(tiny_policy, batch.select([0, 1]), options=options)
    with pytest.raises(MeasurementError, match="0 draws"):
        NullOptions(draws=0)


def made_pairs(rng: np.random.Generator, count: int = 60) -> tuple[Pairs, FloatArray]:
    """A kernel that is a sum of two layers' kernels, with other coefficients on the diagonal, and noise."""
    prompts = np.repeat(np.arange(count // 5), 5)
    layers = []
    for width in (6, 9):
        h = rng.standard_normal((count, width)) * rng.lognormal(0, 0.4, (count, 1))
        layers.append(h @ h.T)
    same, own = prompts[:, None] == prompts[None, :], np.eye(count, dtype=bool)
    texts = np.stack([np.ones((count, count)), *np.exp(rng.standard_normal((5, count, count)) / 9)])
    kinds = dict(zip(KINDS, (own, same & ~own, ~same), strict=True))
    stacked = np.stack(layers)
    K = 2 * layers[0] + 0.5 * layers[1] + own * layers[1]
    return Pairs(prompts, kinds, texts, stacked, {"raw": layers[1]}), K


def test_a_sum_of_layers_is_found_and_held_out_rows_are_not_looked_at() -> None:
    pairs, K = made_pairs(np.random.default_rng(0))
    np.testing.assert_allclose(predicted(K, pairs, "raw", "layers"), K, rtol=1e-8, atol=1e-8)
    options = ModelOptions(folds=4, steps=3, pairs=40, inducing=6)
    folds = np.random.default_rng(0).permutation(12) % 4
    held = folds[pairs.prompts] == 2
    spoilt = K.copy()
    spoilt[held] = spoilt[:, held] = 1e6
    for model in set(MODELS) - {"last_layer"}:
        seen, blind = (predicted(k, pairs, "raw", model, options)[held] for k in (K, spoilt))
        np.testing.assert_array_equal(seen, blind)


def test_a_model_that_knows_nothing_has_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that are large for some prompts, and features without a word of it: fitted to the others, the
    mean is low for the prompts that are high, which across folds is a correlation of -.17 to -.37."""
    names = ("mean", "components", "tokens", "last_layer_scaled", "layers")
    monkeypatch.setattr(models_module, "MODELS", {name: MODELS[name] for name in names})
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        pairs, _ = made_pairs(rng, 30)
        level = 2 * rng.normal(size=6)[pairs.prompts]
        noise = rng.normal(size=(30, 30))
        K = noise + noise.T + level[:, None] + level[None, :]
        for model in judge(K, pairs, "raw"):
            for kind, ranks in model.spearman.items():
                found.setdefault((model.name, kind), []).append(ranks.value)
    for kind in KINDS:
        assert np.isnan(found["mean", kind]).all()
        for name in names[2:]:
            values = np.array(found[name, kind])
            assert abs(np.nanmean(values)) < 4 * np.nanstd(values) / 10**0.5, (name, kind)
    assert np.mean(found["components", "different_prompts"]) > 0.2  # columns are known


def test_variance_components_are_shrunk_column_effects() -> None:
    rng = np.random.default_rng(1)
    pairs, K = made_pairs(rng)
    effect = rng.standard_normal(len(K))
    noise = 0.3 * rng.standard_normal(K.shape)
    K = np.where(pairs.kinds["different_prompts"], effect[:, None] + effect[None, :] + noise + noise.T, K)
    found = {m.name: m for m in judge(K, pairs, "raw", ModelOptions(steps=2, pairs=40, inducing=5))}
    r2 = found["components"].r2["different_prompts"]
    assert 0.3 < r2.value < 0.5, "half of the variance is the column's, the row's is not known"
    assert found["mean"].r2["different_prompts"].value < 0.02
    assert r2.n == 12
    assert r2.stderr > 0
    assert found["last_layer"].fitted == 0
    with pytest.raises(MeasurementError, match="at least 3"):
        predicted(K, pairs, "raw", "mean", ModelOptions(folds=13))


def test_a_smooth_kernel_is_learned() -> None:
    """Both regressions beat every sum of layers where the kernel is a bent function of a cosine."""
    rng = np.random.default_rng(2)
    pairs, _ = made_pairs(rng, 40)
    cosine = cosine_form(pairs.layers[0])
    K = np.exp(3 * cosine - 3) * np.sqrt(np.outer(np.diag(pairs.layers[0]), np.diag(pairs.layers[0])))
    options = ModelOptions(steps=30, pairs=200, inducing=15, folds=3)
    apart = pairs.kinds["different_prompts"]

    def missed(model: str) -> float:
        return float(((predicted(K, pairs, "raw", model, options) - K)[apart] ** 2).sum())

    total = float(((K - K[apart].mean())[apart] ** 2).sum())
    line = missed("layers")
    for model in ("gaussian_process", "deep_kernel"):
        assert missed(model) < 0.5 * line
        assert missed(model) < 0.2 * total


def test_pairs_of_a_model(tiny_policy: Policy) -> None:
    """Layers' states are those of the forward pass; the last of them gives the last layer's kernel."""
    batch = cases.batch(tiny_policy, num_prompts=3, group_size=2)
    states = layer_states(tiny_policy, batch, budget=Budget(max_sequences=4))
    assert len(states) == 1 + tiny_policy.model.config.num_hidden_layers
    np.testing.assert_allclose(states[-1], last_layer(tiny_policy, batch).hidden, rtol=1e-12)
    embedded = tiny_policy.model.get_input_embeddings()
    micro = gather(tiny_policy, batch, [0])
    before = micro.input_ids[0, -micro.response_ids.shape[1] - 1 : -1]
    first = len(batch.response_token_ids[0])
    np.testing.assert_allclose(states[0][:first], embedded(before).detach()[:first], rtol=1e-12)
    assert forward(tiny_policy.model, micro, temperature=1.0).logprobs.shape[1] == first
    pairs, layer = pairs_of(tiny_policy, batch, {"raw": None})
    np.testing.assert_allclose(pairs.layers[-1], pairs.last["raw"], rtol=1e-10)
    assert layer.embeds
    lengths = batch.num_tokens
    np.testing.assert_array_equal(pairs.texts[1], np.outer(lengths, lengths))
    np.testing.assert_array_equal(np.diag(pairs.texts[3]), lengths)
    np.testing.assert_array_equal(np.diag(pairs.texts[5]), lengths)
    part = masked(batch)
    seen, own = pairs_of(tiny_policy, part, {"raw": None})[0].texts, part.num_policy_tokens
    assert (own < lengths).any()
    for feature, value in ((1, own**2), (3, own), (4, 1), (5, own)):
        np.testing.assert_array_equal(np.diag(seen[feature]), value)  # the environment's are not counted
    other = Policy(cases.model("llama", vocab_size=12), None, StepSettings())
    assert len(layer_states(other, batch)) == 3
