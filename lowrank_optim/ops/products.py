"""Products of matrices, by the library that is faster on this machine."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .blocks import BLOCK, blocks, largest_block

_LEAST = 1 << 20  # multiplications that are worth the call


def product(a: Tensor, b: Tensor) -> Tensor:
    """`A B`, for matrices or stacks of them.

    MKL, which torch asks for products in float32, does not use all of processors that are not Intel's; oneDNN, which
    torch has as well, takes half the time on AMD's with AVX-512. It works in float32 throughout, like MKL.
    """
    if torch.compiler.is_compiling() or not _suits(a, b):
        return torch.matmul(a, b)
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        b = b.contiguous()  # oneDNN takes hundreds of times as long for a part of a matrix
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.mT, None, "none", [], "")
    return result


def add_product_(w: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """`W <- beta W + alpha A B`, for a matrix or a stack, in place; where beta is 0, w is not read.

    In one pass over w. oneDNN cannot add to what there is, so there the product is made a block at a time, which is
    still in cache when it is added; where there is nothing to add to, its block would only be one more.
    """
    if torch.compiler.is_compiling() or beta == 0 or not _suits(a, b):
        (w.addmm_ if w.dim() == 2 else w.baddbmm_)(a, b, beta=beta, alpha=alpha)
        return
    for columns in blocks(w.shape, most=BLOCK):
        some, place = columns.of(b), columns.of(w)
        if beta != 1:
            place.mul_(beta)
        place.add_(product(a, some) if w.is_contiguous() else product(some.mT, a.mT).mT, alpha=alpha)  # laid out like w


def scratch(shape: tuple[int, ...], rank: int) -> int:
    """Elements that `add_product_` holds for `(m, rank)` times `(rank, n)`, `shape` being (m, n)."""
    if not onednn_is_faster() or math.prod(shape) * rank < _LEAST:
        return 0
    block = largest_block(shape, BLOCK)
    return block + block // shape[0] * rank  # and the columns that it is made of


def _suits(a: Tensor, b: Tensor) -> bool:
    """oneDNN has no stacks, float64 or empty matrices, and what is small is not worth its call."""
    if a.shape[0] * b.numel() < _LEAST:  # the first question, because small ones have no time for the others
        return False
    matrices = a.dim() == 2 and b.dim() == 2 and a.dtype == b.dtype == torch.float32
    return matrices and a.device.type == "cpu" and onednn_is_faster()


@functools.lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Known by the processor and not measured, so that a run and its continuation take the same bits."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch._C._has_mkldnn
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() == "AuthenticAMD"


def _maker() -> str:
    """The `vendor_id` of the processor, "" where the system does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""
