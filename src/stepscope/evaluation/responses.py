"""The responses of an evaluation on disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from stepscope.results import Rollouts, write_table
from stepscope.tasks import Task


def write_responses(rollouts: Rollouts, task: Task, path: Path) -> None:
    """Write what was sampled, a row per response, so that every count can be checked and read.

    Columns: prompt_id, prompt, response, reward, correct, formatted, truncated, num_tokens, and the sums over
    the response of its log-probs (``logprob``) and position entropies (``entropy``), in nats.
    """
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
            }
        ),
        path,
    )
