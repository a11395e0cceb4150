"""The numeric kernels. `reference.py` has those with a native version; `schema.py` makes operators of them."""

from . import reference, schema
from .apply import add_rounded_
from .linalg import cholesky_qr2, fix_signs, householder, leading_left_vectors, orthonormalize, subspace_iteration
from .philox import key_of, normal, random_bits16, sample, stream_of, uniform
from .rounding import round_to_bfloat16

__all__ = [
    "add_rounded_",
    "cholesky_qr2",
    "fix_signs",
    "householder",
    "key_of",
    "leading_left_vectors",
    "normal",
    "orthonormalize",
    "random_bits16",
    "reference",
    "round_to_bfloat16",
    "sample",
    "schema",
    "stream_of",
    "subspace_iteration",
    "uniform",
]
