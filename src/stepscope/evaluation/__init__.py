"""How good a checkpoint is: pass@k, format, length, entropy and surprisal, each with its error.

Every standard error is clustered by prompt: samples of one prompt are not independent.
"""

from __future__ import annotations

from stepscope.evaluation.compare import Transitions, differences, transitions
from stepscope.evaluation.figures import evaluate, evaluate_rollouts
from stepscope.evaluation.fitting import FittingBatch
from stepscope.evaluation.rows import EvaluationRow, PromptResult
from stepscope.evaluation.tables import prompts_path, read_eval, write_eval, write_responses

__all__ = [
    "EvaluationRow",
    "FittingBatch",
    "PromptResult",
    "Transitions",
    "differences",
    "evaluate",
    "evaluate_rollouts",
    "prompts_path",
    "read_eval",
    "transitions",
    "write_eval",
    "write_responses",
]
