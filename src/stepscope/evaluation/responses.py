"""The responses of an evaluation on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stepscope.results import Rollouts, write_table
from stepscope.tasks import Task


def write_responses(
    rollouts: Rollouts, task: Task, path: Path, tokens: Sequence[Sequence[str]] | None = None
) -> None:
    """Write what was sampled, a row per response, so that every count can be checked and read.

    Columns: prompt_id, prompt, response, reward, correct, formatted, truncated, num_tokens, and the sums over
    the response of its log-probs (``logprob``) and position entropies (``entropy``), in nats. With ``tokens``
    also lists over its tokens: texts (``token``), log-probs and entropies (``token_logprob``,
    ``token_entropy``, in single precision).

    Args:
        rollouts: what was sampled.
        task: whose format the responses should keep.
        path: of the file.
        tokens: per sequence (tok,) texts of the response tokens, or None.
    """
    single = pa.list_(pa.float32())
    lists = (
        {
            "token": pa.array([list(row) for row in tokens], pa.list_(pa.string())),
            "token_logprob": pa.array([v.astype(np.float32) for v in rollouts.logprobs], single),
            "token_entropy": pa.array([v.astype(np.float32) for v in rollouts.entropies], single),
        }
        if tokens is not None
        else {}
    )
    write_table(
        pa.table(
            {
                "prompt_id": list(rollouts.prompt_ids),
                "prompt": list(rollouts.prompts),
                "response": list(rollouts.responses),
                "reward": rollouts.rewards,
                "correct": rollouts.correct,
                "formatted": [task.formatted(text) for text in rollouts.responses],
                "truncated": rollouts.truncated,
                "num_tokens": rollouts.num_tokens,
                "logprob": [float(v.sum()) for v in rollouts.logprobs],
                "entropy": rollouts.entropy_per_seq,
                **lists,
            }
        ),
        path,
    )
