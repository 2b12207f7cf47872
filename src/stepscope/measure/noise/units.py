"""What a batch has many of, alike and independent: the unit of its noise."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stepscope.policy.loss.hypo import HypoParameters, pairs_and_samples
from stepscope.policy.loss.registry import loss_named
from stepscope.policy.loss.settings import StepSettings
from stepscope.results import IntArray, Rollouts

UNLIKE = (
    "the responses of a prompt are a chosen and a rejected one, not draws of one distribution, so noise "
    "within prompts is not defined"
)
"""Of a loss of preferences: why its noise is not divided."""


def noise_units(update: Rollouts, settings: StepSettings) -> tuple[IntArray, str]:
    """Units of the noise: prompts; for HyPO a pair together with the samples of one prompt.

    A step of HyPO has as many pairs as prompts that are sampled, each drawn at random. Taken one by one, the
    difference between the two would pass for noise, which more of both do not have.

    Args:
        update: the update batch.
        settings: the loss.

    Returns:
        (seq,) number of each sequence's unit, from 0; and why the sequences of one are not alike, or nothing.

    Raises:
        BatchError: the batch is none that the loss can be of.
    """
    prompts = update.prompt_index
    loss = loss_named(settings.loss_type)
    own = loss.read(settings.loss_parameters)
    if not isinstance(own, HypoParameters):
        return prompts, UNLIKE if loss.pairs else ""
    rewards, group = torch.from_numpy(np.asarray(update.rewards)), torch.from_numpy(update.group_index)
    pairs, samples = pairs_and_samples(rewards, group, own.kl_group_size)
    ends = prompts[pairs[::2].numpy()], prompts[samples[:: own.kl_group_size].numpy()]
    links = coo_array((np.ones(len(ends[0])), ends), shape=(update.num_prompts,) * 2)
    return connected_components(links, directed=False)[1][prompts].astype(np.int64), UNLIKE
