"""What the policy says about a batch on the line params + lr * direction: per-token values and derivatives.

Everything that the estimators need is a small table of numbers per response token: log-prob and quantity
values, at shifted parameters or differentiated along the line. The tables are float64 numpy arrays of shape
(seq, tok), zero on padding, so that all estimator algebra happens in float64 whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stepscope.errors import MeasurementError
from stepscope.measure.quantity.base import Quantity, readings_of
from stepscope.policy.forward import TokenBatch, forward
from stepscope.policy.gradients.derivatives import Values, pushed_forward
from stepscope.policy.group import current
from stepscope.policy.numerics.attention import mathematical_attention
from stepscope.policy.numerics.differentiation import whole_function
from stepscope.policy.numerics.nested import SmoothActivations
from stepscope.policy.passes import Budget, sweep, sweep_rows
from stepscope.policy.sharding import along
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, shifted
from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts

Slopes = tuple[tuple[Tensor, Tensor, Tensor], ...]
"""For each order: derivatives of log-probs, prefix values and token values."""

SHARE_OF_BEND = 0.1
"""Step of the differences that check second derivatives, of the distance at which some token changes."""

SECOND_TOLERANCE = 0.05
"""Largest share of the second derivatives by which the differences may miss them."""

ROUND_OFFS = 100
"""Machine epsilons of a first derivative that its computation may be off."""


@dataclass(frozen=True)
class TokenValues:
    """Numbers per response token, zero on padding.

    Attributes:
        logprobs: (seq, tok) l_k, or a derivative of it.
        prefix: (quantity, seq, tok) prefix values, or a derivative.
        token: (quantity, seq, tok) token values, or a derivative.
        doubt: why the numbers may be wrong; empty where nothing speaks against them.
    """

    logprobs: FloatArray
    prefix: FloatArray
    token: FloatArray
    doubt: str = ""

    def select(self, indices: IntArray) -> TokenValues:
        """The rows of some sequences, with repeats if asked."""
        rows = self.logprobs[indices], self.prefix[..., indices, :], self.token[..., indices, :]
        return TokenValues(*rows, doubt=self.doubt)

    def quantity(self, index: int) -> TokenValues:
        """Those of one quantity; the leading axis of ``prefix`` and ``token`` is gone."""
        return TokenValues(self.logprobs, self.prefix[index], self.token[index], doubt=self.doubt)


def response_mask(rollouts: Rollouts) -> BoolArray:
    """(seq, tok) True on response tokens that the policy wrote."""
    found = np.zeros((len(rollouts), int(rollouts.num_tokens.max())), dtype=np.bool_)
    found[rollouts.places] = True
    return found


def values_at(
    policy: Policy,
    rollouts: Rollouts,
    quantities: Sequence[Quantity],
    direction: ParameterVector | None = None,
    lr: float = 0.0,
    *,
    budget: Budget = Budget(),
) -> TokenValues:
    """Log-probs and quantity values at ``params + lr * direction``; the parameters are restored bitwise.

    Args:
        policy: the policy; not changed.
        rollouts: the sequences.
        quantities: what to evaluate, all in the same pass.
        direction: None evaluates at the parameters themselves.
        lr: learning rate.
        budget: what may be used at a time.

    Raises:
        MeasurementError: a value is not finite.
    """
    table = _Collector(rollouts, len(quantities))
    moved = {} if direction is None else direction
    with torch.no_grad(), shifted(policy.parameters, moved, lr):
        values = _reader(policy, rollouts, quantities)
        for batch, found in sweep(policy, rollouts, values, budget=budget):
            table.add(batch, *found)
    return table.result(f"value at lr {lr:g}")


def _reader(
    policy: Policy, rollouts: Rollouts, quantities: Sequence[Quantity]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Reads (seq, tok) log-probs, and (quantity, seq, tok) prefix and token values, off a micro-batch.

    Its second argument makes parameter values to use instead of the policy's own.
    """

    def read(batch: TokenBatch, params: Values | None = None) -> tuple[Tensor, Tensor, Tensor]:
        outputs = forward(
            policy.model,
            batch,
            temperature=rollouts.temperature,
            params=params,
            readings=readings_of(quantities, batch),
        )
        prefix = torch.stack([q.prefix_values(outputs, batch) for q in quantities])
        token = torch.stack([q.token_values(outputs, batch) for q in quantities])
        return outputs.logprobs, prefix, token

    return read


def derivatives(
    policy: Policy,
    rollouts: Rollouts,
    quantities: Sequence[Quantity],
    direction: ParameterVector,
    *,
    order: int = 1,
    budget: Budget = Budget(),
) -> tuple[TokenValues, ...]:
    """First (and second) derivative in lr, at lr = 0, of every token's values, in forward mode.

    Order 2 nests two forward modes. No graph is kept: memory is that of two (four) forward passes of a
    micro-batch. Attention runs on the mathematical backend, the only one with a forward-mode rule. Second
    derivatives of the first micro-batch are checked against differences of first ones; where the two differ,
    the table of second derivatives carries the doubt.

    Args:
        policy: the policy; not changed.
        rollouts: the sequences.
        quantities: what to differentiate, all in the same pass.
        direction: of the line.
        order: 1 or 2.
        budget: what may be used at a time.

    Returns:
        One table per order.

    Raises:
        MeasurementError: torch has no forward-mode rule for some operation of this model, or a derivative is
            not finite.
    """
    read = _reader(policy, rollouts, quantities)
    tables = [_Collector(rollouts, len(quantities)) for _ in range(order)]
    zero = torch.zeros((), dtype=policy.dtype, device=policy.device)
    one = torch.ones_like(zero)
    doubt: str | None = None

    def slopes_of(batch: TokenBatch) -> Slopes:
        nonlocal doubt

        def stacked(moved: Values) -> Tensor:
            logprobs, prefix, token = read(batch, moved)
            return torch.cat([logprobs.unsqueeze(0), prefix, token])

        def values(lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return read(batch, along(direction, lr))

        def slopes(lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            found: tuple[Tensor, Tensor, Tensor] = torch.func.jvp(values, (lr,), (one,))[1]
            return found

        whole = whole_function(policy.model)
        with torch.no_grad(), mathematical_attention(), whole, _rules(order):
            if order == 1:
                first = pushed_forward(stacked, direction)
                prefix, token = first[1:].chunk(2)
                return ((first[0], prefix, token),)
            with SmoothActivations():
                both: Slopes = torch.func.jvp(slopes, (zero,), (one,))
            if doubt is None:
                eps = torch.finfo(policy.dtype).eps
                doubt = second_doubt(
                    lambda lr: slopes(lr)[0], both[0][0], both[1][0], batch.response_mask, eps
                )
            return both

    for batch, found in sweep(policy, rollouts, slopes_of, budget=budget):
        for table, slope in zip(tables, found, strict=True):
            table.add(batch, *slope)
    first, *second = (t.result(f"derivative {i}") for i, t in enumerate(tables, 1))
    doubt = current().from_main(lambda: doubt)  # of the longest sequences
    return (first, *(replace(table, doubt=doubt or "") for table in second))


@contextmanager
def _rules(order: int) -> Iterator[None]:
    """Name the way out where torch has no forward-mode rule for an operation of the model."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "setup_context" not in str(error):
            raise
        cure = "measure it without second order" if order == 2 else "load the model without custom kernels"
        raise MeasurementError(
            f"torch cannot differentiate this model in forward mode, order {order} ({error}); {cure}"
        ) from error


def second_doubt(
    slope: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, mask: Tensor, eps: float
) -> str:
    """Compare second derivatives of the log-probs with differences of first ones, which torch gets right.

    The step of the difference suits the curvature: a tenth of the distance at which the token that bends most
    changes, since the truncation of a central difference grows with the square of that share. Where the two
    differ it is made smaller as long as round-off lets a twentieth be seen.

    Args:
        slope: (seq, tok) first derivatives at a learning rate.
        first: (seq, tok) first derivatives at 0.
        second: (seq, tok) second derivatives at 0.
        mask: (seq, tok) True on response tokens.
        eps: machine epsilon of the model's arithmetic.

    Returns:
        How far they are apart at best, if by more than a twentieth and more than round-off; else "".
    """
    group = current()
    agreed = group.most if group.lockstep else float  # all go the same number of rounds
    count = max(1, int(mask.sum()))

    def typical(values: Tensor) -> float:
        return agreed(float((values[mask].square().sum() / count).sqrt()))

    speed, size = typical(first), typical(second)
    if speed == 0 or size == 0:
        return ""
    largest = (float((t * mask).abs().max()) for t in (first, second))
    fastest = agreed(max(next(largest), next(largest) ** 0.5))
    reach = min(eps ** (1 / 3) / speed, SHARE_OF_BEND / fastest)
    smallest = float("inf")
    while True:
        stop = torch.as_tensor(reach, dtype=first.dtype, device=first.device)
        by_difference = (slope(stop) - slope(-stop)) / (2 * stop)
        error = typical(by_difference - second)
        if error <= SECOND_TOLERANCE * size + ROUND_OFFS * eps * speed / reach:
            return ""
        smallest = min(smallest, error)
        reach /= 8
        if not ROUND_OFFS * eps * speed / reach < SECOND_TOLERANCE * size:
            return (
                f"second derivatives in nested forward mode and differences of first ones are {smallest:.1e} "
                f"apart, of {size:.1e}: torch may have no correct rule for some function of this model"
            )


class _Collector:
    """Puts the rows of micro-batches at their place in the whole batch."""

    def __init__(self, rollouts: Rollouts, num_quantities: int) -> None:
        shape = (len(rollouts), int(rollouts.num_tokens.max()))
        self.logprobs = np.zeros(shape)
        self.prefix = np.zeros((num_quantities, *shape))
        self.token = np.zeros((num_quantities, *shape))

    def add(self, batch: TokenBatch, logprobs: Tensor, prefix: Tensor, token: Tensor) -> None:
        rows = batch.seq_index.cpu().numpy()
        width = batch.response_ids.shape[1]
        mask = batch.response_mask
        self.logprobs[rows, :width] = (logprobs * mask).double().cpu().numpy()
        self.prefix[:, rows, :width] = (prefix * mask).double().cpu().numpy()
        self.token[:, rows, :width] = (token * mask).double().cpu().numpy()

    def result(self, what: str) -> TokenValues:
        """The whole batch, with the rows of all processes."""
        current().sum_(map(torch.from_numpy, (self.logprobs, self.prefix, self.token)))
        for kind, values in (
            ("log-prob", self.logprobs),
            ("quantity", self.prefix),
            ("quantity", self.token),
        ):
            if not np.isfinite(values).all():
                row, position = np.argwhere(~np.isfinite(values))[0][-2:]
                raise MeasurementError(
                    f"{what} of the {kind} of sequence {row}, response token {position}: not finite; measure "
                    "with --precision float64, or smaller learning rates"
                )
        return TokenValues(self.logprobs, self.prefix, self.token)


def hidden_states(
    policy: Policy, rollouts: Rollouts, *, max_features: int = 256, seed: int = 0, budget: Budget = Budget()
) -> FloatArray:
    """(seq, tok, feature) last hidden state before each response token, zero on padding.

    More than ``max_features`` dimensions are brought down to that by a fixed Gaussian projection, which keeps
    inner products up to a relative error of about 1/sqrt(max_features).

    Args:
        policy: the policy.
        rollouts: the sequences.
        max_features: most features returned.
        seed: of the projection.
        budget: what may be used at a time.
    """
    projection: Tensor | None = None

    def states_of(batch: TokenBatch) -> Tensor:
        nonlocal projection
        with torch.no_grad():
            outputs = forward(policy.model, batch, temperature=rollouts.temperature, keep_hidden=True)
        assert outputs.hidden is not None
        hidden = outputs.hidden.float()
        if hidden.shape[-1] > max_features:
            if projection is None:
                generator = torch.Generator().manual_seed(seed)
                projection = torch.randn(hidden.shape[-1], max_features, generator=generator)
                projection = (projection / max_features**0.5).to(hidden.device)
            hidden = hidden @ projection
        return hidden.cpu()

    rows = sweep_rows(policy, rollouts, states_of, budget=budget)
    return np.asarray(pad_sequence(rows, batch_first=True).double().numpy(), dtype=np.float64)
