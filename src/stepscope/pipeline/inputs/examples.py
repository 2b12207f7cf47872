"""Where rewards are at fault: one response with its prompt and its grade, shown and kept."""

from __future__ import annotations

from pathlib import Path

from stepscope.console import say
from stepscope.errors import RewardError
from stepscope.evaluation import EvaluationRow
from stepscope.policy.group import current
from stepscope.results import read_table
from stepscope.tasks import TemplatedTask
from stepscope.tasks.example import Example
from stepscope.tasks.load import example_of


def shown_and_kept(error: RewardError, file: Path) -> RewardError:
    """Keep the response that an error shows in a file, and say so in the error.

    Args:
        error: what was raised.
        file: where to.
    """
    if not isinstance(error.example, Example) or not current().is_main:
        return error
    error.example.write(file)
    return RewardError(f"{error}. All of it is in {file}")


def say_if_nothing_earns(row: EvaluationRow, task: TemplatedTask, responses: Path, file: Path) -> bool:
    """Warn where no response of an evaluation earned anything, and keep one of them.

    Args:
        row: the evaluation.
        task: that asked and graded.
        responses: all of them, as :func:`stepscope.evaluation.write_responses` left them.
        file: where the one is kept.

    Returns:
        Whether it was warned.
    """
    if row.mean_reward != 0 or row.pass_at_1 != 0:
        return False
    rows = read_table(responses).to_pylist()
    if any(one["reward"] != 0 for one in rows):
        return False
    example = example_of(task, next((one for one in rows if not one["truncated"]), rows[0]))
    example.write(file)
    say(
        f"warning: none of {len(rows)} responses earned anything. For example: {example}. All of it is in "
        f"{file}"
    )
    return True
