"""Cheap criteria against the measured effect of every token: ground truths, leaderboard, what dropping buys.

Importing the package fills the registry of criteria.
"""

from stepscope.measure.criteria import models, sequences, tokens  # noqa: F401
