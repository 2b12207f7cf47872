"""stepscope: one reinforcement-learning step of a language model under the microscope.

The names below are the public interface. They are loaded on first use, so that ``import stepscope`` costs
nothing until a model is touched.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepscope.errors import StepscopeError
    from stepscope.evaluation import evaluate
    from stepscope.measure.change import Change, ChangePoint, measure_change
    from stepscope.measure.criteria import Criterion, TokenFacts, known_criteria
    from stepscope.measure.fisher import fisher_kernel
    from stepscope.measure.influence import Influence, influence
    from stepscope.measure.leaderboard import Leaderboard, rank_criteria
    from stepscope.measure.noise_scale import noise_scale
    from stepscope.measure.properties import property_study
    from stepscope.measure.quantities import Quantity, make_quantity
    from stepscope.measure.restep import drop_rules, resteps
    from stepscope.measure.rounding import RoundedStep, rounded_step
    from stepscope.measure.step import Step, reconstruct_step
    from stepscope.policy.checkpoint import load_checkpoint
    from stepscope.policy.rollouts import sample_rollouts
    from stepscope.policy.settings import StepSettings
    from stepscope.policy.state import OptimizerState, Policy
    from stepscope.report import write_report
    from stepscope.results import Rollouts
    from stepscope.stats import Estimate
    from stepscope.tasks import Task, load_task
    from stepscope.training.probes import StepProbe

    __version__: str

__all__ = [
    "Change",
    "ChangePoint",
    "Criterion",
    "Estimate",
    "Influence",
    "Leaderboard",
    "OptimizerState",
    "Policy",
    "Quantity",
    "Rollouts",
    "RoundedStep",
    "Step",
    "StepProbe",
    "StepSettings",
    "StepscopeError",
    "Task",
    "TokenFacts",
    "__version__",
    "drop_rules",
    "evaluate",
    "fisher_kernel",
    "influence",
    "known_criteria",
    "load_checkpoint",
    "load_task",
    "make_quantity",
    "measure_change",
    "noise_scale",
    "property_study",
    "rank_criteria",
    "reconstruct_step",
    "resteps",
    "rounded_step",
    "sample_rollouts",
    "write_report",
]

_HOME = {
    "Change": "measure.change",
    "ChangePoint": "measure.change",
    "Criterion": "measure.criteria",
    "Estimate": "stats",
    "Influence": "measure.influence",
    "Leaderboard": "measure.leaderboard",
    "OptimizerState": "policy.state",
    "Policy": "policy.state",
    "Quantity": "measure.quantities",
    "Rollouts": "results",
    "RoundedStep": "measure.rounding",
    "Step": "measure.step",
    "StepProbe": "training.probes",
    "StepSettings": "policy.settings",
    "StepscopeError": "errors",
    "Task": "tasks",
    "TokenFacts": "measure.criteria",
    "drop_rules": "measure.restep",
    "evaluate": "evaluation",
    "fisher_kernel": "measure.fisher",
    "influence": "measure.influence",
    "known_criteria": "measure.criteria",
    "load_checkpoint": "policy.checkpoint",
    "load_task": "tasks",
    "make_quantity": "measure.quantities",
    "measure_change": "measure.change",
    "noise_scale": "measure.noise_scale",
    "property_study": "measure.properties",
    "rank_criteria": "measure.leaderboard",
    "reconstruct_step": "measure.step",
    "resteps": "measure.restep",
    "rounded_step": "measure.rounding",
    "sample_rollouts": "policy.rollouts",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        return version("stepscope")
    if name not in _HOME:
        raise AttributeError(f"module 'stepscope' has no attribute {name!r}")
    value = getattr(import_module(f"stepscope.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
