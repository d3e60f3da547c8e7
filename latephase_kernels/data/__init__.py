"""Data: the bundled digits, and minibatches that live in memory."""

from .digits import load_digits, split_digits
from .minibatches import Minibatches, random_shift

__all__ = ["Minibatches", "load_digits", "random_shift", "split_digits"]
