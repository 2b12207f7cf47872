"""Linear maps in forward mode: no product with what does not move; derivatives as by torch's rules."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import cases
from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.linear import sparing_linear
from stepscope.policy.state import Policy


def made(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("moving", [m for n in range(4) for m in itertools.combinations("xwb", n)])
@pytest.mark.parametrize("kind", ["linear", "without bias", "addmm"])
def test_any_of_the_three_may_move(moving: tuple[str, ...], kind: str) -> None:
    values = {"x": made(4, 3, seed=0), "w": made(5, 3, seed=1), "b": made(5, seed=2)}
    moves = {name: made(*values[name].shape, seed=9 + i) for i, name in enumerate(values)}

    def product(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if kind == "addmm":
            return torch.addmm(b, x, w.T)
        return torch.nn.functional.linear(x, w, None if kind == "without bias" else b)

    with torch.no_grad(), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(v, moves[n]) if n in moving else v for n, v in values.items()}
        with sparing_linear():
            found = forward_ad.unpack_dual(product(**duals))
        expected = forward_ad.unpack_dual(product(**duals))
    torch.testing.assert_close(found.primal, expected.primal, rtol=1e-14, atol=1e-14)
    if found.tangent is None:
        assert expected.tangent is None or not expected.tangent.any()
    else:
        torch.testing.assert_close(found.tangent, expected.tangent, rtol=1e-13, atol=1e-13)


def test_a_pass_of_an_adapter_multiplies_as_much_as_forward_and_backward() -> None:
    model = cases.adapted(cases.model(hidden_size=64, intermediate_size=128), target_modules="all-linear")
    policy = Policy(model, cases.tokenizer(), StepSettings())
    batch = cases.batch(policy)
    u = {n: torch.ones_like(p) for n, p in policy.parameters.items()}
    flops = {}
    for name, work in (
        ("tokens", lambda: directional_derivative(policy, batch, response_logprob, u, mode="forward")),
        ("floor", lambda: gradient(policy, batch, response_logprob)),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        counts = counter.get_flop_counts()["Global"]
        flops[name] = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert flops["tokens"] <= 1.02 * flops["floor"]
