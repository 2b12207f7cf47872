"""The kernel of the last layer alone, and the influence that goes through it: from a forward pass, exactly.

With a_t = (e_y - pi)/T at token t, h_t the state before it and W the head's weight, grad_W l_t = a_t h_t':

    tokens      K(t, t') = (h_t . h_t')(a_t . a_t')
    sequences   K(i, j) = sum over t of i, t' of j
    influence   w_t grad_W l_t . P . mean over tokens s of *other* prompts of grad F_s

grad F_s = -S_s h_s'/T at fixed prefixes (S_v = pi_v (log pi_v + H)), and (R_s - b_s) a_s h_s' more on policy.
That is the head's part of K and of the influence; a bias that is trained makes h one number longer, a 1.
Where the head is also the embedding, the parameter's gradient has a part that runs through the whole network,
and is not in it (:func:`tied_parts` measures it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.quantity.baselines import position_mean
from stepscope.policy.gradients.derivatives import response_logprob
from stepscope.policy.gradients.layer_gradient import LayerGradient
from stepscope.policy.gradients.stream import SequenceGradients, stream
from stepscope.policy.last_layer import LastLayer
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, Rollouts


def token_kernel(layer: LastLayer) -> FloatArray:
    """(tok, tok) K of single tokens, P = 1; holds one such matrix, and chunks of the vocabulary beside."""
    directions = torch.zeros((len(layer), len(layer)), dtype=torch.float64, device=layer.hidden.device)
    for _, a, _ in layer.chunks():
        directions += (a @ a.T).double()
    found = directions * (layer.inputs @ layer.inputs.T).double()
    return np.asarray(found.cpu().numpy(), dtype=np.float64)


def sequence_kernel(
    layer: LastLayer, rollouts: Rollouts, metrics: Mapping[str, ParameterVector | None]
) -> dict[str, FloatArray]:
    """Metric to (seq, seq) K of the last layer, through (seq, some of the vocabulary, hidden) gradients.

    Args:
        layer: of the batch.
        rollouts: the batch.
        metrics: name to P by parameter, or None for the identity; those that the head is not in are left out.
    """
    counts = rollouts.num_policy_tokens.tolist()
    chosen = _of_head(layer, metrics)
    total = {m: np.zeros((len(counts), len(counts))) for m in chosen}
    inputs = layer.inputs
    for some, a, _ in layer.chunks(len(counts) * inputs.shape[1]):
        gradients = _by_sequence(a, inputs, counts)
        for name, metric in chosen.items():
            scaled = gradients if metric is None else gradients * metric[some].to(gradients)
            total[name] += _products(scaled, gradients)
    return total


def layer_kernels(layer: LastLayer, rollouts: Rollouts, states: Sequence[Tensor]) -> FloatArray:
    """(layer, seq, seq) sums of (h_t . h_t')(a_t . a_t') with the states of each layer in place of the last.

    A layer's part of K is (h_t . h_t')(d_t . d_t'), d the gradient at its output, which a forward pass does
    not know: here the last layer's stands for it.

    Args:
        layer: of the batch.
        rollouts: the batch.
        states: (tok, hidden) of each layer, from :func:`stepscope.policy.last_layer.layer_states`.
    """
    counts = rollouts.num_policy_tokens.tolist()
    total = np.zeros((len(states), len(counts), len(counts)))
    for _, a, _ in layer.chunks(len(counts) * max(h.shape[1] for h in states)):
        for own, h in zip(total, states, strict=True):
            gradients = _by_sequence(a, h, counts)
            own += _products(gradients, gradients)
    return total


def _by_sequence(a: Tensor, hidden: Tensor, counts: list[int]) -> Tensor:
    """(seq, some, hidden) sum over a sequence's tokens of a_t h_t'."""
    rows = zip(torch.split(a, counts), torch.split(hidden, counts), strict=True)
    return torch.stack([own.T @ h for own, h in rows])


def _products(left: Tensor, right: Tensor) -> FloatArray:
    found = (left.flatten(1) @ right.flatten(1).T).double().cpu().numpy()
    return np.asarray(found, dtype=np.float64)


def entropy_influence(
    layer: LastLayer,
    rollouts: Rollouts,
    weights: FloatArray,
    metrics: Mapping[str, ParameterVector | None],
) -> dict[tuple[str, str], FloatArray]:
    """Metric and version to (tok,) influence through the last layer on the entropy at other prompts' tokens.

    Nats per token and unit of lr, as :func:`stepscope.measure.influence.attribution.influence` through all
    layers on a probe batch. A token's own prompt is left out, so that the figure says what it does to
    prompts that it does not belong to; of a batch with one prompt it is 0.

    Args:
        layer: of the batch.
        rollouts: the batch; b_s is the position mean over other prompts.
        weights: (tok,) w.
        metrics: as in :func:`sequence_kernel`.

    Raises:
        MeasurementError: not one weight for each token.
    """
    if weights.shape != (len(layer),):
        raise MeasurementError(f"weights: got shape {weights.shape}, expected ({len(layer)},), one per token")
    owner, _ = rollouts.places
    prompt = rollouts.prompt_index[owner]
    members = [torch.from_numpy(np.flatnonzero(prompt == g)) for g in range(int(prompt.max()) + 1)]
    members = [places.to(layer.hidden.device) for places in members]
    left = torch.from_numpy(_returns(rollouts)).to(layer.hidden)
    chosen = _of_head(layer, metrics)
    inputs = layer.inputs
    states = [inputs[places] for places in members]
    zero = torch.zeros(len(layer), dtype=torch.float64, device=layer.hidden.device)
    found = {(m, v): zero.clone() for m in chosen for v in ("fixed_prefix", "on_policy")}
    for some, a, of_entropy in layer.chunks(2 * len(members) * inputs.shape[1]):
        slopes = {"fixed_prefix": of_entropy, "on_policy": of_entropy + left[:, None] * a}
        for version, slope in slopes.items():
            parts = torch.stack([slope[p].T @ h for p, h in zip(members, states, strict=True)])
            others = parts.sum(0) - parts
            for name, metric in chosen.items():
                pulled = others if metric is None else others * metric[some].to(others)
                for places, h, u in zip(members, states, pulled, strict=True):
                    found[name, version][places] += ((a[places] @ u) * h).sum(1).double()
    sizes = np.bincount(prompt)
    scale = weights / np.maximum(len(layer) - sizes[prompt], 1)
    return {key: np.asarray(scale * values.cpu().numpy(), dtype=np.float64) for key, values in found.items()}


def _returns(rollouts: Rollouts) -> FloatArray:
    """(tok,) R_s - b_s: entropy after a token, centred, less that of other prompts at the position."""
    owner, place = rollouts.places
    entropy = rollouts.flat(rollouts.entropies)
    shape = (len(rollouts), int(place.max()) + 1)
    values, mask = np.zeros(shape), np.zeros(shape, dtype=np.bool_)
    values[owner, place], mask[owner, place] = entropy - entropy.mean(), True
    after = values[:, ::-1].cumsum(1)[:, ::-1] - values
    return np.asarray((after - position_mean(after, mask, rollouts.prompt_index))[owner, place], np.float64)


def _of_head(layer: LastLayer, metrics: Mapping[str, ParameterVector | None]) -> dict[str, Tensor | None]:
    """The head's part of each metric; a metric of other parameters alone is none of the head's."""
    found: dict[str, Tensor | None] = {}
    for name, metric in metrics.items():
        if metric is None:
            found[name] = None
        elif layer.parameter in metric:
            parts = [metric[layer.parameter]]
            if layer.bias_parameter:
                parts.append(metric[layer.bias_parameter][:, None])
            found[name] = torch.cat(parts, 1)
    return found


def tied_parts(
    policy: Policy, rollouts: Rollouts, layer: LastLayer, *, budget: Budget = Budget()
) -> dict[str, FloatArray]:
    """(seq,) squared length of the parts of the tied matrix' gradient of S_i: one pass with gradients.

    ``head`` is the last layer's kernel on its diagonal, ``embedding`` the part through the input, ``cross``
    twice their product; the three add up to the parameter's share of K(i, i), P = 1. Where the head is not
    tied, only ``head`` is not 0.

    Args:
        policy: its trainable parameters are differentiated.
        rollouts: the sequences.
        layer: of them.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the head is not trained.
    """
    if not layer.parameter:
        raise MeasurementError("the head's weight is not trained, so that no gradient has a part in it")
    gradients = SequenceGradients(rollouts, response_logprob)
    found = {name: np.zeros(len(rollouts)) for name in ("head", "embedding", "cross")}
    order = gradients.order
    ends = np.cumsum(rollouts.num_policy_tokens)

    def consume(gradient: LayerGradient, rows: slice) -> None:
        if gradient.name != layer.parameter:
            return
        for i, whole in zip(order[rows], gradient.dense().double(), strict=True):
            own = layer.of(slice(int(ends[i] - rollouts.num_policy_tokens[i]), int(ends[i])))
            for some, a, _ in own.chunks(layer.hidden.shape[1]):
                head = (a.T @ own.hidden).double()
                rest = (whole.T if gradient.transposed else whole)[some] - head
                found["head"][i] += head.square().sum().item()
                found["embedding"][i] += rest.square().sum().item()
                found["cross"][i] += 2 * (head * rest).sum().item()

    stream(policy, gradients, consume, order=order, budget=budget)
    return found
