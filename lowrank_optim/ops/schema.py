"""The operators of `torch.ops.lowrank_optim`: schemas, checks, fakes, and plain torch as the kernel of every device.

Native libraries (`native.py`) only add kernels for CPU and CUDA to these; one that is missing changes speed and nothing
else. All operators write into memory that they are given, and all demand contiguous tensors: `quantize.py`, `philox.py`
and `rounding.py` are what the package calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cosines, reference

NAMESPACE = "lowrank_optim"
_KEPT: list[torch.library.Library] = []  # operators live as long as their library
_NUMBERS = "int key, int purpose, int time, Tensor? at=None, int start=0"

Check = Callable[..., None]


def kernel(name: str) -> Callable[..., None]:
    """An operator; under compilation its plain version, which a compiler fuses with what is around it."""
    if torch.compiler.is_compiling():
        return getattr(reference, name)  # type: ignore[no-any-return]
    return getattr(torch.ops.lowrank_optim, name).default  # type: ignore[no-any-return]


def define(namespace: str) -> torch.library.Library:
    """All operators in a namespace. Tests make a second one, for CUDA kernels that run on the CPU."""
    library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
    for name, (signature, check) in OPERATORS.items():
        plain = _checked(check, getattr(reference, name))
        library.define(f"{name}({signature}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        library.impl(name, plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{namespace}::{name}", check, lib=library)
    _KEPT.append(library)
    return library


def _checked(check: Check, plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        plain(*args, **kwargs)

    return run


# -- checks: the same texts as in csrc/registration/ -------------------------------------------------------------------


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _typed(x: Tensor, name: str, *allowed: torch.dtype) -> None:
    words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    _demand(x.dtype in allowed, f"{name} must be {words}, got {x.dtype}")


def _contiguous(x: Tensor, name: str) -> None:
    _demand(x.is_contiguous(), f"{name} must be contiguous; use .contiguous()")


def _shaped(x: Tensor, name: str, like: Tensor, like_name: str) -> None:
    both = f"{tuple(like.shape)}, got {tuple(x.shape)}"
    _demand(x.shape == like.shape, f"{name} must have the shape of {like_name} {both}")


def _beside(x: Tensor, name: str, like: Tensor, like_name: str) -> None:
    _demand(x.device == like.device, f"{name} must be on the device of {like_name}")


def _one_number(x: Tensor, name: str) -> None:
    _demand(x.numel() == 1, f"{name} must be one number, got {tuple(x.shape)}")


def _check_moments(r: Tensor, **moments: Tensor) -> None:
    for name, x in moments.items():
        _shaped(x, name, r, "r")
        _beside(x, name, r, "r")
        _contiguous(x, name)


def _check_step(r: Tensor, step: Tensor | None) -> None:
    if step is not None:
        _typed(step, "step", torch.float32, torch.float64)
        _one_number(step, "step")
        _beside(step, "step", r, "r")


def _check_adam(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    r: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    _typed(r, "r", torch.float32, torch.float64)
    _contiguous(r, "r")
    for name, x in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _demand(x.dtype == r.dtype, f"{name} must have the dtype of r, got {x.dtype}")
    _check_moments(r, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_step(r, step)


def _as_long(r: list[Tensor], **lists: Sequence[Any]) -> None:
    for name, one in lists.items():
        _demand(len(one) == len(r), f"{name} must have one entry for each of r, {len(r)}, got {len(one)}")


def _check_adam_list(
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    r: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    _as_long(r, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for m, v, x in zip(exp_avg, exp_avg_sq, r, strict=True):
        _check_adam(m, v, x, beta1, beta2, eps, t)
        _demand(x.dtype == r[0].dtype, f"r must have the dtype of its first tensor, got {x.dtype}")
        _beside(x, "r", r[0], "its first tensor")
    if r:
        _check_step(r[0], step)


def _check_single(x: Tensor, first: Tensor) -> None:
    _typed(x, "r", torch.float32)
    _contiguous(x, "r")
    _beside(x, "r", first, "its first tensor")


def _check_adam_bfloat16(
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    r: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None,
    key: list[int],
    purpose: int,
    purpose_sq: int,
    time: int,
    at: Tensor | None,
    start: list[int],
) -> None:
    _as_long(r, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, key=key, start=start)
    for m, v, x in zip(exp_avg, exp_avg_sq, r, strict=True):
        _check_single(x, r[0])
        for name, moment in (("exp_avg", m), ("exp_avg_sq", v)):
            _typed(moment, name, torch.bfloat16)
            _check_moments(x, **{name: moment})
    if r:
        _check_step(r[0], step)
        _check_time(at, r[0], "r")


def _check_adam_int8(
    exp_avg: list[Tensor],
    peak: list[Tensor],
    exp_avg_sq: list[Tensor],
    peak_sq: list[Tensor],
    r: list[Tensor],
    code_map: Tensor,
    lower: Tensor,
    code_map_sq: Tensor,
    lower_sq: Tensor,
    block: int,
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    _as_long(r, exp_avg=exp_avg, peak=peak, exp_avg_sq=exp_avg_sq, peak_sq=peak_sq)
    _demand(1 <= block <= 256, f"block must be 1 to 256, got {block}")
    for m, m_peak, v, v_peak, x in zip(exp_avg, peak, exp_avg_sq, peak_sq, r, strict=True):
        _check_single(x, r[0])
        for name, moment in (("exp_avg", m), ("exp_avg_sq", v)):
            _typed(moment, name, torch.uint8)
            _check_moments(x, **{name: moment})
        _check_peaks(m_peak, "peak", x, block)
        _check_peaks(v_peak, "peak_sq", x, block)
        _shaped(v_peak, "peak_sq", m_peak, "peak")
    if r:
        _check_map(code_map, r[0], "code_map", "r")
        _check_table(lower, "lower", torch.uint8, r[0], "r")
        _check_map(code_map_sq, r[0], "code_map_sq", "r")
        _check_table(lower_sq, "lower_sq", torch.uint8, r[0], "r")
        _check_step(r[0], step)


def _check_peaks(peaks: Tensor, name: str, r: Tensor, block: int) -> None:
    """`(..., blocks)`: as many rows as there are, the last dimension aside."""
    _typed(peaks, name, torch.float32)
    _contiguous(peaks, name)
    _beside(peaks, name, r, "r")
    rows = math.prod(peaks.shape[:-1])
    k = r.numel() // rows if rows else 0
    fits = peaks.dim() >= 1 and rows * k == r.numel() and peaks.shape[-1] == -(-k // block)
    both = f"{tuple(r.shape)}, got {tuple(peaks.shape)}"
    _demand(fits, f"{name} must have one number per block of {block} of r {both}")


def _check_gram(out: Tensor, y: Tensor, across: bool = False) -> None:
    _typed(y, "y", torch.float32)
    _typed(out, "out", torch.float64)
    _contiguous(y, "y")
    _contiguous(out, "out")
    _beside(out, "out", y, "y")
    _demand(y.dim() >= 2, f"y must have two dimensions or more, got {tuple(y.shape)}")
    columns = y.shape[-2 if across else -1]
    both = f"{tuple(y.shape)}, got {tuple(out.shape)}"
    fits = out.shape == (*y.shape[:-2], columns, columns)
    _demand(fits, f"out must have one number per two columns of y {both}")


def _check_squares(rows: Tensor, columns: Tensor, x: Tensor) -> None:
    _typed(x, "x", torch.float32, torch.float64, torch.bfloat16)
    _contiguous(x, "x")
    _demand(x.dim() >= 2, f"x must have two dimensions or more, got {tuple(x.shape)}")
    for sums, name, shape in ((rows, "rows", x.shape[:-1]), (columns, "columns", (*x.shape[:-2], x.shape[-1]))):
        _typed(sums, name, torch.float64)
        _contiguous(sums, name)
        _beside(sums, name, x, "x")
        both = f"{tuple(x.shape)}, got {tuple(sums.shape)}"
        _demand(sums.shape == shape, f"{name} must have one number per {name[:-1]} of x {both}")


def _check_take_scaled(w: Tensor, x: Tensor, factors: Tensor, keep: float) -> None:
    _typed(w, "w", torch.float32, torch.float64)
    _demand(w.dim() >= 2, f"w must have two dimensions or more, got {tuple(w.shape)}")
    for name, one in (("x", x), ("factors", factors)):
        _demand(one.dtype == w.dtype, f"{name} must have the dtype of w, got {one.dtype}")
    _shaped(x, "x", w, "w")
    for name, one in (("w", w), ("x", x), ("factors", factors)):
        _contiguous(one, name)
    _beside(x, "x", w, "w")
    _beside(factors, "factors", w, "w")
    m, n = w.shape[-2:]
    shapes = [(*w.shape[:-2], *last) for last in ((1, 1), (1, n), (m, 1))]
    both = f"{tuple(w.shape)}, got {tuple(factors.shape)}"
    _demand(
        tuple(factors.shape) in shapes, f"factors must have one number per row, per column or per matrix of w {both}"
    )


def _check_signs(basis: Tensor) -> None:
    _typed(basis, "basis", torch.float32, torch.float64)
    _contiguous(basis, "basis")
    _demand(basis.dim() >= 2, f"basis must have two dimensions or more, got {tuple(basis.shape)}")


def _check_numbers(out: Tensor, at: Tensor | None) -> None:
    _contiguous(out, "out")
    _check_time(at, out, "out")


def _check_time(at: Tensor | None, like: Tensor, like_name: str) -> None:
    if at is not None:
        _typed(at, "at", torch.int64)
        _one_number(at, "at")
        _beside(at, "at", like, like_name)


def _check_draw(
    dtype: torch.dtype, out: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0
) -> None:
    _typed(out, "out", dtype)
    _check_numbers(out, at)


def _check_round(
    out: Tensor, x: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0
) -> None:
    _typed(out, "out", torch.bfloat16)
    _typed(x, "x", torch.float32)
    _shaped(x, "x", out, "out")
    _beside(x, "x", out, "out")
    _contiguous(x, "x")
    _check_numbers(out, at)


def _check_added(w: Tensor, x: Tensor, factor: Tensor | None, first: int) -> None:
    _typed(w, "w", torch.bfloat16)
    _contiguous(w, "w")
    _typed(x, "x", torch.float32)
    _contiguous(x, "x")
    _beside(x, "x", w, "w")
    _demand(w.dim() == 2, f"w must have two dimensions, got {tuple(w.shape)}")
    fits = x.dim() == 2 and x.shape[0] == w.shape[0] and first >= 0 and first + x.shape[1] <= w.shape[1]
    both = f"{tuple(w.shape)} and fit into its columns from {first} on, got {tuple(x.shape)}"
    _demand(fits, f"x must have the rows of w {both}")
    if factor is not None:
        _typed(factor, "factor", torch.float32, torch.float64)
        _one_number(factor, "factor")
        _beside(factor, "factor", w, "w")


def _check_add_nearest(w: Tensor, x: Tensor, keep: float, factor: Tensor | None = None, first: int = 0) -> None:
    _check_added(w, x, factor, first)


def _check_add_kahan(
    w: Tensor, owed: Tensor, x: Tensor, keep: float, factor: Tensor | None = None, first: int = 0
) -> None:
    _check_added(w, x, factor, first)
    _typed(owed, "owed", torch.bfloat16)
    _contiguous(owed, "owed")
    _shaped(owed, "owed", w, "w")
    _beside(owed, "owed", w, "w")


def _check_add_stochastic(
    w: Tensor,
    x: Tensor,
    keep: float,
    key: int,
    purpose: int,
    time: int,
    at: Tensor | None = None,
    start: int = 0,
    pitch: int = 0,
    factor: Tensor | None = None,
    first: int = 0,
) -> None:
    _check_added(w, x, factor, first)
    if at is not None:
        _typed(at, "at", torch.int64)
        _one_number(at, "at")
        _beside(at, "at", w, "w")


def _check_codes(codes: Tensor, x: Tensor, block: int, numbers: dict[str, Tensor], noise: Tensor | None = None) -> None:
    _typed(codes, "codes", torch.uint8)
    _typed(x, "x", torch.float32, torch.bfloat16)
    _shaped(x, "x", codes, "codes")
    _beside(x, "x", codes, "codes")
    _contiguous(codes, "codes")
    _contiguous(x, "x")
    _demand(codes.dim() >= 1, "x must have a last dimension to be cut into blocks, got a scalar")
    _demand(block >= 1, f"block must be at least 1, got {block}")
    for name, number in numbers.items():
        _typed(number, name, torch.float32)
        _contiguous(number, name)
        _beside(number, name, codes, "codes")
        fits = number.shape == (*codes.shape[:-1], -(-codes.shape[-1] // block))
        both = f"{tuple(codes.shape)}, got {tuple(number.shape)}"
        _demand(fits, f"{name} must have one number per block of {block} of codes {both}")
    if noise is not None:
        _typed(noise, "noise", torch.float32)
        _shaped(noise, "noise", codes, "codes")
        _beside(noise, "noise", codes, "codes")
        _contiguous(noise, "noise")


def _check_map(code_map: Tensor, like: Tensor, name: str = "code_map", like_name: str = "codes") -> None:
    _typed(code_map, name, torch.float32)
    _beside(code_map, name, like, like_name)
    _contiguous(code_map, name)
    few = code_map.dim() == 1 and 1 <= code_map.numel() <= 256
    _demand(few, f"{name} must have 1 to 256 entries, got {tuple(code_map.shape)}")


def _check_table(table: Tensor, name: str, dtype: torch.dtype, like: Tensor, like_name: str = "codes") -> None:
    _typed(table, name, dtype)
    _beside(table, name, like, like_name)
    _contiguous(table, name)
    _demand(table.numel() == 1 << 16, f"{name} must have 65536 entries, got {table.numel()}")


def _check_quantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    x: Tensor,
    code_map: Tensor,
    lower: Tensor,
    midpoint: Tensor,
    block: int,
    signed_peak: bool = False,
    noise: Tensor | None = None,
) -> None:
    _check_codes(codes, x, block, {"absmax": absmax}, noise)
    _check_map(code_map, codes)
    _check_table(lower, "lower", torch.uint8, codes)
    _check_table(midpoint, "midpoint", torch.float32, codes)


def _check_quantize_affine(
    codes: Tensor, scale: Tensor, low: Tensor, x: Tensor, bits: int, block: int, noise: Tensor | None = None
) -> None:
    _demand(1 <= bits <= 8, f"bits must be 1 to 8, got {bits}")
    _check_codes(codes, x, block, {"scale": scale, "low": low}, noise)


def _check_sixteenths(codes: Tensor, largest: Tensor, x: Tensor, block: int, noise: Tensor | None = None) -> None:
    _check_codes(codes, x, block, {"largest": largest}, noise)


def _check_dequantize_blockwise(x: Tensor, codes: Tensor, absmax: Tensor, code_map: Tensor, block: int) -> None:
    _check_codes(codes, x, block, {"absmax": absmax})
    _check_map(code_map, codes)


def _check_dequantize_affine(x: Tensor, codes: Tensor, scale: Tensor, low: Tensor, block: int) -> None:
    _check_codes(codes, x, block, {"scale": scale, "low": low})


def _check_pack4(packed: Tensor, codes: Tensor) -> None:
    for name, x in (("packed", packed), ("codes", codes)):
        _typed(x, name, torch.uint8)
        _contiguous(x, name)
    _beside(packed, "packed", codes, "codes")
    _demand(codes.dim() >= 1, "codes must have a last dimension, got a scalar")
    fits = packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] // 2))
    both = f"{tuple(codes.shape)}, got {tuple(packed.shape)}"
    _demand(fits, f"packed must have one byte for two codes {both}")


def _check_unpack4(codes: Tensor, packed: Tensor) -> None:
    _check_pack4(packed, codes)


def _check_select(index: Tensor, scores: Tensor) -> None:
    _typed(index, "index", torch.int32)
    _typed(scores, "scores", torch.float32, torch.float64)
    _contiguous(index, "index")
    _contiguous(scores, "scores")
    _beside(index, "index", scores, "scores")
    fits = index.dim() == scores.dim() >= 1 and index.shape[:-1] == scores.shape[:-1]
    fits = fits and index.shape[-1] <= scores.shape[-1]
    both = f"{tuple(scores.shape)}, its last dimension not longer, got {tuple(index.shape)}"
    _demand(fits, f"index must have the shape of scores {both}")
    few = scores.shape[-1] < 1 << 30
    _demand(few, f"scores must have fewer than 2^30 numbers in a line, got {tuple(scores.shape)}")


def _check_positions(positions: Tensor, numbers: Tensor, name: str) -> None:
    """One number per position; their order is looked at by kernels, which have their values."""
    _typed(positions, "positions", torch.int32, torch.int64)
    _demand(positions.dim() == 1, f"positions must have one dimension, got {tuple(positions.shape)}")
    _shaped(numbers, name, positions, "positions")
    _beside(positions, "positions", numbers, name)
    _contiguous(positions, "positions")
    _contiguous(numbers, name)


def _check_at(dense: Tensor, positions: Tensor, numbers: Tensor, name: str) -> None:
    _typed(dense, "dense", torch.float32, torch.float64, torch.bfloat16)
    _contiguous(dense, "dense")
    _demand(numbers.dtype == dense.dtype, f"{name} must have the dtype of dense, got {numbers.dtype}")
    _beside(numbers, name, dense, "dense")
    _check_positions(positions, numbers, name)


def _check_add_at(dense: Tensor, positions: Tensor, values: Tensor, start: int = 0) -> None:
    _check_at(dense, positions, values, "values")


def _check_gather_at(out: Tensor, dense: Tensor, positions: Tensor, start: int = 0) -> None:
    _check_at(dense, positions, out, "out")


def _check_sampled(out: Tensor, left: Tensor, right: Tensor, positions: Tensor) -> None:
    _typed(left, "left", torch.float32, torch.float64)
    for name, x in (("right", right), ("out", out)):
        _demand(x.dtype == left.dtype, f"{name} must have the dtype of left, got {x.dtype}")
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[1]
    both = f"{tuple(left.shape)} and {tuple(right.shape)}"
    _demand(fits, f"left and right must have lines of one length, got {both}")
    _contiguous(left, "left")
    _contiguous(right, "right")
    _beside(right, "right", left, "left")
    _beside(out, "out", left, "left")
    _check_positions(positions, out, "out")


def _check_factors(factors: Tensor, name: str, line: str, x: Tensor, shape: tuple[int, ...]) -> None:
    _demand(factors.dtype == x.dtype, f"{name} must have the dtype of x, got {factors.dtype}")
    both = f"{tuple(x.shape)}, got {tuple(factors.shape)}"
    _demand(factors.shape == shape, f"{name} must have one number per {line} of x {both}")
    _contiguous(factors, name)
    _beside(factors, name, x, "x")


def _check_factored(x: Tensor, rows: Tensor, columns: Tensor, **like: Tensor) -> None:
    _typed(x, "x", torch.float32, torch.float64)
    _contiguous(x, "x")
    _demand(x.dim() >= 2, f"x must have two dimensions or more, got {tuple(x.shape)}")
    _check_factors(rows, "rows", "row", x, (*x.shape[:-1], 1))
    _check_factors(columns, "columns", "column", x, (*x.shape[:-2], 1, x.shape[-1]))
    for name, one in like.items():
        _demand(one.dtype == x.dtype, f"{name} must have the dtype of x, got {one.dtype}")
        _shaped(one, name, x, "x")
        _contiguous(one, name)
        _beside(one, name, x, "x")


def _check_scale_factored(out: Tensor, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    _check_factored(x, rows, columns, out=out)


def _check_factored_energy(sums: Tensor, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    _check_factored(x, rows, columns)
    _typed(sums, "sums", torch.float64)
    both = f"{tuple(x.shape)}, got {tuple(sums.shape)}"
    _demand(sums.shape == x.shape[:-2], f"sums must have one number per matrix of x {both}")
    _contiguous(sums, "sums")
    _beside(sums, "sums", x, "x")


def _check_step_factored(
    w: Tensor,
    exp_avg: Tensor | None,
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    most: float,
    beta: float,
    gain: float,
    length: float,
    keep: float,
) -> None:
    _check_factored(x, rows, columns, w=w, **({} if exp_avg is None else {"exp_avg": exp_avg}))


def _check_adam_rows(
    exp_avg: Tensor, exp_avg_sq: Tensor, r: Tensor, beta1: float, beta2: float, eps: float, ages: Tensor
) -> None:
    _check_adam(exp_avg, exp_avg_sq, r, beta1, beta2, eps, 1.0)
    _demand(r.dim() >= 1, f"r must have one dimension or more, got {tuple(r.shape)}")
    _demand(ages.dtype == r.dtype, f"ages must have the dtype of r, got {ages.dtype}")
    _contiguous(ages, "ages")
    _beside(ages, "ages", r, "r")
    both = f"{tuple(r.shape)}, got {tuple(ages.shape)}"
    _demand(ages.numel() == math.prod(r.shape[:-1]), f"ages must have one number per row of r {both}")


def _check_move_rows(x: Tensor, source: Tensor) -> None:
    """What the sources are is looked at by kernels, which have their values."""
    _typed(x, "x", torch.float32, torch.float64, torch.int32)
    _typed(source, "source", torch.int64)
    _contiguous(x, "x")
    _contiguous(source, "source")
    _beside(source, "source", x, "x")
    fits = x.dim() >= 1 and source.shape == x.shape[:1]
    both = f"{tuple(x.shape)}, got {tuple(source.shape)}"
    _demand(fits, f"source must have one number per row of x {both}")


def _check_cosines(x: Tensor, name: str, across: bool) -> tuple[int, int]:
    """(m, n) of x, or of its transpose."""
    _typed(x, name, torch.float32, torch.float64)
    _contiguous(x, name)
    _demand(x.dim() == 2, f"{name} must have two dimensions, got {tuple(x.shape)}")
    m, n = (x.shape[1], x.shape[0]) if across else (x.shape[0], x.shape[1])
    _demand(cosines.transforms(m), f"{name} must have an even length without prime factors above 7, got {m}")
    return m, n


def _check_chosen(d: Tensor, name: str, index: Tensor, x: Tensor, x_name: str, n: int, first: int = 0) -> None:
    """Coefficients (r, n), and of what each row is; that these are there is looked at by kernels."""
    _demand(d.dtype == x.dtype, f"{name} must have the dtype of {x_name}, got {d.dtype}")
    _typed(index, "index", torch.int32)
    _demand(index.dim() == 1, f"index must have one dimension, got {tuple(index.shape)}")
    fits = d.dim() == 2 and d.shape[0] == index.shape[0] and first >= 0 and first + n <= d.shape[1]
    both = f"({index.shape[0]}, {n}) from column {first} on, got {tuple(d.shape)}"
    _demand(fits, f"{name} must have a row per index and the columns of {x_name}, {both}")
    _contiguous(d, name)
    _contiguous(index, "index")
    _beside(d, name, x, x_name)
    _beside(index, "index", x, x_name)


def _check_cosine_scores(sums: Tensor, x: Tensor, third: bool, power: int, across: bool) -> None:
    m, _ = _check_cosines(x, "x", across)
    _typed(sums, "sums", torch.float64)
    _contiguous(sums, "sums")
    _beside(sums, "sums", x, "x")
    _demand(sums.shape == (m,), f"sums must have one number per coefficient, ({m},), got {tuple(sums.shape)}")
    _demand(power in (1, 2), f"power must be 1 or 2, got {power}")


def _check_cosine_rows(out: Tensor, x: Tensor, index: Tensor, third: bool, across: bool) -> None:
    _, n = _check_cosines(x, "x", across)
    _check_chosen(out, "out", index, x, "x", n)
    _demand(out.dim() < 2 or out.shape[1] == n, f"out must have as many columns as x, {n}, got {tuple(out.shape)}")


def _check_add_cosines(
    w: Tensor, d: Tensor, index: Tensor, alpha: float, beta: float, third: bool, across: bool, first: int = 0
) -> None:
    _, n = _check_cosines(w, "w", across)
    _check_chosen(d, "d", index, w, "w", n, first)


_INTEGERS = functools.partial(_check_draw, torch.int32)
_FLOATS = functools.partial(_check_draw, torch.float32)

OPERATORS: dict[str, tuple[str, Check]] = {
    "projected_adam_": (
        "Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor(c!) r, float beta1, float beta2, float eps, float t, "
        "Tensor? step=None",
        _check_adam,
    ),
    "projected_adam_list_": (
        "Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor(c!)[] r, float beta1, float beta2, float eps, float t, "
        "Tensor? step=None",
        _check_adam_list,
    ),
    "projected_adam_bfloat16_list_": (
        "Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor(c!)[] r, float beta1, float beta2, float eps, float t, "
        "Tensor? step, int[] key, int purpose, int purpose_sq, int time, Tensor? at, int[] start",
        _check_adam_bfloat16,
    ),
    "projected_adam_int8_list_": (
        "Tensor(a!)[] exp_avg, Tensor(b!)[] peak, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] peak_sq, Tensor(e!)[] r, "
        "Tensor code_map, Tensor lower, Tensor code_map_sq, Tensor lower_sq, int block, "
        "float beta1, float beta2, float eps, float t, Tensor? step=None",
        _check_adam_int8,
    ),
    "gram_": ("Tensor(a!) out, Tensor y, bool across=False", _check_gram),
    "fix_signs_": ("Tensor(a!) basis", _check_signs),
    "philox_bits16_": (f"Tensor(a!) out, {_NUMBERS}", _INTEGERS),
    "philox_noise16_": (f"Tensor(a!) out, {_NUMBERS}", _FLOATS),
    "philox_uniform_": (f"Tensor(a!) out, {_NUMBERS}", _FLOATS),
    "philox_normal_": (f"Tensor(a!) out, {_NUMBERS}", _FLOATS),
    "round_to_bfloat16_": (f"Tensor(a!) out, Tensor x, {_NUMBERS}", _check_round),
    "add_nearest_": ("Tensor(a!) w, Tensor x, float keep, Tensor? factor=None, int first=0", _check_add_nearest),
    "add_kahan_": (
        "Tensor(a!) w, Tensor(b!) owed, Tensor x, float keep, Tensor? factor=None, int first=0",
        _check_add_kahan,
    ),
    "add_stochastic_": (
        f"Tensor(a!) w, Tensor x, float keep, {_NUMBERS}, int pitch=0, Tensor? factor=None, int first=0",
        _check_add_stochastic,
    ),
    "quantize_blockwise_": (
        "Tensor(a!) codes, Tensor(b!) absmax, Tensor x, Tensor code_map, Tensor lower, Tensor midpoint, int block, "
        "bool signed_peak=False, Tensor? noise=None",
        _check_quantize_blockwise,
    ),
    "quantize_affine_": (
        "Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) low, Tensor x, int bits, int block, Tensor? noise=None",
        _check_quantize_affine,
    ),
    "quantize_sixteenths_": (
        "Tensor(a!) codes, Tensor(b!) largest, Tensor x, int block, Tensor? noise=None",
        _check_sixteenths,
    ),
    "dequantize_blockwise_": (
        "Tensor(a!) x, Tensor codes, Tensor absmax, Tensor code_map, int block",
        _check_dequantize_blockwise,
    ),
    "pack4_": ("Tensor(a!) packed, Tensor codes", _check_pack4),
    "unpack4_": ("Tensor(a!) codes, Tensor packed", _check_unpack4),
    "dequantize_affine_": (
        "Tensor(a!) x, Tensor codes, Tensor scale, Tensor low, int block",
        _check_dequantize_affine,
    ),
    "select_top_": ("Tensor(a!) index, Tensor scores", _check_select),
    "add_at_": ("Tensor(a!) dense, Tensor positions, Tensor values, int start=0", _check_add_at),
    "gather_at_": ("Tensor(a!) out, Tensor dense, Tensor positions, int start=0", _check_gather_at),
    "add_sampled_product_": ("Tensor(a!) out, Tensor left, Tensor right, Tensor positions", _check_sampled),
    "scale_factored_": ("Tensor(a!) out, Tensor x, Tensor rows, Tensor columns, float most", _check_scale_factored),
    "factored_energy_": ("Tensor(a!) sums, Tensor x, Tensor rows, Tensor columns, float most", _check_factored_energy),
    "step_factored_": (
        "Tensor(a!) w, Tensor(b!)? exp_avg, Tensor x, Tensor rows, Tensor columns, float most, "
        "float beta, float gain, float length, float keep",
        _check_step_factored,
    ),
    "squares_": ("Tensor(a!) rows, Tensor(b!) columns, Tensor x", _check_squares),
    "take_scaled_": ("Tensor(a!) w, Tensor x, Tensor factors, float keep", _check_take_scaled),
    "projected_adam_rows_": (
        "Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor(c!) r, float beta1, float beta2, float eps, Tensor ages",
        _check_adam_rows,
    ),
    "move_rows_": ("Tensor(a!) x, Tensor source", _check_move_rows),
    "cosine_scores_": ("Tensor(a!) sums, Tensor x, bool third, int power, bool across", _check_cosine_scores),
    "cosine_rows_": ("Tensor(a!) out, Tensor x, Tensor index, bool third, bool across", _check_cosine_rows),
    "add_cosines_": (
        "Tensor(a!) w, Tensor d, Tensor index, float alpha, float beta, bool third, bool across, int first=0",
        _check_add_cosines,
    ),
}

# Of which no CUDA source has a kernel: libraries of the device form these products, or the whole one, in less time,
# torch's own sums and pointwise operators reach the speed of its memory, and what is small or seldom is left to them.
CPU_ONLY = {
    "gram_", "add_sampled_product_", "squares_", "take_scaled_", "scale_factored_", "factored_energy_",
    "step_factored_", "projected_adam_rows_", "move_rows_", "cosine_scores_", "cosine_rows_", "add_cosines_",
}  # fmt: skip

define(NAMESPACE)
