"""stepscope: one reinforcement-learning step of a language model under the microscope.

The public names stand in ``__init__.pyi`` and are loaded on first use, so that ``import stepscope`` costs
nothing until a model is touched.
"""

from importlib.metadata import version

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
__version__ = version("stepscope")
