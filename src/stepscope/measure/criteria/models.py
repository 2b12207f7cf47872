"""Criteria that are models of the kernel: influence through the last layer alone, from a forward pass.

Criteria of the literature model what a token does at its own position. These know what it does at others:
the product of two tokens' gradients in the head's weight is (h_t . h_s)(e_y - pi_t) . (-S_s)/T^2, with S_v =
pi_v (log pi_v + H), and is summed over all positions of *other* prompts of the update batch
(:func:`stepscope.measure.kernel.last_layer.entropy_influence`). They never see the probe batch that the truth
is measured on, nor the own prompt: what they know of it is known of prompts that they have not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from stepscope.measure.criteria.criterion import model
from stepscope.measure.kernel.last_layer import entropy_influence
from stepscope.measure.step.reconstruct import Step
from stepscope.policy.last_layer import LastLayer, UnknownHeadError, last_layer
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray

logger = logging.getLogger(__name__)

Predict = Callable[[LastLayer, Step], Mapping[str, FloatArray]]

_PREDICTING: list[Predict] = []


def predicts(formulas: Mapping[str, str]) -> Callable[[Predict], Predict]:
    """Make a function of the last layer and the step criteria of the kind ``model``.

    Args:
        formulas: name of each criterion to its formula. The function returns (tok,) influences by these
            names, nats per token and unit of lr; one that it leaves out is not ranked.
    """

    def register(predict: Predict) -> Predict:
        for name, formula in formulas.items():
            model(name, formula)
        _PREDICTING.append(predict)
        return predict

    return register


_NAMES = {
    ("sgd", "fixed_prefix"): "last_layer",
    ("adamw", "fixed_prefix"): "last_layer_p",
    ("adamw", "on_policy"): "last_layer_on_policy",
}

_THROUGH = "through the last layer alone: w (e_y - pi) h' . {} . mean of {} over other prompts of the batch"


@predicts(
    {
        "last_layer": _THROUGH.format("1", "-S h'"),
        "last_layer_p": _THROUGH.format("P", "-S h'"),
        "last_layer_on_policy": _THROUGH.format("P", "(R - b)(e_y - pi) h' - S h'"),
    }
)
def _through_last_layer(layer: LastLayer, step: Step) -> dict[str, FloatArray]:
    """Without those that take the optimizer's P where the head is not trained."""
    weights = step.update.flat(step.token_weights)
    found = entropy_influence(layer, step.update, weights, {"sgd": None, "adamw": step.metric()})
    return {name: found[key] for key, name in _NAMES.items() if key in found}


def modelled_influence(policy: Policy, step: Step, *, budget: Budget = Budget()) -> dict[str, FloatArray]:
    """Name to (tok,) what the models here predict of the update batch's tokens: one forward pass.

    Empty, with a line in the log, for a model whose head is not a plain linear layer.

    Args:
        policy: where the step starts.
        step: the step.
        budget: what may be used at a time.
    """
    try:
        layer = last_layer(policy, step.update, budget=budget)
    except UnknownHeadError as error:
        logger.warning("criteria of the last layer are left out: %s", error)
        return {}
    found: dict[str, FloatArray] = {}
    for predict in _PREDICTING:
        found |= predict(layer, step)
    return found
