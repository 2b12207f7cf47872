"""A test of the kernel's spectrum whose null keeps unequal gradients, and what one prompt's responses share.

The gradient of a response is a sum over its tokens whose terms have mean zero given their prefixes, so random
signs on the tokens leave its covariance as it is: its length, and how it spreads over the parameters. Let
s G be the gradients of a prompt (or of a response) with such signs. Where nothing couples prompts
(responses), and the law of G does not change under signs, G and s G are exchangeable, each prompt for itself:
a draw of the null takes either for each of them. The share of draws whose statistic reaches the batch's own
is then a p-value, without an asymptotic law: one of equal lengths and directions (Marchenko-Pastur) finds
structure in independent gradients, which are far from isotropic.

``responses``: every response has signs of its own. ``prompts``: responses to a prompt have the same sign at a
position, so that they stay coupled as they are, and only couplings between prompts count.

Copies are merged, and what is left of a prompt was chosen to differ: two responses that part after a shared
start pull apart at the token where they do, and what is left does not average to zero, while signs leave that
to chance. So p leans to large values where a policy repeats itself: of batches drawn from small policies, in
which a fifth to four fifths of the responses were copies, 0 to 7 % had p <= 0.05 (``responses``; within
prompts 0 to 3 %) and 1 to 3 % (``prompts``). A coupling that is found is one; of one that is not found there
may be some. Copies kept as they are lean the other way (8 to 13 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.kernel.structure import cosine_form, eigenvalues, first_copies, token_signs
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.results.models import NullTest

COUPLINGS = ("responses", "prompts")
BETWEEN, WITHIN = "mean squared cosine between prompts", "mean squared cosine within prompts"
STATISTICS = ("largest eigenvalue", BETWEEN, WITHIN)

MOST_ROWS = 16384
"""Most gradients whose products are held: the versions of a batch times its sequences."""


@dataclass(frozen=True, kw_only=True)
class NullOptions:
    """How the null is drawn.

    Attributes:
        signs: versions of each gradient with random signs; each is a pass over the batch and coupling.
        draws: of the null, from these versions.
        seed: of signs and draws.

    Raises:
        MeasurementError: no draws.
    """

    signs: int = 2
    draws: int = 499
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a null that is not drawn."""
        if self.draws < 1:
            raise MeasurementError(f"null of the kernel: {self.draws} draws, expected at least 1")


def prompt_signs(rollouts: Rollouts, *, seed: int = 0) -> tuple[FloatArray, ...]:
    """Random signs of tokens by sequence, the same at a position for all responses to a prompt."""
    longest = int(rollouts.num_tokens.max())
    drawn = np.random.default_rng([seed, 2]).choice([-1.0, 1.0], (rollouts.num_prompts, longest))
    rows = zip(rollouts.prompt_index, rollouts.written, strict=True)
    return tuple(np.where(mask, drawn[g, : len(mask)], 0.0) for g, mask in rows)


def spectrum_tests(
    policy: Policy,
    rollouts: Rollouts,
    *,
    metric: ParameterVector | None = None,
    name: str = "raw",
    options: NullOptions = NullOptions(),
    budget: Budget = Budget(),
) -> tuple[NullTest, ...]:
    """The batch's cosine kernel against both nulls: one pass over 1 + 2 ``signs`` versions of its responses.

    Identical responses to a prompt are one response.

    Args:
        policy: its trainable parameters are differentiated.
        rollouts: the sequences.
        metric: P, or None for the identity.
        name: of the metric.
        options: how the null is drawn.
        budget: what may be used at a time.

    Raises:
        MeasurementError: fewer than two prompts, no signs, or too many sequences.
    """
    distinct = rollouts.select(np.flatnonzero(first_copies(rollouts) == np.arange(len(rollouts))))
    count, versions = len(distinct), 1 + 2 * options.signs
    if options.signs < 1 or distinct.num_prompts < 2 or count * versions > MOST_ROWS:
        raise MeasurementError(
            f"null of the kernel: {count} distinct responses to {distinct.num_prompts} prompts in {versions} "
            f"versions, expected 2 prompts, 1 version with signs and at most {MOST_ROWS} gradients in all; "
            "take another batch or other models.signs"
        )
    ones = tuple(mask.astype(np.float64) for mask in distinct.written)
    by_coupling = {
        "responses": [token_signs(distinct, seed=options.seed + d) for d in range(options.signs)],
        "prompts": [prompt_signs(distinct, seed=options.seed + d) for d in range(options.signs)],
    }
    weights = [
        row for version in (ones, *by_coupling["responses"], *by_coupling["prompts"]) for row in version
    ]
    repeated = distinct.select(np.tile(np.arange(count), versions))
    gradients = SequenceGradients(repeated, weighted_logprobs(weights))
    K = gram(policy, gradients, preconditioner=metric, budget=budget).numpy()
    K = K.reshape(versions, count, versions, count)
    found: list[NullTest] = []
    for number, coupling in enumerate(COUPLINGS):
        chosen = [0, *range(1 + number * options.signs, 1 + (number + 1) * options.signs)]
        units = np.arange(count) if coupling == "responses" else distinct.prompt_index
        part = K[np.ix_(chosen, range(count), chosen, range(count))]
        for statistic, drawn in exchanged(
            part, units, distinct.prompt_index, draws=options.draws, seed=options.seed
        ).items():
            if coupling == "responses" or statistic != WITHIN:  # the other null keeps what is within
                found.append(_test(name, coupling, statistic, drawn))
    return tuple(found)


def exchanged(
    K: FloatArray, units: IntArray, prompts: IntArray, *, draws: int, seed: int = 0
) -> Mapping[str, FloatArray]:
    """Statistic to its (1 + draws,) values: of the batch first, then of draws of the null.

    Args:
        K: (version, seq, version, seq) products of gradients, version 0 the gradients themselves.
        units: (seq,) what takes a version as a whole: the response, or its prompt.
        prompts: (seq,) prompts.
        draws: of the null.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 3])
    rows = np.arange(len(units))
    apart = prompts[:, None] != prompts[None, :]
    within = ~apart & ~np.eye(len(units), dtype=np.bool_)
    values: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for draw in range(1 + draws):
        version = np.zeros(len(units), dtype=np.int64)
        if draw:
            version = rng.integers(len(K), size=int(units.max()) + 1)[units]
        own = cosine_form(K[version[:, None], rows[:, None], version[None, :], rows[None, :]])
        values["largest eigenvalue"].append(float(eigenvalues(own)[0]))
        values[BETWEEN].append(float((own[apart] ** 2).mean()))
        values[WITHIN].append(float((own[within] ** 2).mean()) if within.any() else 0.0)
    return {name: np.array(found) for name, found in values.items()}


def p_value(values: Sequence[float] | FloatArray) -> float:
    """Share of draws that reach the first value, that one among them; round-off apart is reached."""
    found = np.asarray(values)
    return float((found >= found[0] * (1 - 1e-9)).mean())


def _test(metric: str, coupling: str, statistic: str, values: FloatArray) -> NullTest:
    return NullTest(
        metric=metric,
        coupling=coupling,
        statistic=statistic,
        value=float(values[0]),
        null_mean=float(values[1:].mean()),
        null_high=float(np.quantile(values[1:], 0.95)),
        p=p_value(values),
        draws=len(values) - 1,
    )
