"""The exception tree: every error a user can mend.

The command line turns a :class:`StepscopeError` into one line on standard error and exit code 2. Anything
else that escapes is a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations


class StepscopeError(Exception):
    """Something the user can mend. The message says what, where, got against expected, and what to do."""


class ConfigError(StepscopeError):
    """A setting is unknown, missing, of the wrong type, or contradicts another."""


class RunFolderError(StepscopeError):
    """A run folder or one of its artifacts is missing, damaged, or would be overwritten."""


class TaskError(StepscopeError):
    """A task is unknown or its data cannot be read."""


class CheckpointError(StepscopeError):
    """A checkpoint is missing, incomplete, damaged, or does not fit its own optimizer state."""


class TrainingError(StepscopeError):
    """A training cannot go on from where it is."""


class BatchError(StepscopeError):
    """An update or probe batch cannot carry the measurement asked of it."""


class MeasurementError(StepscopeError):
    """The measurement asked for does not exist for this policy or these settings."""
