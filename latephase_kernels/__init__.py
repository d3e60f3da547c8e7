"""Late-phase weights for PyTorch: ensemble batch norm kernels and the training tools around them."""

from . import functional
from .backend import backend_for, set_backend

__version__ = "0.1.0"
__all__ = ["backend_for", "functional", "set_backend"]
