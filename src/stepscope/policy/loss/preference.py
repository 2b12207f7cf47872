"""Losses of preferences: of the log-probs of a chosen and a rejected response to each prompt.

C and R are the sums of l over the chosen and the rejected response, c and r the same less those of the
reference policy, n their tokens. The response of larger reward is the chosen one. Parameters have the names
of TRL; ``beta`` is the settings'.

Source: TRL 1.16, ``DPOTrainer._compute_loss``, ``CPOTrainer.cpo_loss``. Pinned by
``tests/policy/test_preference_losses.py``, which runs TRL's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from stepscope.errors import BatchError, ConfigError
from stepscope.policy.loss.base import Loss, LossParameters
from stepscope.policy.loss.batch import LossBatch

DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


class DpoParameters(LossParameters):
    """Of ``dpo``.

    Attributes:
        dpo_loss_type: TRL's ``loss_type``, one or several that are added up.
        loss_weights: their weights; None for 1 each.
        label_smoothing: probability that a preference is the wrong way round.
        f_divergence_type: divergence to the reference that the scores belong to.
        f_alpha_divergence_coef: alpha of the last of them.
        discopop_tau: temperature of ``discopop``.
        ld_alpha: weight of the tokens beyond the length of the shorter response; None for 1.
    """

    dpo_loss_type: tuple[DpoLoss, ...] = Field(default=("sigmoid",), min_length=1, strict=False)
    loss_weights: tuple[float, ...] | None = Field(default=None, strict=False)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = Field(default=0.05, gt=0)
    ld_alpha: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.dpo_loss_type):
            raise ValueError("loss_weights must be as many as dpo_loss_type")
        if "exo_pair" in self.dpo_loss_type and self.label_smoothing == 0.0:
            raise ValueError("exo_pair needs a label_smoothing above 0")
        if "robust" in self.dpo_loss_type and self.label_smoothing >= 0.5:
            raise ValueError("robust needs a label_smoothing below 0.5")
        return self


class CpoParameters(LossParameters):
    """Of ``cpo``, which has no reference policy.

    Attributes:
        cpo_loss_type: TRL's ``loss_type``; ``simpo`` and ``ipo`` have means over tokens in place of sums.
        cpo_alpha: weight of the mean of -l over the tokens of the chosen responses.
        simpo_gamma: margin of ``simpo``.
        alpha: AlphaPO's, which has (1 - e^(-alpha C))/alpha in place of C; 0 for C.
        label_smoothing: probability that a preference is the wrong way round.
    """

    cpo_loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


@dataclass(frozen=True)
class Pairs:
    """What losses of preferences are functions of; all but ``nll`` are (pair,).

    Attributes:
        chosen: c.
        rejected: r.
        chosen_score: c, or another divergence's score of it.
        rejected_score: the same of r.
        chosen_tokens: n of the chosen responses.
        rejected_tokens: n of the rejected ones.
        policy: C - R.
        reference: the same of the reference policy.
        nll: mean of -l over all tokens of the chosen responses.
        beta: of the settings.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    policy: Tensor
    reference: Tensor
    nll: Tensor
    beta: float

    @property
    def margin(self) -> Tensor:
        """Beta times the difference of the scores."""
        return self.beta * (self.chosen_score - self.rejected_score)

    @property
    def mean_margin(self) -> Tensor:
        """Difference of the scores per token."""
        chosen, rejected = self.chosen_tokens.clamp(min=1.0), self.rejected_tokens.clamp(min=1.0)
        return self.chosen_score / chosen - self.rejected_score / rejected


def pair_index(batch: LossBatch) -> tuple[Tensor, Tensor]:
    """Rows of the chosen and of the rejected response of each prompt.

    Raises:
        BatchError: a prompt has not two responses of different rewards.
    """
    if batch.group is None or batch.rewards is None:
        raise BatchError("a loss of preferences needs rewards and prompts of its batch; use token_weights")
    chosen, rejected = [], []
    for number in torch.unique(batch.group):
        rows = torch.nonzero(batch.group == number)[:, 0]
        values = batch.rewards[rows]
        if len(rows) != 2 or values[0] == values[1]:
            raise BatchError(
                f"update batch: the prompt of sequence {int(rows[0])} has {len(rows)} responses with rewards "
                f"{', '.join(f'{float(v):g}' for v in values[:4])}, expected two, the chosen with the larger "
                "reward; give a batch of pairs with rewards 1 and 0"
            )
        first = int(values[1] > values[0])
        chosen.append(int(rows[first]))
        rejected.append(int(rows[1 - first]))
    return torch.tensor(chosen), torch.tensor(rejected)


def dpo(batch: LossBatch, own: DpoParameters) -> Tensor:
    """The mean over pairs of :data:`DPO_LOSSES`, weighted and added up (arXiv:2305.18290).

    Raises:
        ConfigError: no reference policy, or beta is 0.
    """
    if batch.ref_logprobs is None or batch.settings.beta == 0.0:
        raise ConfigError(
            "loss_type dpo: it needs beta above 0 and a reference policy; give loss.beta, reference"
        )
    pairs = _pairs(batch, own, batch.ref_logprobs)
    weights = own.loss_weights or (1.0,) * len(own.dpo_loss_type)
    terms = [w * DPO_LOSSES[n](pairs, own).mean() for n, w in zip(own.dpo_loss_type, weights, strict=True)]
    return torch.stack(terms).sum()


def cpo(batch: LossBatch, own: CpoParameters) -> Tensor:
    """-logsigmoid(beta (C - R)) and its kin, plus cpo_alpha times the mean of -l on the chosen responses.

    ``simpo`` has the margin gamma (arXiv:2405.14734); CPO is arXiv:2401.08417, AlphaPO arXiv:2501.03884.
    """
    beta, weight = batch.settings.beta, batch.weight
    totals = (batch.logprobs * weight).sum(-1)
    if own.cpo_loss_type in ("ipo", "simpo"):
        totals = totals / weight.sum(-1)
    chosen, rejected = pair_index(batch)
    if own.alpha != 0.0:
        totals = (1 - torch.exp(-own.alpha * totals)) / own.alpha
    logits = totals[chosen] - totals[rejected]
    if own.cpo_loss_type == "simpo":
        logits = logits - own.simpo_gamma / beta
    if own.cpo_loss_type == "hinge":
        made = torch.relu(1 - beta * logits)
    elif own.cpo_loss_type == "ipo":
        made = (logits - 1 / (2 * beta)) ** 2
    else:
        made = _smoothed(beta * logits, own.label_smoothing)
    return made.mean() + own.cpo_alpha * _nll(batch, chosen)


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -logsigmoid(margin) * (1 - smoothing) - logsigmoid(-margin) * smoothing


def _nll(batch: LossBatch, chosen: Tensor) -> Tensor:
    weight = batch.weight[chosen]
    return -(batch.logprobs[chosen] * weight).sum() / weight.sum()


def _pairs(batch: LossBatch, own: DpoParameters, ref_logprobs: Tensor) -> Pairs:
    chosen, rejected = pair_index(batch)
    weight = batch.weight
    tokens = weight.sum(-1)
    counted = weight
    if own.ld_alpha is not None:
        shared = torch.empty_like(tokens)
        shared[chosen] = shared[rejected] = torch.minimum(tokens[chosen], tokens[rejected])
        counted = torch.where(weight.cumsum(-1) <= shared[:, None], weight, own.ld_alpha * weight)
    totals, reference = (batch.logprobs * counted).sum(-1), (ref_logprobs * counted).sum(-1)
    ratios = totals - reference
    scores = _score(ratios, own)
    return Pairs(
        chosen=ratios[chosen],
        rejected=ratios[rejected],
        chosen_score=scores[chosen],
        rejected_score=scores[rejected],
        chosen_tokens=tokens[chosen],
        rejected_tokens=tokens[rejected],
        policy=totals[chosen] - totals[rejected],
        reference=reference[chosen] - reference[rejected],
        nll=_nll(batch, chosen),
        beta=batch.settings.beta,
    )


def _score(ratios: Tensor, own: DpoParameters) -> Tensor:
    """f'(t) of the divergence at t = e^ratio (arXiv:2309.16240)."""
    away = own.f_alpha_divergence_coef - 1.0
    match own.f_divergence_type:
        case "forward_kl":
            return 1 - torch.exp(-ratios)
        case "js_divergence":
            return math.log(2) + logsigmoid(ratios)
        case "alpha_divergence" if abs(away) >= 1e-6:
            return (torch.exp((away * ratios).clamp(max=80.0)) - 1.0) / away
    return ratios


def _exo_pair(p: Pairs, own: DpoParameters) -> Tensor:
    epsilon = own.label_smoothing
    for_chosen = torch.sigmoid(p.margin) * (logsigmoid(p.margin) - math.log1p(-epsilon))
    return for_chosen + torch.sigmoid(-p.margin) * (logsigmoid(-p.margin) - math.log(epsilon))


def _robust(p: Pairs, own: DpoParameters) -> Tensor:
    epsilon = own.label_smoothing
    clean, flipped = -(1 - epsilon) * logsigmoid(p.margin), -epsilon * logsigmoid(-p.margin)
    return (clean - flipped) / (1 - 2 * epsilon)


def _nca_pair(p: Pairs, own: DpoParameters) -> Tensor:
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _aot(p: Pairs, own: DpoParameters) -> Tensor:
    return _smoothed(
        p.beta * (torch.sort(p.policy).values - torch.sort(p.reference).values), own.label_smoothing
    )


def _aot_unpaired(p: Pairs, own: DpoParameters) -> Tensor:
    return _smoothed(
        p.beta * (torch.sort(p.chosen).values - torch.sort(p.rejected).values), own.label_smoothing
    )


def _discopop(p: Pairs, own: DpoParameters) -> Tensor:
    share = torch.sigmoid(p.margin / own.discopop_tau)
    return -logsigmoid(p.margin) * (1 - share) + torch.exp(-p.margin) * share


DPO_LOSSES: dict[str, Callable[[Pairs, DpoParameters], Tensor]] = {
    "sigmoid": lambda p, own: -logsigmoid(p.margin),
    "hinge": lambda p, own: torch.relu(1 - p.margin),
    "ipo": lambda p, own: (p.mean_margin - 1 / (2 * p.beta)) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": lambda p, own: -logsigmoid(p.beta * p.chosen) - logsigmoid(-p.beta * p.rejected),
    "sppo_hard": lambda p, own: (p.chosen - 0.5 / p.beta) ** 2 + (p.rejected + 0.5 / p.beta) ** 2,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": lambda p, own: 1 - torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected),
    "apo_down": lambda p, own: (
        torch.sigmoid(p.beta * p.chosen) + 1 - torch.sigmoid(p.beta * (p.chosen - p.rejected))
    ),
    "discopop": _discopop,
    "sft": lambda p, own: p.nll.expand(len(p.chosen)),
    "sigmoid_norm": lambda p, own: -logsigmoid(p.beta * p.mean_margin),
}
"""(pair,) loss by TRL's name."""

LOSSES = (
    Loss("dpo", dpo, DpoParameters, aggregation="", pairs=True),
    Loss("cpo", cpo, CpoParameters, aggregation="", pairs=True, reference=False),
)
