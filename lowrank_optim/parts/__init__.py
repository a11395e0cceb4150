"""The parts that methods are made of; each answers one of the six questions in `recipe.py`."""

from .basis import SVD, Identity, SubspaceIteration, TwoSided
from .moments import EMA, RMS, Factored, NoMomentum
from .refresh import Every, Staggered
from .residual import Drop
from .step_size import Constant, Relative
from .store import BFloat16, Float32

__all__ = [
    "EMA",
    "RMS",
    "SVD",
    "BFloat16",
    "Constant",
    "Drop",
    "Every",
    "Factored",
    "Float32",
    "Identity",
    "NoMomentum",
    "Relative",
    "Staggered",
    "SubspaceIteration",
    "TwoSided",
]
