"""Deep kernel machines: models of data by Gram matrices, apart from policies and steps; float64 on torch.

Imported by name only (``stepscope.kernels``), never on start. It knows nothing of the rest but the errors.
"""

from stepscope.kernels.deep import DeepKernelMachine
from stepscope.kernels.gram import GramKernel

__all__ = ["DeepKernelMachine", "GramKernel"]
