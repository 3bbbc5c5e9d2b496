"""How a gradient step on one example changes the loss of another: exact gradient alignment for PyTorch networks."""

from stiffkit.alignment import class_cosine, class_stiffness, group_stiffness, stiffness, within_between
from stiffkit.gradients import GradientGram, gradient_gram, gradient_norms

__version__ = "0.1.0"

__all__ = [
    "GradientGram",
    "class_cosine",
    "class_stiffness",
    "gradient_gram",
    "gradient_norms",
    "group_stiffness",
    "stiffness",
    "within_between",
]
