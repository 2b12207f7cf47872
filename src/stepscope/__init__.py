"""stepscope: one reinforcement-learning step of a language model under the microscope.

The public names stand in ``__init__.pyi`` and are loaded on first use, so that ``import stepscope`` costs
nothing until a model is touched.
"""

from importlib.metadata import version
from typing import Any

from lazy_loader import attach_stub

from stepscope.first_use import loading

_load, __dir__, __all__ = attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Load a name on first use (PEP 562)."""
    with loading():
        return _load(name)


__version__ = version("stepscope")
