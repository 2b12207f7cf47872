"""Kinship: what the tokens of a step do to the entropy, split by what they act on.

Token (i, k) of the batch of step s moves the parameters by c_s w_ik Q grad l_ik(theta_s), Q the displacement
that a unit of clipped ascent makes elementwise: in its own step, (1 - b1) lr_s/((1 - b1^n) D_s), or over the
rest of the path, where momentum passes it on (:mod:`stepscope.measure.ledger.adjoint` with all gains 1). The
entropy at a context x so changes, to first order from where the step starts, by

    K[x, ik] = c_s w_ik grad H_x . Q . grad l_ik

A *look* is a set of N positions: the batch's own, fresh responses to its prompts, responses to held-out
prompts. What all tokens do to its mean entropy is sum_ik sum_x K[x, ik]/N, at fixed prefixes, and every pair
belongs to one kin: ``same_position`` where x is the context the token stood in, ``same_response`` where it is
another context that its response goes through, ``same_prompt``, ``other_prompts``. The sums come from
gradients of the tokens, of the responses and of the prompts, and no matrix of pairs is made but that between
sequences:

    same position                 sum_ik m_ik K[ik, ik], m_ik how many positions of the look have its context
    with the same response        sum_i (sum_l m_il grad H_il) . Q . (sum_k w_ik grad l_ik)
    with the same prompt, all     sums of the (sequence, sequence) products of these gradients

For held-out prompts there is one more, ``visitation``: what goes through the prefixes that are reached,
the gradient on policy less that at fixed prefixes. (``docs/METHODS.md``; own derivation, held to the matrix
of all pairs in ``tests/measure/test_kinship.py``.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.influence.attribution import Weighted
from stepscope.measure.influence.probe_gradient import ProbeGradient
from stepscope.measure.ledger.adjoint import Adjoint, pull
from stepscope.measure.ledger.contexts import Contexts, Kindred, first_of
from stepscope.measure.ledger.own_position import Units, own_positions
from stepscope.measure.ledger.path import Path
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.measure.step.terms import weighted_entropies
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import response_entropy
from stepscope.policy.gradients.gram import grams
from stepscope.policy.gradients.products import paired_dots, per_sequence_dots
from stepscope.policy.gradients.store import Metrics
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.results.kinship import (
    BATCH,
    HELD_OUT,
    OTHER_PROMPTS,
    SAME_POSITION,
    SAME_PROMPT,
    SAME_RESPONSE,
    VISITATION,
    WHOLE,
    KinFormula,
    KinPart,
    KinStep,
)

NOTHING: FloatArray = np.zeros(0)


def pushes(path: Path, first: int = 0) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """Q of every step, from the last: by how much a unit of -grad Loss before clipping moves each parameter.

    Args:
        path: the training.
        first: step to end with.

    Yields:
        The step, Q of its own step, and Q over the rest of the path.
    """
    after = Adjoint()
    for place in reversed(range(first, len(path))):
        ones = {name: torch.ones_like(t).unsqueeze(0) for name, t in path.parameters(place).items()}
        pulled = pull(path.step(place).taken, ones, after, "fixed")
        after = pulled.before
        own = {name: rows[0] for name, rows in pulled.own.items()}
        yield place, own, {name: own[name] + rows[0] for name, rows in pulled.later.items()}


@dataclass(frozen=True)
class KinOptions:
    """How kinship is measured.

    Attributes:
        tokens: most distinct tokens of a step that are looked at for their own position; at most 4096.
        seed: of their draw.

    Raises:
        MeasurementError: no tokens.
    """

    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a draw of nothing."""
        if self.tokens < 1:
            raise MeasurementError(
                f"kinship: {self.tokens} tokens to look at for their own position, expected at least 1"
            )


@dataclass(frozen=True)
class Split:
    """Kinship of one step at one place.

    Attributes:
        parts: of every look, kin and metric.
        formulas: of tabular theory, at the batch's own positions.
        own_squares: (prompt,) sum of the squared effects on the own position.
        tokens: distinct tokens with a weight.
        drawn: of these, looked at for their own position.
        positions: look to number of positions.
        at_prompts: look to (prompt,) those in answers to each prompt of the batch.
        pairs: look to kin to pairs as in :meth:`stepscope.measure.ledger.contexts.Kindred.pairs`.
        prompts: (seq,) prompt of each sequence of the batch, as parts count them.
    """

    parts: tuple[KinPart, ...]
    formulas: tuple[KinFormula, ...]
    own_squares: FloatArray
    tokens: int
    drawn: int
    positions: Mapping[str, int]
    at_prompts: Mapping[str, IntArray]
    pairs: Mapping[str, Mapping[str, IntArray]]
    prompts: IntArray


def split_by_kin(
    policy: Policy,
    step: Weighted,
    looks: Mapping[str, Rollouts],
    metrics: Mapping[str, ParameterVector],
    *,
    held_out: tuple[ProbeGradient, ProbeGradient] | None = None,
    options: KinOptions = KinOptions(),
    budget: Budget = Budget(),
) -> Split:
    """Split what the tokens of a step do to the mean entropy of several looks by kin.

    Costs, beside the tokens' own positions (:func:`stepscope.measure.ledger.own_position.own_positions`), for
    each look three gradient passes over the batch and one over the look; held-out prompts cost two over the
    batch.

    Args:
        policy: at the place where the step starts; not changed.
        step: its batch and its token weights.
        looks: name to positions in answers to the batch's prompts, sampled at its temperature; ``batch`` is
            the batch itself.
        metrics: name to Q, with the clip coefficient in it; ``whole`` is among them.
        held_out: gradients of the entropy at fixed prefixes and on policy, of responses to other prompts,
            with the same groups.
        options: how many tokens are looked at.
        budget: what may be used at a time.
    """
    contexts = Contexts(step.update)
    units = own_positions(
        policy, step, contexts, metrics, most=options.tokens, seed=options.seed, budget=budget
    )
    parts: list[KinPart] = []
    positions, at_prompts, pairs = {}, {}, {}
    found: dict[str, FloatArray] = {}
    for name, look in looks.items():
        kin = Kindred.of(contexts, look)
        positions[name], at_prompts[name] = kin.positions, kin.by_prompt
        pairs[name] = kin.pairs(contexts, step.token_weights)
        found[name] = _places(step, kin, units)
        parts += _look(policy, step, contexts, (name, look), kin, units, metrics, budget)
    if held_out is not None:
        parts += _held_out(policy, step, contexts, held_out, metrics, budget)
        probe = held_out[0].probe
        positions[HELD_OUT] = int(probe.lengths.sum())
        at_prompts[HELD_OUT] = np.zeros(contexts.num_prompts, dtype=np.int64)
        pushing = np.array([np.count_nonzero(row) for row in step.token_weights])
        many = _members(contexts.prompts, contexts.num_prompts).astype(np.int64) @ pushing
        pairs[HELD_OUT] = {OTHER_PROMPTS: np.stack([many * positions[HELD_OUT], np.zeros_like(many)])}
    squares, moments = units.moments(WHOLE, found[BATCH])
    return Split(
        parts=tuple(parts),
        formulas=tuple(KinFormula(name, *sums) for name, sums in moments.items()),
        own_squares=squares,
        tokens=len(units.weights),
        drawn=units.drawn,
        positions=positions,
        at_prompts=at_prompts,
        pairs=pairs,
        prompts=contexts.prompts,
    )


def kin_step(split: Split, update: Rollouts, number: int) -> KinStep:
    """A step's kinship as it is stored.

    Args:
        split: of the step.
        update: its batch.
        number: of the optimizer step.
    """
    first = first_of(split.prompts)
    return KinStep(
        number=number,
        prompts=tuple(update.prompt_keys[i] for i in first),
        sequence_ids=first,
        tokens=split.tokens,
        drawn=split.drawn,
        positions=split.positions,
        at_prompts=split.at_prompts,
        pairs={look: {kin: int(n[0].sum()) for kin, n in own.items()} for look, own in split.pairs.items()},
        parts=split.parts,
        formulas=split.formulas,
        own_squares=split.own_squares,
    )


def _places(step: Weighted, kin: Kindred, units: Units) -> FloatArray:
    """(unit,) share of the look's positions that a token's own context has."""
    return step.update.flat(kin.at)[units.first] / kin.positions


def _look(
    policy: Policy,
    step: Weighted,
    contexts: Contexts,
    named: tuple[str, Rollouts],
    kin: Kindred,
    units: Units,
    metrics: Metrics,
    budget: Budget,
) -> list[KinPart]:
    """The four kin of one look."""
    name, look = named
    at = _places(step, kin, units)
    pushes = SequenceGradients(step.update, weighted_logprobs(step.token_weights))
    entropies = SequenceGradients(look, response_entropy, as_trained=False)
    between = grams(policy, pushes, metrics=metrics, other=entropies, budget=budget).cross
    along = SequenceGradients(step.update, weighted_entropies(kin.at), as_trained=False)
    paths = paired_dots(policy, pushes, along, metrics, budget=budget)
    asked = _members(contexts.prompts_of(look), contexts.num_prompts)
    pushed = _members(contexts.prompts, contexts.num_prompts)
    parts = []
    for metric in metrics:
        effects = between[metric].numpy() / kin.positions
        by_prompt = asked @ effects @ pushed.T  # (prompt acted on, prompt that acts)
        own = units.summed(metric, at)
        path = pushed @ paths[metric] / kin.positions
        mine, everything = np.diag(by_prompt), effects.sum(0) @ pushed.T
        done = {
            SAME_POSITION: own.by_prompt,
            SAME_RESPONSE: path - own.by_prompt,
            SAME_PROMPT: mine - path,
            OTHER_PROMPTS: everything - mine,
        }
        received = by_prompt.sum(1) - mine
        for label, sums in done.items():
            near = label in (SAME_POSITION, SAME_RESPONSE)
            others = received if label == OTHER_PROMPTS else np.zeros(len(sums))
            parts.append(KinPart(name, label, metric, sums, others, NOTHING, own.variance if near else 0.0))
    return parts


def _held_out(
    policy: Policy,
    step: Weighted,
    contexts: Contexts,
    slopes: tuple[ProbeGradient, ProbeGradient],
    metrics: Mapping[str, ParameterVector],
    budget: Budget,
) -> list[KinPart]:
    """Other prompts, and the prefixes that are reached."""
    pushes = SequenceGradients(step.update, weighted_logprobs(step.token_weights))
    pushed = _members(contexts.prompts, contexts.num_prompts)
    found = []
    for slope in slopes:
        stacks = [vectors.multiply(metric, slope.parts) for metric in metrics.values()]
        rows = {n: torch.cat([stack[n] for stack in stacks]) for n in stacks[0]}
        products = per_sequence_dots(policy, pushes, rows, budget=budget)
        by_metric = np.split(products, len(stacks))
        found.append(
            {
                name: (own[:-1].sum(0) / len(slope.groups) @ pushed.T, slope.residuals(own).sum(1))
                for name, own in zip(metrics, by_metric, strict=True)
            }
        )
    nothing, parts = np.zeros(contexts.num_prompts), []
    for name in metrics:
        (fixed, error), (free, all_errors) = (each[name] for each in found)
        parts.append(KinPart(HELD_OUT, OTHER_PROMPTS, name, fixed, nothing, error, 0.0))
        parts.append(KinPart(HELD_OUT, VISITATION, name, free - fixed, nothing, all_errors - error, 0.0))
    return parts


def _members(numbers: IntArray, count: int) -> FloatArray:
    """(number, seq) 1 where the sequence has the number; those beyond ``count`` have none."""
    return np.asarray(numbers[None, :] == np.arange(count)[:, None], dtype=np.float64)
