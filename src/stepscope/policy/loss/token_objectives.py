"""Objectives that change what each token counts: advantages per token in place of advantages per sequence.

A loss -min(r A, clip(r) A) whose A is a number per token covers masks and weights, w A with w >= 0, and,
where clipping is off, any further term whose derivative by the log-prob is known: TRL's own loss runs
unchanged on the advantages that :func:`token_advantages` makes. Training and measurement both call it.

Everything is a function of what the policy says before the update and of the advantages, with no gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import ConfigError, MeasurementError

ENTROPY_BONUS = "entropy_bonus"
"""Objective that adds coefficient x mean entropy to what is maximised: no function of the log-probs."""

INFLUENCE = "influence"
"""Objective that looks at measured influences."""

UNCLIPPED = 1e9
"""Upper clip range that no ratio reaches."""

RELEASED_FLOOR = 0.02
"""Smallest normaliser of STEER's released code, which keeps weights near 1 where no token matters."""


@dataclass(frozen=True)
class TokenTable:
    """What an objective may look at, of the tokens of one optimizer step.

    Attributes:
        logprobs: (seq, tok) l = log pi(y_k|s_k) of the policy to be updated, nats.
        old_logprobs: (seq, tok) the same of the policy that sampled.
        entropies: (seq, tok) H_k of the policy to be updated, nats.
        advantages: (seq, tok) A, the same along each sequence.
        mask: (seq, tok) True on response tokens that are in the loss.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range of the ratio.
        discriminators: (seq, tok) sum_v pi_v^2 (log pi_v + H_k), where the objective needs it.
        entropy_influence: (seq, tok) what the token adds to the change of the entropy by the step that the
            loss would take as it is, nats per unit of lr, where the objective needs it.
        reward_influence: (seq, tok) the same for the expected reward.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    entropies: Tensor
    advantages: Tensor
    mask: Tensor
    epsilon_low: float
    epsilon_high: float
    discriminators: Tensor | None = None
    entropy_influence: Tensor | None = None
    reward_influence: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """(seq, tok) r = pi/pi_old."""
        return torch.exp(self.logprobs - self.old_logprobs)

    @property
    def clipped(self) -> Tensor:
        """(seq, tok) True where PPO's clipping leaves the token without gradient."""
        high = (self.advantages > 0) & (self.ratio > 1 + self.epsilon_high)
        low = (self.advantages < 0) & (self.ratio < 1 - self.epsilon_low)
        return high | low

    def rows(self, chosen: slice | Tensor) -> TokenTable:
        """The table of some sequences."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        taken: dict[str, Any] = {n: v[chosen] for n, v in values if isinstance(v, Tensor)}
        return replace(self, **taken)


def clip_cov(
    table: TokenTable, random: np.random.Generator, *, fraction: float, low: float, high: float
) -> Tensor:
    """Clip-Cov: A, and 0 on max(1, int(fraction N)) tokens drawn among those with low < Cov < high.

    Cov_k = (l_k - mean l)(A_k - mean A), means over the N tokens. Tokens that PPO clips are no candidates.

    Source: Cui et al. 2025 (arXiv:2505.22617), Eq. 10; verl's ``compute_policy_loss_clip_cov``.
    """
    cov = _covariance(table)
    candidates = table.mask & ~table.clipped & (cov > low) & (cov < high)
    places = np.flatnonzero(candidates.cpu().numpy())
    count = max(1, int(fraction * int(table.mask.sum())))
    dropped = torch.zeros_like(table.mask).flatten()
    dropped[torch.from_numpy(random.permutation(places)[:count]).to(dropped.device)] = True
    return table.advantages.masked_fill(dropped.view_as(table.mask), 0.0)


def kl_cov(table: TokenTable, random: np.random.Generator, *, fraction: float, coefficient: float) -> Tensor:
    """KL-Cov: the gradient of -r A + coefficient |log r| on the tokens of highest Cov, of -r A elsewhere.

    Cov as in :func:`clip_cov`; max(1, int(fraction N)) tokens are penalised. As d|log r|/dl = sign(log r) and
    dr/dl = r, the advantage A - coefficient sign(log r)/r has that gradient in an unclipped loss; on-policy
    the penalty's is 0.

    Raises:
        ConfigError: PPO's clipping is on.

    Source: Cui et al. 2025 (arXiv:2505.22617); verl's ``compute_policy_loss_kl_cov``.
    """
    if table.epsilon_low < 1 or table.epsilon_high < UNCLIPPED:
        raise ConfigError(
            f"kl_cov: the ratio is clipped to {1 - table.epsilon_low:g} ... {1 + table.epsilon_high:g}, and "
            f"this objective has no clipping; set epsilon_low to 1 and epsilon_high to {UNCLIPPED:g}"
        )
    chosen = _largest(_covariance(table), table.mask, max(1, int(fraction * int(table.mask.sum()))))
    pull = coefficient * torch.sign(table.logprobs - table.old_logprobs) / table.ratio
    return table.advantages - torch.where(chosen, pull, 0.0)


def top_entropy(table: TokenTable, random: np.random.Generator, *, fraction: float) -> Tensor:
    """A where H_k is at or above the (1 - fraction)-quantile of the entropies, 0 elsewhere.

    Source: Wang et al. 2025 (arXiv:2506.01939); TRL's ``GRPOTrainer.get_high_entropy_mask``.
    """
    threshold = np.quantile(table.entropies[table.mask].cpu().numpy(), 1 - fraction)
    return table.advantages * (table.entropies >= float(threshold))


def reweighting(table: TokenTable, random: np.random.Generator, *, alpha: float) -> Tensor:
    """A (alpha p + 1 - alpha) with p = exp(l).

    Source: Yang et al. 2025 (arXiv:2505.12929), advantage reweighting.
    """
    return table.advantages * (alpha * torch.exp(table.logprobs) + 1 - alpha)


def steer(table: TokenTable, random: np.random.Generator, *, form: str, min_weight: float) -> Tensor:
    """STEER: A min_weight^(|Omega_k| / max |Omega|), Omega the token's own tabular entropy change.

    ``theorem``: Omega = r A p (1 - p)(l + H), 0 where PPO clips. ``released``: A/p_old instead of r A, which
    is a factor p more, no clipping, and the maximum at least 0.02.

    Source: Hao et al. 2025 (arXiv:2510.10150), Theorem 1 and ``core_algos.py`` of its code.
    """
    p = torch.exp(table.logprobs)
    change = table.advantages * p * (1 - p) * (table.logprobs + table.entropies)
    if form == "theorem":
        change = (change * table.ratio).masked_fill(table.clipped, 0.0)
    else:
        change = change / torch.exp(table.old_logprobs)
    size = change.abs().masked_fill(~table.mask, 0.0)
    largest = float(size.max())
    if form == "released":
        largest = max(largest, RELEASED_FLOOR)
    if largest == 0.0:
        return table.advantages
    return table.advantages * torch.exp(math.log(min_weight) * size / largest)


def discriminator(
    table: TokenTable, random: np.random.Generator, *, form: str, threshold: float, max_fraction: float
) -> Tensor:
    """A, and 0 on tokens with A < 0 and D_k > threshold std(D): those that lower entropy most.

    With S = p (l + H): ``vocabulary`` D = E_{v~pi}[S_v] - S, so that r A D is the exact entropy change of a
    tabular softmax policy; ``batch`` D = mean S - S. The standard deviation is over all N tokens; at most
    int(max_fraction N) tokens leave, those of largest D.

    Raises:
        MeasurementError: ``vocabulary`` without ``discriminators``.

    Source: Wang et al. 2026 (arXiv:2602.03392), Theorem 3.3, Clip_V and Clip_B.
    """
    scores = torch.exp(table.logprobs) * (table.logprobs + table.entropies)
    if form == "batch":
        deviation = scores[table.mask].mean() - scores
    elif table.discriminators is None:
        raise MeasurementError(
            "discriminator: the form `vocabulary` needs sum_v pi_v^2 (log pi_v + H) of every position, got "
            "none; pass those of policy.rollouts.score_discriminators"
        )
    else:
        deviation = table.discriminators - scores
    limit = threshold * deviation[table.mask].std(correction=0)
    candidates = table.mask & (table.advantages < 0) & (deviation > limit)
    dropped = _largest(deviation, candidates, int(max_fraction * int(table.mask.sum())))
    return table.advantages.masked_fill(dropped, 0.0)


def influence(
    table: TokenTable,
    random: np.random.Generator,
    *,
    fraction: float,
    price: float,
    weight: float,
    num_prompts: int,
) -> Tensor:
    """A, and weight A on the tokens that were measured to cost the most entropy for the reward they buy.

    With I_H and I_R the token's influence on entropy and expected reward, candidates have I_H < 0 and
    -I_H > price I_R; the int(fraction N) of largest -I_H - price I_R among them are weighted. Price 0 takes
    those that lower entropy most, whatever they buy; ``num_prompts`` was the size of the probe batch.

    Raises:
        MeasurementError: the table has no influences.

    Source: DESIGN 3.4 to 3.7; no published method. The first-order condition of reward + entropy/price.
    """
    if table.entropy_influence is None or table.reward_influence is None:
        raise MeasurementError(
            "influence: the objective needs every token's influence on entropy and reward, got none; pass "
            "those of measure.token_influence"
        )
    cost = -table.entropy_influence - price * table.reward_influence
    candidates = table.mask & (table.entropy_influence < 0) & (cost > 0)
    chosen = _largest(cost, candidates, int(fraction * int(table.mask.sum())))
    return torch.where(chosen, weight * table.advantages, table.advantages)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "top_entropy": top_entropy,
    "reweighting": reweighting,
    "steer": steer,
    "discriminator": discriminator,
    INFLUENCE: influence,
}
"""Objectives by the name under which a checkpoint records them, with their parameters."""


def token_advantages(objective: Mapping[str, Any], table: TokenTable, *, seed: int, step: int) -> Tensor:
    """Advantages of an objective, token by token, (seq, tok) and zero outside the mask.

    Args:
        objective: ``name``, the parameters of the function of that name, and ``micro_batch_size``: its means,
            quantiles and maxima are over that many sequences in turn, or over the whole table for None.
        table: the tokens of one optimizer step.
        seed: the run's seed; together with ``step`` it decides every random draw.
        step: optimizer steps taken so far.

    Raises:
        ConfigError: the objective is unknown or its parameters are not those of the function.
    """
    problem = objective_problem(objective)
    if problem or objective["name"] not in OBJECTIVES:
        raise ConfigError(
            f"objective: {problem or 'entropy_bonus changes no advantage'}; use one of "
            f"{', '.join(OBJECTIVES)} with its parameters"
        )
    parameters = {n: v for n, v in objective.items() if n not in ("name", "micro_batch_size")}
    random = np.random.default_rng([seed, step])
    function, count = OBJECTIVES[objective["name"]], len(table.mask)
    size = objective["micro_batch_size"] or count
    made = []
    for start in range(0, count, size):
        part = table.rows(slice(start, start + size))
        made.append(function(part, random, **parameters) if part.mask.any() else part.advantages)
    return torch.cat(made).masked_fill(~table.mask, 0.0)


def objective_problem(objective: Mapping[str, Any]) -> str:
    """What is wrong with the record of an objective; empty where it is understood."""
    name = objective.get("name")
    if name == ENTROPY_BONUS:
        parameters = ["coefficient"]
    elif name in OBJECTIVES:
        parameters = list(inspect.signature(OBJECTIVES[name]).parameters)[2:]
    else:
        return f"unknown name {name!r}"
    odd = sorted({"name", "micro_batch_size", *parameters} ^ set(objective))
    return f"{name} {'has no' if odd[0] in objective else 'needs a'} parameter {odd[0]}" if odd else ""


def _covariance(table: TokenTable) -> Tensor:
    """(seq, tok) Cov_k = (l_k - mean l)(A_k - mean A), means over the masked tokens."""
    logprobs, advantages = table.logprobs, table.advantages
    return (logprobs - logprobs[table.mask].mean()) * (advantages - advantages[table.mask].mean())


def _largest(values: Tensor, candidates: Tensor, count: int) -> Tensor:
    """(seq, tok) True on the ``count`` candidates of largest value, the first of equal ones."""
    scores = values.masked_fill(~candidates, -math.inf).flatten()
    order = torch.argsort(scores, descending=True, stable=True)[: min(count, int(candidates.sum()))]
    chosen = torch.zeros_like(candidates).flatten()
    chosen[order] = True
    return chosen.view_as(candidates)
