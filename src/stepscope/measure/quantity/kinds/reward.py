"""The expected reward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.measure.quantity.base import Quantity
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts


@dataclass(frozen=True, kw_only=True, eq=False)
class Reward(Quantity):
    """E[reward], the reward standing on the last token that the policy wrote.

    Attributes:
        rewards: (seq,) of the batch.
    """

    name = "reward"
    sum_unit = "reward"
    needs_rewards = True
    versions = ("on_policy",)

    rewards: FloatArray | None = None

    def on(self, rollouts: Rollouts, policy: Policy | None, reference: nn.Module | None) -> Reward:
        """With the rewards of the batch."""
        return replace(self, rewards=rollouts.rewards)

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """The reward on the last token, zero elsewhere."""
        if self.rewards is None:
            raise MeasurementError("the reward is that of a batch; make it by make_quantity('reward', batch)")
        like = outputs.logprobs
        rewards = torch.as_tensor(self.rewards, device=like.device)[batch.seq_index].to(like.dtype)
        places = torch.arange(like.shape[1], device=like.device) * batch.response_mask
        last = places.argmax(-1, keepdim=True)
        return torch.zeros_like(like).scatter(-1, last, rewards.unsqueeze(-1))
