"""Whether a run's loss balances the routers of a mixture of experts."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from stepscope.policy.loss.settings import StepSettings


def router_coefficient(model: nn.Module, settings: StepSettings) -> float:
    """Weight of the router loss in the run's loss: its own setting, or else the model's config, as TRL.

    Args:
        model: without an adapter around it.
        settings: of the run.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    if not hasattr(text, "output_router_logits"):
        return 0.0
    own = settings.router_loss
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0) if own is None else own
