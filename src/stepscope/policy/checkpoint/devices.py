"""The device that a user asked for, looked at before anything is loaded."""

from __future__ import annotations

import torch

from stepscope.errors import ConfigError


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device, given that tensors can be put there; None for a GPU where there is one.

    Raises:
        ConfigError: torch does not know it, or this machine or this build of torch does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device: {str(device)!r} cannot be used ({reason}); give cpu, or leave it out for a GPU "
            "where there is one"
        ) from error
    if found.type == "meta":
        raise ConfigError("device: 'meta' holds no numbers; give cpu, or leave it out")
    return found
