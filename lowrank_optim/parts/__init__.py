"""Provide the parts that methods are made of. Each fills one of the slots in `recipe/recipe.py`."""

from ..recipe.store import Exact
from .basis import SVD, Identity, Later, PowerIteration, SharedHead, SubspaceIteration, TwoSided
from .dictionary import Dictionary
from .limited import NormScaled, Rescaled
from .momentum import EMA, HeavyBall, NoMomentum
from .random import Random, Rows
from .refresh import Every, Lazy, Never, Outside
from .residual import Drop, ErrorFeedback, Raw, Sign
from .scaling import RMS, Factored, NoScaling, SubsetNorm
from .sparse import Sparse
from .step_size import Constant, Relative
from .store import STORES, Affine, BFloat16, Float32, Int4, Int8

__all__ = [
    "EMA",
    "RMS",
    "STORES",
    "SVD",
    "Affine",
    "BFloat16",
    "Constant",
    "Dictionary",
    "Drop",
    "ErrorFeedback",
    "Every",
    "Exact",
    "Factored",
    "Float32",
    "HeavyBall",
    "Identity",
    "Int4",
    "Int8",
    "Later",
    "Lazy",
    "Never",
    "NoMomentum",
    "NoScaling",
    "NormScaled",
    "Outside",
    "PowerIteration",
    "Random",
    "Raw",
    "Relative",
    "Rescaled",
    "Rows",
    "SharedHead",
    "Sign",
    "Sparse",
    "SubsetNorm",
    "SubspaceIteration",
    "TwoSided",
]
