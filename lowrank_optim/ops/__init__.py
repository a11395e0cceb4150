"""The numeric kernels. `reference.py` has those with a native version; `schema.py` makes operators of them."""

from . import reference, schema
from .linalg import cholesky_qr2, fix_signs, householder, leading_left_vectors, orthonormalize, subspace_iteration
from .philox import key_of, normal, random_bits16, sample, stream_of, uniform
from .rounding import round_to_bfloat16
from .sparse import add_at_, gather_at, sampled_product

__all__ = [
    "add_at_",
    "cholesky_qr2",
    "fix_signs",
    "gather_at",
    "householder",
    "key_of",
    "leading_left_vectors",
    "normal",
    "orthonormalize",
    "random_bits16",
    "reference",
    "round_to_bfloat16",
    "sample",
    "sampled_product",
    "schema",
    "stream_of",
    "subspace_iteration",
    "uniform",
]
