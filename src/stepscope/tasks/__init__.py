"""What is asked and how an answer is scored; no torch."""

from __future__ import annotations

from stepscope.tasks.formats.templates import Template, load_template
from stepscope.tasks.load import TemplatedTask, load_prompts, load_task
from stepscope.tasks.problem import Problem, Score, Task

__all__ = [
    "Problem",
    "Score",
    "Task",
    "Template",
    "TemplatedTask",
    "load_prompts",
    "load_task",
    "load_template",
]
