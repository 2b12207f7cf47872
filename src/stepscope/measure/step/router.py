"""Mixtures of experts: computed so that they can be differentiated, and the loss that balances their routers.

transformers multiplies all experts at once (``grouped_mm``), which has no forward mode; the plain loop over
experts computes the same and has. The router of each layer chooses the largest of its probabilities, so a
quantity of the policy is smooth but for parameters at which the choice of some token flips: derivatives are
those of the choice as it is, the true change has the flips in it.

The auxiliary loss of Switch Transformer (Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6), as
transformers computes it over all layers and all tokens of a micro-batch, prompts included: experts x
sum_e (share of tokens sent to e) (mean router probability of e). TRL adds it to its loss with the
coefficient of its own argument, or else of the model's config.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepscope.policy.forward import base_model, forward_inputs, make_batch, plain_experts
from stepscope.policy.loss.router import router_coefficient
from stepscope.policy.numerics.precision import matching_precision
from stepscope.policy.sharding import pulled_back, resharded
from stepscope.policy.state import Policy
from stepscope.results import Rollouts


def router_gradient(policy: Policy, rollouts: Rollouts) -> dict[str, Tensor]:
    """-coefficient x gradient of the mean router loss of the batch's micro-batches; empty without a loss.

    Micro-batches are cut in the batch's own order (TRL shuffles first, which ``check`` tells). Truncated
    responses are left out where the loss masks them.
    """
    coefficient = router_coefficient(base_model(policy.model), policy.settings)
    if coefficient == 0.0:
        return {}
    size = policy.settings.micro_batch_size or len(rollouts)
    params = policy.parameters
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    starts = range(0, len(rollouts), size)
    for start in starts:
        rows = range(start, min(start + size, len(rollouts)))
        value = router_loss(policy, rollouts, rows)
        grads = pulled_back(policy.model, value, list(params.values()), same=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                total[name] -= coefficient / len(starts) * grad
    return total


def router_loss(policy: Policy, rollouts: Rollouts, rows: range) -> Tensor:
    """The router loss of some sequences taken together, differentiable in the model's parameters."""
    prompts = [rollouts.prompt_token_ids[i] for i in rows]
    responses = [rollouts.response_token_ids[i] for i in rows]
    batch = make_batch(prompts, responses, device=policy.device)
    if policy.settings.mask_truncated:
        gone = torch.from_numpy(rollouts.truncated[list(rows)]).to(policy.device)
        width = batch.response_ids.shape[1]
        batch.attention_mask[:, -width:] *= ~gone[:, None]
    inputs = forward_inputs(policy.model, batch, positions=1)
    with matching_precision(policy.model), plain_experts(policy.model), resharded(policy.model):
        loss: Tensor = policy.model(**inputs, output_router_logits=True).aux_loss
    return loss
