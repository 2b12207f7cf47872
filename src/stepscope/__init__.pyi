"""The public names of stepscope and where they live: read by type checkers, and by the package itself."""

from .errors import StepscopeError as StepscopeError
from .evaluation import evaluate as evaluate
from .measure.change.measured import measure_change as measure_change
from .measure.change.options import ChangeOptions as ChangeOptions
from .measure.criteria.criterion import Criterion as Criterion
from .measure.criteria.criterion import known_criteria as known_criteria
from .measure.criteria.leaderboard import Leaderboard as Leaderboard
from .measure.criteria.leaderboard import rank_criteria as rank_criteria
from .measure.criteria.pareto import drop_rules as drop_rules
from .measure.criteria.pareto import resteps as resteps
from .measure.criteria.regression import property_study as property_study
from .measure.influence.attribution import Influence as Influence
from .measure.influence.attribution import InfluenceOptions as InfluenceOptions
from .measure.influence.attribution import influence as influence
from .measure.kernel.fisher import FisherKernel as FisherKernel
from .measure.kernel.fisher import fisher_kernel as fisher_kernel
from .measure.noise.scale import noise_scale as noise_scale
from .measure.quantity.base import Quantity as Quantity
from .measure.quantity.base import make_quantity as make_quantity
from .measure.step.reconstruct import Step as Step
from .measure.step.reconstruct import reconstruct_step as reconstruct_step
from .measure.step.rounding import RoundedStep as RoundedStep
from .measure.step.rounding import rounded_step as rounded_step
from .policy.checkpoint.load import load_checkpoint as load_checkpoint
from .policy.loss.settings import StepSettings as StepSettings
from .policy.optim.base import OptimizerState as OptimizerState
from .policy.rollouts import sample_rollouts as sample_rollouts
from .policy.state import Policy as Policy
from .reading.measurement import Measurement as Measurement
from .reading.measurement import load_measurement as load_measurement
from .report import write_report as write_report
from .results import Rollouts as Rollouts
from .results.change import Change as Change
from .results.change import ChangePoint as ChangePoint
from .results.criteria import Pareto as Pareto
from .results.criteria import Regression as Regression
from .results.noise import NoiseScale as NoiseScale
from .results.noise import NoiseScales as NoiseScales
from .rules import TokenFacts as TokenFacts
from .stats import Estimate as Estimate
from .tasks import Task as Task
from .tasks import load_task as load_task
from .training.probe.callback import StepProbe as StepProbe

__version__: str
