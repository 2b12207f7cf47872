"""How good a checkpoint is: pass@k, format, length, entropy and surprisal, each with its error.

Every standard error is clustered by prompt: samples of one prompt are not independent.
"""

from __future__ import annotations

from stepscope.evaluation.compare import compared, differences, transitions
from stepscope.evaluation.entropy_law import fit_entropy_law, fit_run
from stepscope.evaluation.figures import evaluate, evaluate_rollouts
from stepscope.evaluation.responses import write_responses
from stepscope.results.evaluation import (
    EvaluationRow,
    PromptResult,
    Transitions,
    prompts_path,
    read_eval,
    write_eval,
)

__all__ = [
    "EvaluationRow",
    "PromptResult",
    "Transitions",
    "compared",
    "differences",
    "evaluate",
    "evaluate_rollouts",
    "fit_entropy_law",
    "fit_run",
    "prompts_path",
    "read_eval",
    "transitions",
    "write_eval",
    "write_responses",
]
