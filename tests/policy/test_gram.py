"""Per-sequence gradients, products and Gram matrices against one autograd call per sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, TokenOutputs, forward, make_batch
from stepscope.policy.gradients import coverage
from stepscope.policy.gradients.derivatives import directional_derivative, gradient
from stepscope.policy.gradients.gram import gram, grams
from stepscope.policy.gradients.products import (
    group_gradients,
    paired_dots,
    per_sequence_dot,
    per_sequence_dots,
)
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

Build = Callable[..., nn.Module]
TOKENS = 22


def objective(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    return outputs.logprobs + 0.3 * outputs.entropies


def draw(count: int, seed: int = 0, longest: int = 8) -> Rollouts:
    """Prompts and responses of all lengths; the second sequence repeats the first."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(2, TOKENS, rng.integers(1, 6)).tolist()) for _ in range(count)]
    responses = [tuple(rng.integers(2, TOKENS, rng.integers(1, longest + 1)).tolist()) for _ in range(count)]
    prompts[1], responses[1] = prompts[0], responses[0]
    return cases.rollouts(
        prompts, responses, prompt_ids=tuple(f"p{i // 2}" for i in range(count)), temperature=0.8
    )


def as_policy(model: nn.Module, dtype: torch.dtype = torch.float64) -> Policy:
    return Policy((lift_model(model) if dtype == torch.float64 else model).eval(), None, StepSettings())


def with_adapter(model: nn.Module, architecture: str) -> nn.Module:
    return cases.adapted(model, r=3, target_modules="all-linear", fan_in_fan_out=architecture == "gpt2")


def jacobian(policy: Policy, rollouts: Rollouts) -> Tensor:
    """(seq, params) by one forward and backward per sequence, without padding."""
    params = list(policy.parameters.values())
    rows = []
    for i in range(len(rollouts)):
        single = make_batch([rollouts.prompt_token_ids[i]], [rollouts.response_token_ids[i]])
        outputs = forward(policy.model, single, temperature=rollouts.temperature)
        grads = torch.autograd.grad(objective(outputs, single).sum(), params, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).double()


def random_vector(policy: Policy, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.parameters.items()}


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in vector.values()]).double()


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_everything_equals_autograd(
    architecture: str, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = cases.model(architecture)
    policy = as_policy(with_adapter(model, architecture) if kind == "lora" else model, dtype)
    update, probe = draw(7), draw(5, 3)
    P, u = random_vector(policy), random_vector(policy, 6)
    J, H, p = jacobian(policy, update), jacobian(policy, probe), flat(P)
    found = grams(
        policy,
        SequenceGradients(update, objective),
        metrics={"raw": None, "P": P},
        other=SequenceGradients(probe, objective),
        budget=Budget(max_sequences=3),
    )
    assert error(found.square["raw"], J @ J.T) < tolerance
    assert error(found.square["P"], (J * p) @ J.T) < tolerance
    assert error(found.cross["raw"], H @ J.T) < tolerance
    assert error(found.cross["P"], (H * p) @ J.T) < tolerance
    assert error(found.other_norms["P"], (H * p * H).sum(1)) < tolerance
    assert (
        error(
            torch.from_numpy(per_sequence_dot(policy, SequenceGradients(update, objective), u)), J @ flat(u)
        )
        < tolerance
    )
    groups = probe.prompt_index
    summed = group_gradients(
        policy, SequenceGradients(probe, objective), groups, budget=Budget(max_sequences=2)
    )
    S = torch.stack([H[groups == g].sum(0) for g in range(groups.max() + 1)])
    assert error(torch.cat([t.flatten(1) for t in summed.values()], 1).double(), S) < tolerance
    dots = torch.from_numpy(per_sequence_dots(policy, SequenceGradients(update, objective), summed))
    assert error(dots, S @ J.T) < tolerance
    assert coverage.known(policy, True) is not None
    assert coverage.known(policy, True).slow == ()


@pytest.fixture
def tied() -> Policy:
    """Full fine-tuning of a model whose output matrix is its embedding."""
    return as_policy(cases.model("smollm"))


def test_tied_uses_add_up_before_products(tied: Policy) -> None:
    """The embedding's own block of K is not the sum of the two uses' blocks: their cross terms count."""
    update = draw(5)
    name = next(n for n in tied.parameters if "embed_tokens" in n)
    only = {n: torch.full_like(p, float(n == name)) for n, p in tied.parameters.items()}
    J = jacobian(tied, update)
    assert not any("lm_head" in n for n in tied.parameters)
    assert (
        error(gram(tied, SequenceGradients(update, objective), preconditioner=only), (J * flat(only)) @ J.T)
        < 1e-12
    )


def test_blocks_disk_and_order_give_the_same_numbers(tied: Policy, tmp_path: Path) -> None:
    update, probe = draw(9), draw(4, 3)
    P = random_vector(tied)
    metrics = {"raw": None, "P": P}
    whole = grams(
        tied,
        SequenceGradients(update, objective),
        metrics=metrics,
        other=SequenceGradients(probe, objective),
        budget=Budget(max_sequences=16),
    )
    numbers = sum(p.numel() for p in tied.parameters.values())
    small = grams(
        tied,
        SequenceGradients(update, objective),
        metrics=metrics,
        other=SequenceGradients(probe, objective),
        budget=Budget(max_sequences=3, memory_bytes=8 * numbers * 2),
    )
    disk = grams(
        tied,
        SequenceGradients(update, objective),
        metrics=metrics,
        budget=Budget(scratch=tmp_path, max_tokens=20),
    )
    at_once = grams(
        tied, SequenceGradients(update, objective), metrics=metrics, budget=Budget(max_sequences=16)
    )
    shuffled = np.random.default_rng(0).permutation(len(update))
    moved = grams(
        tied,
        SequenceGradients(update.select(shuffled), objective),
        metrics=metrics,
        budget=Budget(max_sequences=4),
    )
    assert (whole.blocks, small.blocks > 2, disk.blocks) == (1, True, 1)
    assert not list(tmp_path.iterdir())
    for metric in metrics:
        K = whole.square[metric]
        assert error(small.square[metric], K) < 1e-12
        assert error(disk.square[metric], K) < 1e-12
        assert error(at_once.square[metric], K) < 1e-12
        assert error(moved.square[metric], K[shuffled][:, shuffled]) < 1e-12
        assert error(small.cross[metric], whole.cross[metric]) < 1e-12
        assert error(small.other_norms[metric], whole.other_norms[metric]) < 1e-12


def test_a_large_square_is_exact_off_the_diagonal_too(tied: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one triangle of blocks is multiplied; here blocks of 2 rows."""
    update = draw(7)
    P = random_vector(tied)
    expected = gram(tied, SequenceGradients(update, objective), preconditioner=P)
    monkeypatch.setattr("stepscope.policy.gradients.store.ROW_BLOCK", 2)
    monkeypatch.setattr("stepscope.policy.gradients.store.CHUNK_BYTES", 200)
    assert error(gram(tied, SequenceGradients(update, objective), preconditioner=P), expected) < 1e-12


def test_repeated_sequences_keep_their_rows(tied: Policy) -> None:
    K = gram(tied, SequenceGradients(draw(6), objective))
    assert K.shape == (6, 6)
    torch.testing.assert_close(K[0], K[1], rtol=1e-12, atol=1e-12)
    assert float(K[0, 0]) == pytest.approx(float(K[0, 1]), rel=1e-12)


@pytest.mark.parametrize("source", ["gpt2", "qwen2", "gemma3"])
def test_two_gradients_of_the_same_sequence(source: str) -> None:
    policy = as_policy(cases.model(source))
    rollouts, P = draw(6), random_vector(policy)
    whole = gram(
        policy,
        SequenceGradients(rollouts, lambda outputs, batch: outputs.logprobs),
        preconditioner=P,
        other=SequenceGradients(rollouts, lambda outputs, batch: outputs.entropies),
    ).diagonal()
    one = sum(p.numel() for p in policy.parameters.values()) * 8
    for budget in (2**30, 2 * one):
        found = paired_dots(
            policy,
            SequenceGradients(rollouts, lambda outputs, batch: outputs.entropies),
            SequenceGradients(rollouts, lambda outputs, batch: outputs.logprobs),
            {"raw": None, "P": P},
            budget=Budget(memory_bytes=budget),
        )
        assert error(torch.from_numpy(found["P"]), whole) < 1e-12
        assert error(torch.from_numpy(found["raw"]), whole) > 1e-3
    with pytest.raises(MeasurementError, match="metric 'P' does not fit"):
        paired_dots(policy, *[SequenceGradients(rollouts, objective)] * 2, {"P": {}})


def test_wide_vocabulary_stays_in_factors() -> None:
    """A vocabulary-sized matrix against short texts: kept as factors, inner products without matrices."""
    policy = as_policy(cases.model("llama", vocab_size=3000))
    update = draw(4, longest=2)
    J = jacobian(policy, update)
    P = random_vector(policy)
    found = grams(
        policy,
        SequenceGradients(update, objective),
        metrics={"raw": None, "P": P},
        budget=Budget(max_sequences=2),
    )
    assert error(found.square["raw"], J @ J.T) < 1e-12
    assert error(found.square["P"], (J * flat(P)) @ J.T) < 1e-12
    dense = 8 * sum(p.numel() for p in policy.parameters.values())
    assert (
        grams(
            policy,
            SequenceGradients(update, objective),
            metrics={"raw": None},
            budget=Budget(memory_bytes=4 * dense // 2),
        ).blocks
        == 1
    )


class Gain(nn.Module):
    """A trainable parameter of no known kind."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x)) * self.gain


class Borrowing(nn.Module):
    """Uses a linear module's weight without calling it, so no hook can see it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.linear.weight)


class Flattening(nn.Module):
    """Calls a linear module on reversed tokens of all sequences at once: rows are not in batch order."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).flip(0)
        return torch.as_tensor(self.linear(flat)).flip(0).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda mlp: Gain(mlp, 16), "gain"),
        (lambda mlp: Borrowing(nn.Linear(16, 16, bias=False, dtype=torch.float64)), "linear.weight"),
        (lambda mlp: Flattening(nn.Linear(16, 16, bias=False, dtype=torch.float64)), "linear.weight"),
    ],
    ids=["unknown module", "weight used without its module", "tokens reordered across sequences"],
)
def test_what_hooks_cannot_see_goes_the_slow_way_announced(
    wrap: Callable[[nn.Module], nn.Module], name: str
) -> None:
    policy = as_policy(cases.model("llama"))
    layer = policy.model.model.layers[0]
    layer.mlp = wrap(layer.mlp)
    update = draw(5)
    J = jacobian(policy, update)
    with pytest.warns(UserWarning, match=f"1 of .*{name}.*one sequence at a time"):
        K = gram(policy, SequenceGradients(update, objective), budget=Budget(max_sequences=2))
    assert error(K, J @ J.T) < 1e-12
    assert all(p.requires_grad for p in policy.model.parameters())


def test_the_policy_is_left_as_it_was() -> None:
    policy = as_policy(cases.model("qwen3"))
    before = dict(policy.model.named_parameters())
    values = {n: p.detach().clone() for n, p in before.items()}
    update = draw(4)

    def broken(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        raise KeyError("stop")

    gram(policy, SequenceGradients(update, objective))
    with pytest.raises(KeyError):
        gram(policy, SequenceGradients(update, broken))
    after = dict(policy.model.named_parameters())
    assert all(after[n] is p and p.requires_grad and p.grad is None for n, p in before.items())
    assert all(torch.equal(after[n], v) for n, v in values.items())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.model.modules()]
    assert sum(hooks) == 0


def test_other_passes_inside_the_objective_are_not_recorded() -> None:
    """A KL objective runs the reference, which may be the same modules with the adapter off."""
    policy = as_policy(with_adapter(cases.model("qwen2"), "qwen2"))
    update = draw(5)

    def divergence(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        with torch.no_grad(), policy.model.disable_adapter():
            base = forward(policy.model, batch, temperature=1.0)
        return (outputs.logprobs - base.logprobs) ** 2

    by_reverse = per_sequence_dot(policy, SequenceGradients(update, divergence), random_vector(policy))
    by_forward = directional_derivative(policy, update, divergence, random_vector(policy), mode="forward")
    np.testing.assert_allclose(by_reverse, [float(d.sum()) for d in by_forward], rtol=1e-10)


def test_double_backward_equals_forward_mode(architecture: str) -> None:
    policy = as_policy(cases.model(architecture))
    update, u = draw(4), random_vector(policy)
    forward_mode = directional_derivative(policy, update, objective, u, mode="forward")
    both = directional_derivative(policy, update, objective, u, mode="double_backward")
    for a, b in zip(forward_mode, both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    sums = torch.stack([d.sum() for d in forward_mode])
    assert (
        error(sums, torch.from_numpy(per_sequence_dot(policy, SequenceGradients(update, objective), u)))
        < 1e-11
    )


@pytest.mark.parametrize("mode", ["forward", "double_backward"])
def test_sampled_padding_tokens_count_as_asked(mode: str) -> None:
    """Whole gradients, per-sequence gradients and token derivatives leave out the same, or nothing."""
    policy = as_policy(cases.model("llama"))
    policy.model.get_input_embeddings().padding_idx = 7
    rollouts, u = draw(6), random_vector(policy)
    assert any(7 in ids[:-1] for ids in rollouts.response_token_ids)
    found = {}
    for as_trained in (True, False):
        along = directional_derivative(policy, rollouts, objective, u, mode=mode, as_trained=as_trained)
        found[as_trained] = torch.stack([d.sum() for d in along])
        dots = per_sequence_dot(policy, SequenceGradients(rollouts, objective, as_trained), u)
        assert error(torch.from_numpy(dots), found[as_trained]) < 1e-11
        whole = flat(gradient(policy, rollouts, objective, as_trained=as_trained))
        assert float(whole @ flat(u)) == pytest.approx(float(found[as_trained].sum()), rel=1e-11)
        own = [
            flat(gradient(policy, single, objective))
            @ flat(gradient(policy, single, objective, as_trained=as_trained))
            for single in (rollouts.select([i]) for i in range(len(rollouts)))
        ]
        pairs = paired_dots(
            policy,
            SequenceGradients(rollouts, objective),
            SequenceGradients(rollouts, objective, as_trained),
            {"raw": None},
        )
        assert error(torch.from_numpy(pairs["raw"]), torch.stack(own)) < 1e-11
    assert error(found[True], found[False]) > 1e-3
    assert policy.model.get_input_embeddings().padding_idx == 7


class NoForwardMode(torch.autograd.Function):
    """Doubles, with a rule for backward only."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_model_without_forward_mode_says_so(caplog: pytest.LogCaptureFixture) -> None:
    policy = as_policy(cases.model("llama"))
    update, u = draw(4), random_vector(policy)

    def doubled(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        return NoForwardMode.apply(outputs.logprobs)

    expected = directional_derivative(policy, update, lambda o, b: 2 * o.logprobs, u)
    got = directional_derivative(policy, update, doubled, u)
    assert "double backward" in caplog.text
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals() -> None:
    policy = as_policy(cases.model("llama"))
    update = draw(3)
    u = random_vector(policy)
    with pytest.raises(MeasurementError, match="1 trainable parameters missing"):
        per_sequence_dot(policy, SequenceGradients(update, objective), dict(list(u.items())[1:]))
    first = next(iter(u))
    with pytest.raises(MeasurementError, match="expected"):
        gram(policy, SequenceGradients(update, objective), preconditioner={**u, first: u[first][:1]})
    with pytest.raises(MeasurementError, match="memory budget"):
        gram(policy, SequenceGradients(update, objective), budget=Budget(memory_bytes=10))
    for p in policy.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(MeasurementError, match="no trainable parameter"):
        gram(replace(policy), SequenceGradients(update, objective))
