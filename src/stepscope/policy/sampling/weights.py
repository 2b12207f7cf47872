"""The weights of a policy as an engine loads them: a plain folder, adapters merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from stepscope.policy.forward import base_model
from stepscope.policy.state import Policy


def is_adapter(policy: Policy) -> bool:
    """Whether PEFT's adapters are what was trained."""
    return hasattr(policy.model, "peft_config")


def write_merged(policy: Policy, folder: Path) -> None:
    """Write weights, with adapters merged into them, and tokenizer as transformers lays them out.

    The policy itself stays as it is; while adapters are merged there are two copies of its weights.

    Args:
        policy: with a tokenizer.
        folder: where to; is made.
    """
    model: Any = policy.model
    if is_adapter(policy):
        model = copy.deepcopy(policy.model).merge_and_unload()  # type: ignore[operator]
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def how_to_serve(policy: Policy) -> str:
    """What to start so that a server has this policy, in words."""
    path = policy.path or "CHECKPOINT"
    flags = "--generation-config vllm --logprobs-mode processed_logprobs"
    merged = f"vllm serve {path} {flags}"
    if not is_adapter(policy):
        return (
            f"serve the checkpoint: `{merged}`, or `python -m sglang.launch_server --model-path {path}` "
            "(checkpoints of other formats after `stepscope convert`)"
        )
    base = getattr(getattr(base_model(policy.model), "config", None), "_name_or_path", "") or "BASE"
    return (
        f"serve its base with the adapter, `vllm serve {base} --enable-lora --lora-modules policy={path} "
        f"--max-lora-rank R {flags}` and sampler.model=policy, or the merged weights that `stepscope convert "
        f"{path} FOLDER --merged` writes"
    )
