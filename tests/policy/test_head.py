"""Logits made for a few positions at a time: the same numbers, and no tensor larger than a piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.measure.quantity.base import make_quantity, readings_of
from stepscope.measure.quantity.values import derivatives, hidden_states, values_at
from stepscope.policy import head
from stepscope.policy.forward import TokenBatch, TokenOutputs, base_model, forward, make_batch
from stepscope.policy.gradients.derivatives import directional_derivative, gradient
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.products import per_sequence_dot, per_sequence_dots, weighted_gradients
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}
LORA = {"target_modules": ["q_proj", "lm_head"]}
PROMPTS = [(5, 6, 7, 8), (8, 9), (4,)]
RESPONSES = [(10, 1), (15, 16, 17, 18, 19, 3, 2), (13, 14, 11, 12, 1)]


def batch() -> Rollouts:
    return cases.rollouts(PROMPTS, RESPONSES, temperature=0.7)


def policy_of(model: nn.Module) -> Policy:
    return Policy(lift_model(model), None, StepSettings(temperature=0.7))


def what_is_said(outputs: TokenOutputs, rows: TokenBatch) -> Tensor:
    return outputs.logprobs * outputs.logprobs.detach() + outputs.entropies


@contextmanager
def pieces(monkeypatch: pytest.MonkeyPatch, numbers: int) -> Iterator[None]:
    """A block in which so many logits of float64 are made at a time."""
    with monkeypatch.context() as patch:
        patch.setattr(head, "PIECE_BYTES", 8 * numbers)
        patch.setattr(head, "FEWEST", 0)
        yield


def random_direction(policy: Policy) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.parameters.items()}


def figures(policy: Policy) -> dict[str, Tensor]:
    """All that is computed of a batch: values, and first derivatives in every way there is."""
    update, u = batch(), random_direction(policy)
    one = SequenceGradients(update, what_is_said)
    rows = make_batch(PROMPTS, RESPONSES)
    with torch.no_grad():
        said = forward(policy.model, rows, temperature=0.7, keep_hidden=True, keep_squares=True)
    assert said.hidden is not None
    assert said.collisions is not None
    assert said.discriminators is not None
    found = {
        "values": torch.stack([said.logprobs, said.entropies, said.collisions, said.discriminators]),
        "hidden": said.hidden * rows.response_mask.unsqueeze(-1),
        "dot": torch.from_numpy(per_sequence_dot(policy, one, u)),
        "dots": torch.from_numpy(per_sequence_dots(policy, one, {n: t[None] for n, t in u.items()})),
        "gram": gram(policy, one),
        "preconditioned": gram(policy, one, preconditioner={n: t.square() for n, t in u.items()}),
        "cross": gram(policy, one, other=one),
    }
    found |= {f"gradient of {n}": g for n, g in gradient(policy, update, what_is_said).items()}
    found |= {
        f"sums of {n}": g for n, g in weighted_gradients(policy, one, np.array([[1.0, -2.0, 3.0]])).items()
    }
    for mode in ("forward", "double_backward"):
        derivative = directional_derivative(policy, update, what_is_said, u, mode=mode)  # type: ignore[arg-type]
        found[mode] = torch.cat(derivative)
    return found


def same(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    whole = figures(policy)
    with pieces(monkeypatch, 3 * 2 * len(cases.CHARACTERS)):  # three sequences, two positions
        rows = make_batch(PROMPTS, RESPONSES).response_ids
        cut = head.head_of(policy.model, base_model(policy.model), rows, inside=_as_it_is)
        assert cut is not None
        assert cut.size == 2
        in_pieces = figures(policy)
    for name, expected in whole.items():
        torch.testing.assert_close(
            in_pieces[name], expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@pytest.mark.parametrize("architecture", [*cases.ARCHITECTURES, *SCALED])
def test_pieces_say_what_the_whole_says(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    shape = SCALED.get(architecture, {})
    same(monkeypatch, policy_of(cases.model(architecture, **shape)))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]])
def test_adapted_heads(monkeypatch: pytest.MonkeyPatch, targets: list[str]) -> None:
    untied = cases.model("llama")
    same(monkeypatch, policy_of(cases.adapted(untied, target_modules=targets)))


def test_only_the_head_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    same(monkeypatch, policy_of(model))


def test_a_model_that_cannot_be_cut_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT's forward pass does not go through the part that it names as its backbone."""
    policy = policy_of(cases.model("opt", ffn_dim=32, word_embed_proj_dim=16, do_layer_norm_before=True))
    rows = make_batch(PROMPTS, RESPONSES).response_ids
    with pieces(monkeypatch, 1):
        assert head.head_of(policy.model, policy.model, rows, inside=_as_it_is) is None


def divergence(policy: Policy, update: Rollouts, reference: nn.Module | None) -> SequenceGradients:
    """The KL divergence from another model, or from that under the adapter, per sequence."""
    kl = make_quantity("kl", update, policy=policy, reference=reference)
    readings = partial(readings_of, [kl])
    return SequenceGradients(update, kl.prefix_values, as_trained=False, readings=readings)


@pytest.mark.parametrize("adapter", [False, True])
def test_divergences_in_pieces(monkeypatch: pytest.MonkeyPatch, adapter: bool) -> None:
    model = cases.model("llama")
    policy = policy_of(cases.adapted(model, **LORA) if adapter else model)
    reference = None if adapter else lift_model(cases.model("gemma2", seed=1, **SCALED["gemma2"]))
    update, u = batch(), random_direction(policy)
    one = divergence(policy, update, reference)
    kl = make_quantity("kl", update, policy=policy, reference=reference)

    def found() -> dict[str, Tensor]:
        tables = values_at(policy, update, [kl]), *derivatives(policy, update, [kl], u, order=2)
        return {
            "values and slopes": torch.from_numpy(np.stack([table.prefix for table in tables])),
            "products": torch.from_numpy(per_sequence_dot(policy, one, u)),
            "kernel": gram(policy, one, preconditioner={n: t.square() for n, t in u.items()}),
        }

    whole = found()
    assert float(whole["values and slopes"].abs().min(0).values.max()) > 0
    with pieces(monkeypatch, 3 * 2 * len(cases.CHARACTERS)):
        in_pieces = found()
    torch.testing.assert_close(in_pieces, whole, rtol=1e-11, atol=1e-12)
    slopes = torch.from_numpy(derivatives(policy, update, [kl], u)[0].prefix).sum((0, -1))
    torch.testing.assert_close(whole["products"], slopes, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("adapter", [False, True])
def test_no_tensor_is_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch, adapter: bool) -> None:
    vocabulary, hidden = 997, 16
    model = cases.model("llama", vocab_size=vocabulary)
    if adapter:
        model = cases.adapted(model, **LORA)
    policy = replace(policy_of(model), settings=StepSettings())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocabulary, (2, 60), generator=generator).tolist()
    update = cases.rollouts([row[:3] for row in ids], [row[3:] for row in ids], temperature=1.0)
    u = random_direction(policy)
    one = SequenceGradients(update, what_is_said)
    reference = None if adapter else lift_model(cases.model("llama", seed=1, vocab_size=vocabulary))
    kl = make_quantity("kl", update, policy=policy, reference=reference)
    apart = divergence(policy, update, reference)
    per_sequence_dot(policy, one, u)  # the check of how parameters are covered is done once

    def logits(tensor: Tensor) -> bool:
        return vocabulary in tensor.shape and cases.numbers_held(tensor) != vocabulary * hidden  # of the head

    runs: dict[str, Callable[[], object]] = {
        "gradient": lambda: gradient(policy, update, what_is_said),
        "forward": lambda: directional_derivative(policy, update, what_is_said, u, mode="forward"),
        "per sequence": lambda: per_sequence_dot(policy, one, u),
        "divergence": lambda: values_at(policy, update, [kl]),
        "divergence forward": lambda: derivatives(policy, update, [kl], u, order=2),
        "divergence per sequence": lambda: per_sequence_dot(policy, apart, u),
        "hidden states": lambda: hidden_states(policy, update),
    }
    for name, run in runs.items():
        with pieces(monkeypatch, 2 * 4 * vocabulary), cases.Largest(logits) as largest:
            run()
        assert 0 < largest.found <= 2 * 4 * vocabulary, name
    gradients = 2 * vocabulary * (2 if adapter else hidden)  # of the head, of both sequences
    with pieces(monkeypatch, 2 * 4 * vocabulary), cases.Largest(logits) as largest:
        gram(policy, one)
    assert 0 < largest.found <= gradients + 2 * 4 * vocabulary
