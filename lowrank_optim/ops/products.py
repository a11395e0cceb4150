"""Products of matrices by the library that is faster on this machine."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .blocks import BLOCK, blocks, largest_block

_LEAST = 1 << 20  # multiplications from which on the call of oneDNN is worth its time


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `A B` for matrices (m, r), (r, n) or stacks of them.

    torch calls MKL for products in float32, which uses all instructions on Intel's processors only. oneDNN, which torch
    contains as well, takes half the time on AMD's processors with AVX-512. Both work in float32 throughout.
    """
    if torch.compiler.is_compiling() or not _suits(a, b):
        return torch.matmul(a, b)
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        b = b.contiguous()  # oneDNN takes hundreds of times as long for a part of a matrix
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.mT, None, "none", [], "")
    return result


def add_product_(w: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """Compute `W <- beta W + alpha A B` in place, in one pass over w; where beta is 0, w is not read.

    oneDNN cannot add to an existing tensor. So the product is formed block by block, and each block is added while it
    is in cache. Where beta is 0 nothing is added, and a block would only be an additional tensor.

    Args:
        w, a, b: (m, n), (m, r), (r, n), or stacks of such matrices.
    """
    if torch.compiler.is_compiling() or beta == 0 or not _suits(a, b):
        (w.addmm_ if w.dim() == 2 else w.baddbmm_)(a, b, beta=beta, alpha=alpha)
        return
    for columns in blocks(w.shape, most=BLOCK):
        some, place = columns.of(b), columns.of(w)
        if beta != 1:
            place.mul_(beta)
        place.add_(
            product(a, some) if w.is_contiguous() else product(some.mT, a.mT).mT, alpha=alpha
        )  # in the memory layout of w


def scratch(shape: tuple[int, ...], rank: int) -> int:
    """Return the number of elements of temporaries of `add_product_` for (m, rank) times (rank, n), `shape` (m, n)."""
    if not onednn_is_faster() or math.prod(shape) * rank < _LEAST:
        return 0
    block = largest_block(shape, BLOCK)
    return block + block // shape[0] * rank  # the block of the product, and the contiguous copy of the columns of b


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN forms this product in less time: not for stacks, float64, and small or empty matrices."""
    if a.shape[0] * b.numel() < _LEAST:  # first, because for small matrices the other questions take too long
        return False
    matrices = a.dim() == 2 and b.dim() == 2 and a.dtype == b.dtype == torch.float32
    return matrices and a.device.type == "cpu" and onednn_is_faster()


@functools.lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether oneDNN is faster on this processor. It is not measured, so that a resumed run computes the same bits."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch._C._has_mkldnn
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() == "AuthenticAMD"


def _maker() -> str:
    """Return the `vendor_id` of the processor, or "" where the system does not have it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""
