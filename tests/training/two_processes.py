"""Run under torchrun: what each process saw of an objective over the whole step and of a curriculum."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from digits import DigitTask, digit_config, reinforced

from stepscope.training.rl import OnPolicyTrainer
from stepscope.training.shaping import objectives

seen: list[dict[str, Any]] = []
whole = objectives.token_advantages
prepare = OnPolicyTrainer._prepare_inputs


def counted(intervention: Any, tokens: Any, **kwargs: Any) -> Any:
    seen.append({"tokens": len(tokens), "sum": float(tokens.logprob.sum())})
    return whole(intervention, tokens, **kwargs)


def compared(self: OnPolicyTrainer, batch: Any) -> Any:
    found = prepare(self, batch)
    own = self._buffered_inputs[0]["advantages"][:, None]
    mask, shaped = found["completion_mask"].bool(), found["advantages"]
    assert self.curriculum is not None
    seen[-1] |= {
        "own": int(mask.sum()),
        "fits": bool(((shaped == 0) | (shaped == own))[mask].all()),
        "rates": np.nan_to_num(self.curriculum.rates, nan=-1.0).tolist(),
    }
    return found


objectives.token_advantages = counted
OnPolicyTrainer._prepare_inputs = compared
config = digit_config(
    max_resample=2,
    curriculum={"hard_below": 0.3},
    objective={"name": "clip_cov", "fraction": 0.1, "low": 0.0},
)
reinforced(config, Path(sys.argv[1]) / "run", DigitTask(num_dead=8))
every = gather_object([seen])
if torch.distributed.get_rank() == 0:
    (Path(sys.argv[1]) / "seen.json").write_text(json.dumps(every))
