"""The operators of `torch.ops.lowrank_optim`: schemas, checks, fakes, and plain torch as the kernel of every device.

Native libraries (`native.py`) only add kernels for CPU and CUDA to these; one that is missing changes speed and nothing
else. All operators write into memory that they are given, and all demand contiguous tensors: `quantize.py`, `philox.py`
and `rounding.py` are what the package calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

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


# -- checks: the same texts as in csrc/registration.cpp ----------------------------------------------------------------


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
        _shaped(x, name, r, "r")
        _beside(x, name, r, "r")
        _contiguous(x, name)
    if step is not None:
        _typed(step, "step", torch.float32, torch.float64)
        _one_number(step, "step")
        _beside(step, "step", r, "r")


def _check_numbers(out: Tensor, at: Tensor | None) -> None:
    _contiguous(out, "out")
    if at is not None:
        _typed(at, "at", torch.int64)
        _one_number(at, "at")
        _beside(at, "at", out, "out")


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


def _check_map(code_map: Tensor, codes: Tensor) -> None:
    _typed(code_map, "code_map", torch.float32)
    _beside(code_map, "code_map", codes, "codes")
    _contiguous(code_map, "code_map")
    few = code_map.dim() == 1 and 1 <= code_map.numel() <= 256
    _demand(few, f"code_map must have 1 to 256 entries, got {tuple(code_map.shape)}")


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
    for name, table, dtype in (("lower", lower, torch.uint8), ("midpoint", midpoint, torch.float32)):
        _typed(table, name, dtype)
        _beside(table, name, codes, "codes")
        _contiguous(table, name)
        _demand(table.numel() == 1 << 16, f"{name} must have 65536 entries, got {table.numel()}")


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


_INTEGERS = functools.partial(_check_draw, torch.int32)
_FLOATS = functools.partial(_check_draw, torch.float32)

OPERATORS: dict[str, tuple[str, Check]] = {
    "projected_adam_": (
        "Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor(c!) r, float beta1, float beta2, float eps, float t, "
        "Tensor? step=None",
        _check_adam,
    ),
    "philox_bits16_": (f"Tensor(a!) out, {_NUMBERS}", _INTEGERS),
    "philox_noise16_": (f"Tensor(a!) out, {_NUMBERS}", _FLOATS),
    "philox_uniform_": (f"Tensor(a!) out, {_NUMBERS}", _FLOATS),
    "philox_normal_": (f"Tensor(a!) out, {_NUMBERS}", _FLOATS),
    "round_to_bfloat16_": (f"Tensor(a!) out, Tensor x, {_NUMBERS}", _check_round),
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
}

define(NAMESPACE)
