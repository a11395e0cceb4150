"""The numeric kernels. `reference/` has those with a native version, of which `schema.py` makes operators."""

from . import reference, schema
from .factored import Factors, factored_energy, scale_factored
from .linalg import fix_signs, leading_left_vectors, orthonormalize, principal, whiten_
from .philox import key_of, normal, random_bits16, sample, stream_of, uniform
from .products import add_product_, product
from .reductions import largest, mean_squares, norm, squares
from .rounding import round_to_bfloat16
from .scaled import take_scaled_
from .sparse import add_at_, gather_at, sampled_product

__all__ = [
    "Factors",
    "add_at_",
    "add_product_",
    "factored_energy",
    "fix_signs",
    "gather_at",
    "key_of",
    "largest",
    "leading_left_vectors",
    "mean_squares",
    "norm",
    "normal",
    "orthonormalize",
    "principal",
    "product",
    "random_bits16",
    "reference",
    "round_to_bfloat16",
    "sample",
    "sampled_product",
    "scale_factored",
    "schema",
    "squares",
    "stream_of",
    "take_scaled_",
    "uniform",
    "whiten_",
]
