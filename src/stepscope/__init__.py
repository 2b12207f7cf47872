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
    from stepscope.measure.change.measured import measure_change
    from stepscope.measure.change.options import ChangeOptions
    from stepscope.measure.criteria.criterion import Criterion, known_criteria
    from stepscope.measure.criteria.leaderboard import Leaderboard, rank_criteria
    from stepscope.measure.criteria.pareto import drop_rules, resteps
    from stepscope.measure.criteria.regression import property_study
    from stepscope.measure.influence.attribution import Influence, InfluenceOptions, influence
    from stepscope.measure.kernel.fisher import fisher_kernel
    from stepscope.measure.noise.scale import noise_scale
    from stepscope.measure.quantity.base import Quantity, make_quantity
    from stepscope.measure.step.reconstruct import Step, reconstruct_step
    from stepscope.measure.step.rounding import RoundedStep, rounded_step
    from stepscope.policy.checkpoint.load import load_checkpoint
    from stepscope.policy.loss.settings import StepSettings
    from stepscope.policy.optim.base import OptimizerState
    from stepscope.policy.rollouts import sample_rollouts
    from stepscope.policy.state import Policy
    from stepscope.report import write_report
    from stepscope.results import Rollouts
    from stepscope.results.change import Change, ChangePoint
    from stepscope.rules import TokenFacts
    from stepscope.stats import Estimate
    from stepscope.tasks import Task, load_task
    from stepscope.training.probe.callback import StepProbe

    __version__: str

__all__ = [
    "Change",
    "ChangeOptions",
    "ChangePoint",
    "Criterion",
    "Estimate",
    "Influence",
    "InfluenceOptions",
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
    "Change": "results.change",
    "ChangeOptions": "measure.change.options",
    "ChangePoint": "results.change",
    "Criterion": "measure.criteria.criterion",
    "Estimate": "stats",
    "Influence": "measure.influence.attribution",
    "InfluenceOptions": "measure.influence.attribution",
    "Leaderboard": "measure.criteria.leaderboard",
    "OptimizerState": "policy.optim.base",
    "Policy": "policy.state",
    "Quantity": "measure.quantity.base",
    "Rollouts": "results",
    "RoundedStep": "measure.step.rounding",
    "Step": "measure.step.reconstruct",
    "StepProbe": "training.probe.callback",
    "StepSettings": "policy.loss.settings",
    "StepscopeError": "errors",
    "Task": "tasks",
    "TokenFacts": "rules",
    "drop_rules": "measure.criteria.pareto",
    "evaluate": "evaluation",
    "fisher_kernel": "measure.kernel.fisher",
    "influence": "measure.influence.attribution",
    "known_criteria": "measure.criteria.criterion",
    "load_checkpoint": "policy.checkpoint.load",
    "load_task": "tasks",
    "make_quantity": "measure.quantity.base",
    "measure_change": "measure.change.measured",
    "noise_scale": "measure.noise.scale",
    "property_study": "measure.criteria.regression",
    "rank_criteria": "measure.criteria.leaderboard",
    "reconstruct_step": "measure.step.reconstruct",
    "resteps": "measure.criteria.pareto",
    "rounded_step": "measure.step.rounding",
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
