"""Log-probs of the reference policy: one that is given, or what an adapter started from."""

from __future__ import annotations

from stepscope.errors import MeasurementError
from stepscope.policy.checkpoint.adapters import is_adapted, reference_adapter
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts


def require_reference(policy: Policy, reference: Policy | None) -> None:
    """Refuse a loss that looks at a reference policy where there is none.

    Raises:
        MeasurementError: none is given and the policy is a full model.
    """
    if reference is None and not is_adapted(policy.model):
        settings = policy.settings
        raise MeasurementError(
            f"the loss looks at a reference policy (beta = {settings.beta}, kl_in_reward = "
            f"{settings.kl_in_reward}), and the policy is a full model; pass the policy it is held to as "
            "reference"
        )


def reference_logprobs(
    policy: Policy, update: Rollouts, reference: Policy | None, budget: Budget
) -> tuple[FloatArray, ...]:
    """Log-probs of a batch's responses, one (tok,) array per sequence.

    Args:
        policy: whose reference it is.
        update: the batch.
        reference: the reference policy; None for the model without its adapter, or TRL's adapter ``ref``.
        budget: what may be used at a time.

    Raises:
        MeasurementError: none is given and the policy is a full model.
    """
    require_reference(policy, reference)
    if reference is not None:
        return score_rollouts(reference, update, budget=budget)[0]
    with reference_adapter(policy.model):
        return score_rollouts(policy, update, budget=budget)[0]
