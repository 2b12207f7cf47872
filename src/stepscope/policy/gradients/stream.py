"""Per-sequence gradients of any objective, streamed layer by layer at about the cost of one plain backward.

The objective of a micro-batch is differentiated once, for all its sequences together: sequences do not see
each other, so the rows of every layer's output gradient belong to one sequence each. No (seq, params) matrix
is made here; whoever consumes the stream decides what to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.policy import vectors
from stepscope.policy.forward import TokenBatch, forward, make_batch
from stepscope.policy.gradients.capture import Capture
from stepscope.policy.gradients.coverage import Coverage, NotSeparableError, classify, known, settle
from stepscope.policy.gradients.derivatives import Objective, Readings, concerned, nothing_read
from stepscope.policy.gradients.exchange import exchanged
from stepscope.policy.gradients.layer_gradient import LayerGradient, Whole, matrix_shape
from stepscope.policy.group import current
from stepscope.policy.numerics.differentiation import has_detached_parts, whole_function
from stepscope.policy.passes import Budget, TooLargeError, out_of_memory, sweep
from stepscope.policy.sharding import pulled_back, sharded
from stepscope.policy.shards import cut
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

Consume = Callable[[LayerGradient, slice], None]
"""Receives one parameter's gradients and which entries of ``order`` they belong to."""


@dataclass(frozen=True)
class SequenceGradients:
    """Which gradients: of each sequence's own objective, summed over its tokens.

    Attributes:
        rollouts: the sequences.
        objective: (seq,) or (seq, tok) function of the policy's outputs.
        as_trained: leave out what a training does (embeddings of padding tokens, DoRA's norm); otherwise the
            gradients are those of the function.
        readings: what the objective reads off the distributions of a micro-batch beside, by key.
    """

    rollouts: Rollouts
    objective: Objective
    as_trained: bool = True
    readings: Readings = nothing_read

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.rollouts)

    @property
    def order(self) -> list[int]:
        """The sequences whose gradient may be other than 0, longest first."""
        return concerned(self.rollouts, self.objective)

    def value(self, policy: Policy, batch: TokenBatch) -> Tensor:
        """The objective, summed over a micro-batch."""
        temperature, readings = self.rollouts.temperature, self.readings(batch)
        outputs = forward(policy.model, batch, temperature=temperature, readings=readings)
        return self.objective(outputs, batch).sum()


CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def stream(
    policy: Policy,
    gradients: SequenceGradients,
    consume: Consume,
    *,
    order: Sequence[int] | None = None,
    in_parts: bool = False,
    divisible: bool = True,
    budget: Budget = Budget(),
) -> None:
    """Pass each sequence's gradient to ``consume``, parameter by parameter.

    Order of the parameters is that of the backward pass and each comes once per micro-batch, tied uses added
    up; a parameter that the objective does not depend on does not come at all.

    Args:
        policy: its trainable parameters are differentiated.
        gradients: of what.
        consume: called with a :class:`stepscope.policy.gradients.layer_gradient.LayerGradient` of some
            rows and their slice of ``order``.
        order: which sequences, in which order; default this process's share of ``gradients.order``.
        in_parts: a parameter may come several times per micro-batch, with what one use or some positions add;
            for whoever is linear in the gradients, and then no more than a part is held.
        divisible: False where ``consume`` counts on all sequences of the budget's micro-batch at once.
        budget: how large micro-batches are.

    Raises:
        MeasurementError: no trainable parameters, or a module mixes sequences.
    """
    value = partial(gradients.value, policy)
    done = 0
    split = sharded(policy.model) is not None
    group, own = current(), policy.parameters
    chosen = group.share(gradients.order) if order is None else order
    total = len(chosen)

    def rows_of(batch: TokenBatch) -> slice:
        return slice(done, min(done + len(batch) * (group.size if split else 1), total))

    def run(batch: TokenBatch) -> None:
        rows = rows_of(batch)
        begun = False

        def hand_over(gradient: LayerGradient) -> None:
            nonlocal begun
            begun = True
            if split:
                gradient = exchanged(gradient, own[gradient.name], group, rows.stop - rows.start)
            consume(gradient, rows)

        try:
            _differentiate(capture, batch, value, hand_over, in_parts=in_parts)
            for gradient in _one_by_one(policy, coverage.slow, batch, value):
                hand_over(gradient)
        except RuntimeError as error:
            if begun and out_of_memory(error):  # what was handed over cannot be taken back
                raise TooLargeError(*batch.input_ids.shape) from error
            raise

    with nullcontext() if gradients.as_trained else whole_function(policy.model):
        coverage = coverage_of(policy, gradients.rollouts, as_trained=gradients.as_trained)
        capture = Capture(policy.model, coverage, own)
        with capture.installed():
            passes = sweep(
                policy,
                gradients.rollouts,
                run,
                budget=budget,
                order=chosen,
                divisible=divisible,
                what="gradients",
            )
            for batch, _ in passes:
                done = rows_of(batch).stop


def _differentiate(
    capture: Capture,
    batch: TokenBatch,
    value: Callable[[TokenBatch], Tensor],
    deliver: Callable[[LayerGradient], None],
    *,
    in_parts: bool = False,
) -> None:
    with torch.enable_grad(), capture.recording(len(batch)):
        total = value(batch)
    capture.backward(total, deliver, in_parts=in_parts)


def _one_by_one(
    policy: Policy, names: Sequence[str], batch: TokenBatch, value: Callable[[TokenBatch], Tensor]
) -> Iterator[LayerGradient]:
    """The slow path: one forward and backward per sequence, by autograd alone."""
    if not names:
        return
    every = dict(policy.model.named_parameters())
    params = [every[name] for name in names]
    rows = []
    try:
        for param in params:
            param.requires_grad_(True)
        for row in range(len(batch)):
            with torch.enable_grad():
                total = value(batch.row(row))
            rows.append(_grad(total, params))
    finally:
        for param in params:
            param.requires_grad_(False)
    for name, param, grads in zip(names, params, zip(*rows, strict=True), strict=True):
        shape = matrix_shape(param.shape)
        dtype = torch.promote_types(param.dtype, torch.float32)
        values = torch.stack(grads).to(dtype).reshape(len(grads), *shape)
        yield LayerGradient(name, shape, (Whole(values),))


def _grad(total: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(p) for p in params]
    grads = torch.autograd.grad(total, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def coverage_of(policy: Policy, rollouts: Rollouts, *, as_trained: bool = True) -> Coverage:
    """How each trainable parameter is covered: verified on two short rows at first use, then remembered.

    The rows have different lengths, so padding and mixing between sequences are put to the test too. For each
    parameter and row, the captured gradient and autograd's are compared along a random direction.
    """
    variant = as_trained or not has_detached_parts(policy.model)
    found = known(policy, variant)
    if found is not None:
        return found
    coverage = classify(policy)
    batch = make_batch(
        [rollouts.prompt_token_ids[0][-6:], rollouts.prompt_token_ids[-1][-4:]],
        [rollouts.response_token_ids[0][:4], rollouts.response_token_ids[-1][:3]],
        device=policy.device,
    )
    while True:
        try:
            wrong = _mismatches(policy, coverage, batch)
            break
        except NotSeparableError as error:
            coverage = coverage.without({name for _, name in error.tap.params})
    coverage = coverage.without(wrong)
    if coverage.slow and sharded(policy.model) is not None:
        raise MeasurementError(
            f"{coverage.slow[0]}: its gradient by sequence takes a pass for each ({len(coverage.slow)} such "
            "parameters), and sharded models have none; measure without --shard"
        )
    settle(policy, variant, coverage)
    return coverage


def _mismatches(policy: Policy, coverage: Coverage, batch: TokenBatch) -> set[str]:
    params = policy.parameters
    captured: dict[str, Tensor] = {}

    def probe(name: str, like: Tensor) -> Tensor:
        seed = sum(ord(c) * (k + 1) for k, c in enumerate(name))
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

    def consume(gradient: LayerGradient) -> None:
        dtype = torch.promote_types(params[gradient.name].dtype, torch.float32)
        along = probe(gradient.name, params[gradient.name]).to(dtype)
        captured[gradient.name] = gradient.dot(gradient.oriented(along))

    def value(rows: TokenBatch) -> Tensor:
        outputs = forward(policy.model, rows, temperature=1.0)
        return (outputs.logprobs + outputs.entropies).sum()

    capture = Capture(policy.model, coverage, params)
    with capture.installed():
        _differentiate(capture, batch, value, consume)
    wrong: set[str] = set()
    for row in range(len(batch)):
        with torch.enable_grad():
            total = value(batch.row(row))
        grads = pulled_back(policy.model, total, list(params.values()), same=True)
        for (name, param), grad in zip(params.items(), grads, strict=True):
            if name in coverage.slow:
                continue
            found = {name: torch.zeros_like(param) if grad is None else grad}
            expected = vectors.dot(found, {name: cut(probe(name, param), param)})
            got = float(captured[name][row]) if name in captured else 0.0
            scale = vectors.norm(found) + 1e-12
            if not abs(got - expected) <= CHECK_TOLERANCE[param.dtype] * scale:
                wrong.add(name)
    return wrong
