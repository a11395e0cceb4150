"""The operators of `torch.ops.lowrank_optim`: schemas, checks, fakes, and plain torch as the kernel of every device.

The signatures in `reference/` give the schemas (`signatures.py`). The table `RULES` says what each operator demands of
its arguments, and `rules.py` makes the checks of it, which are the fakes as well. csrc/registration/ demands the same
with the same wordss. Native libraries (`native.py`) only add kernels for CPU and CUDA: without them everything works
as well, but slower. All operators write into tensors that they are given, and all tensors must be contiguous. The
package calls operators through functions, such as those of `quantize.py` and `philox.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cosines import transforms
from .rules import FIRST, Check, Condition, Dense, Let, OneNumber, Rule, checker, like
from .signatures import schema_of

NAMESPACE = "lowrank_optim"
_KEPT: list[torch.library.Library] = []  # operators exist as long as their library

# -- rules of several operators ----------------------------------------------------------------------------------------

F32, F64, BF16 = (torch.float32,), (torch.float64,), (torch.bfloat16,)
U8, I32, I64 = (torch.uint8,), (torch.int32,), (torch.int64,)
FLOATS = F32 + F64

STEP, FACTOR = OneNumber("step", FLOATS, on="r"), OneNumber("factor", FLOATS, on="w")
MOMENTS = like("exp_avg", "r"), like("exp_avg_sq", "r")


def _peaks(peaks: str) -> tuple[Rule, ...]:
    """Return the rules for peaks (..., blocks): one number per block of each row of r, as many rows as peaks has."""

    def fits(x: Tensor, r: Tensor, block: int) -> bool:
        rows = math.prod(x.shape[:-1])
        k = r.numel() // rows if rows else 0
        return x.dim() >= 1 and rows * k == r.numel() and x.shape[-1] == -(-k // block)

    words = "have one number per block of {block} of r {r}"
    return Dense(peaks, F32, on="r"), Condition(peaks, words, fits)


def _map(code_map: str, on: str) -> tuple[Rule, ...]:
    """Return the rules for the numbers that codes stand for."""
    words = "have 1 to 256 entries"
    return Dense(code_map, F32, on), Condition(code_map, words, lambda x: x.dim() == 1 and 1 <= x.numel() <= 256)


def _table(table: str, dtype: tuple[torch.dtype, ...], on: str) -> tuple[Rule, ...]:
    """Return the rules for a table with an entry for each value of the upper 16 bits of a float32."""
    entries = Let("entries", table, lambda x: x.numel())
    full = Condition(table, "have 65536 entries", lambda _, entries: entries == 1 << 16, got="{entries}")
    return Dense(table, dtype, on), entries, full


def _drawn(dtype: tuple[torch.dtype, ...]) -> tuple[Rule, ...]:
    """Return the rules for `out`, into which random numbers are written, and for a time on the device."""
    return Dense("out", dtype), OneNumber("at", I64, on="out")


WEIGHT = (
    Dense("w", BF16, dims="two dimensions"),
    Dense("x", F32, on="w"),
    Condition(
        "x",
        "have the rows of w {w} and fit into its columns from {first} on",
        lambda x, w, first: (
            x.dim() == 2 and x.shape[0] == w.shape[0] and first >= 0 and first + x.shape[1] <= w.shape[1]
        ),
    ),
    FACTOR,
)


def _codes(*numbers: str) -> tuple[Rule, ...]:
    """Return the rules for x (..., k), its codes, and the named tensors (..., ceil(k / block)): a number per block."""

    def fits(x: Tensor, codes: Tensor, block: int) -> bool:
        return x.shape == (*codes.shape[:-1], -(-codes.shape[-1] // block))

    words = "have one number per block of {block} of codes {codes}"
    rules: list[Rule] = [Dense("codes", U8), like("x", "codes", F32 + BF16)]
    rules += [Condition("x", "have a last dimension to be cut into blocks", lambda x: x.dim() >= 1, got="a scalar")]
    rules += [Condition("block", "be at least 1", lambda block: block >= 1)]
    for number in numbers:
        rules += [Dense(number, F32, on="codes"), Condition(number, words, fits)]
    return tuple(rules)


NOISE = like("noise", "codes", F32)
PACKED = (
    Dense("codes", U8),
    Condition("codes", "have a last dimension", lambda codes: codes.dim() >= 1, got="a scalar"),
    Dense("packed", U8, on="codes"),
    Condition(
        "packed",
        "have one byte for two codes {codes}",
        lambda packed, codes: packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] // 2)),
    ),
)


def _entries(numbers: str, of: str) -> tuple[Rule, ...]:
    """Return the rules for positions (k,) in the tensor `of`, and for the numbers (k,) there.

    Kernels check that positions ascend and are inside, because only they read values.
    """
    return (
        Dense(numbers, dtype=of, on=of),
        Dense("positions", I32 + I64, on=numbers, dims="one dimension"),
        Condition(numbers, "have the shape of positions {positions}", lambda x, positions: x.shape == positions.shape),
    )


FACTORED = (
    Dense("x", FLOATS, dims="two dimensions or more"),
    Dense("rows", dtype="x", on="x"),
    Condition("rows", "have one number per row of x {x}", lambda rows, x: rows.shape == (*x.shape[:-1], 1)),
    Dense("columns", dtype="x", on="x"),
    Condition(
        "columns",
        "have one number per column of x {x}",
        lambda columns, x: columns.shape == (*x.shape[:-2], 1, x.shape[-1]),
    ),
)


def _transformed(x: str) -> tuple[Rule, ...]:
    """Return the rules for a matrix (m, n), or (n, m) if across, whose m is the length of the cosine transform."""
    return (
        Dense(x, FLOATS, dims="two dimensions"),
        Let("m", x, lambda x, across: x.shape[1 if across else 0]),
        Let("n", x, lambda x, across: x.shape[0 if across else 1]),
        Condition(x, "have an even length without prime factors above 7", lambda _, m: transforms(m), got="{m}"),
    )


def _chosen(d: str, x: str) -> tuple[Rule, ...]:
    """Return the rules for the coefficients d (r, ...) of the transform of x, and for the index (r,) of each row.

    Columns `first` to `first + n` of d are those of x. Kernels check that each index is inside.
    """
    words = f"have a row per index and the columns of {x}, ({{r}}, {{n}}) from column {{first}} on"

    def fits(d: Tensor, r: int, n: int, first: int) -> bool:
        return d.dim() == 2 and d.shape[0] == r and first >= 0 and first + n <= d.shape[1]

    return (
        Dense("index", I32, on=x, dims="one dimension"),
        Let("r", "index", lambda index: index.shape[0]),
        Dense(d, dtype=x, on=x),
        Condition(d, words, fits),
    )


# -- the operators -----------------------------------------------------------------------------------------------------

RULES: dict[str, tuple[Rule, ...]] = {
    "projected_adam_": (Dense("r", FLOATS), *MOMENTS, STEP),
    "projected_adam_rows_": (
        Dense("r", FLOATS, dims="one dimension or more"),
        *MOMENTS,
        Dense("ages", dtype="r", on="r"),
        Condition("ages", "have one number per row of r {r}", lambda ages, r: ages.numel() == math.prod(r.shape[:-1])),
    ),
    "projected_adam_list_": (Dense("r", FLOATS), *MOMENTS, Dense("r", dtype=FIRST, on=FIRST), STEP),
    "projected_adam_bfloat16_list_": (
        Dense("r", F32, on=FIRST),
        like("exp_avg", "r", BF16),
        like("exp_avg_sq", "r", BF16),
        STEP,
        OneNumber("at", I64, on="r"),
    ),
    "projected_adam_int8_list_": (
        Condition("block", "be 1 to 256", lambda block: 1 <= block <= 256),
        Dense("r", F32, on=FIRST),
        like("exp_avg", "r", U8),
        like("exp_avg_sq", "r", U8),
        *_peaks("peak"),
        *_peaks("peak_sq"),
        Condition("peak_sq", "have the shape of peak {peak}", lambda peak_sq, peak: peak_sq.shape == peak.shape),
        *_map("code_map", "r"),
        *_table("lower", U8, "r"),
        *_map("code_map_sq", "r"),
        *_table("lower_sq", U8, "r"),
        STEP,
    ),
    "gram_": (
        Dense("y", F32, dims="two dimensions or more"),
        Let("k", "y", lambda y, across: y.shape[-2 if across else -1]),
        Dense("out", F64, on="y"),
        Condition(
            "out", "have one number per two columns of y {y}", lambda out, y, k: out.shape == (*y.shape[:-2], k, k)
        ),
    ),
    "fix_signs_": (Dense("basis", FLOATS, dims="two dimensions or more"),),
    "philox_bits16_": _drawn(I32),
    "philox_noise16_": _drawn(F32),
    "philox_uniform_": _drawn(F32),
    "philox_normal_": _drawn(F32),
    "round_to_bfloat16_": (Dense("out", BF16), like("x", "out", F32), OneNumber("at", I64, on="out")),
    "add_nearest_": WEIGHT,
    "add_kahan_": (*WEIGHT, like("owed", "w", BF16)),
    "add_stochastic_": (*WEIGHT, OneNumber("at", I64, on="w")),
    "quantize_blockwise_": (
        *_codes("absmax"),
        NOISE,
        *_map("code_map", "codes"),
        *_table("lower", U8, "codes"),
        *_table("midpoint", F32, "codes"),
    ),
    "quantize_affine_": (Condition("bits", "be 1 to 8", lambda bits: 1 <= bits <= 8), *_codes("scale", "low"), NOISE),
    "quantize_sixteenths_": (*_codes("largest"), NOISE),
    "dequantize_blockwise_": (*_codes("absmax"), *_map("code_map", "codes")),
    "dequantize_affine_": _codes("scale", "low"),
    "pack4_": PACKED,
    "unpack4_": PACKED,
    "select_top_": (
        Dense("scores", FLOATS),
        Dense("index", I32, on="scores"),
        Condition(
            "index",
            "have the shape of scores {scores}, its last dimension not longer",
            lambda index, scores: (
                index.dim() == scores.dim() >= 1
                and index.shape[:-1] == scores.shape[:-1]
                and index.shape[-1] <= scores.shape[-1]
            ),
        ),
        Condition("scores", "have fewer than 2^30 numbers in a line", lambda scores: scores.shape[-1] < 1 << 30),
    ),
    "add_at_": (Dense("dense", FLOATS + BF16), *_entries("values", "dense")),
    "gather_at_": (Dense("dense", FLOATS + BF16), *_entries("out", "dense")),
    "add_sampled_product_": (
        Dense("left", FLOATS),
        Dense("right", dtype="left", on="left"),
        Condition(
            "left",
            "have lines of one length",
            lambda left, right: left.dim() == right.dim() == 2 and left.shape[1] == right.shape[1],
            name="left and right",
            got="{left} and {right}",
        ),
        *_entries("out", "left"),
    ),
    "scale_factored_": (*FACTORED, like("out", "x")),
    "factored_energy_": (
        *FACTORED,
        Dense("sums", F64, on="x"),
        Condition("sums", "have one number per matrix of x {x}", lambda sums, x: sums.shape == x.shape[:-2]),
    ),
    "step_factored_": (*FACTORED, like("w", "x"), like("exp_avg", "x")),
    "squares_": (
        Dense("x", FLOATS + BF16, dims="two dimensions or more"),
        Dense("rows", F64, on="x"),
        Condition("rows", "have one number per row of x {x}", lambda rows, x: rows.shape == x.shape[:-1]),
        Dense("columns", F64, on="x"),
        Condition(
            "columns",
            "have one number per column of x {x}",
            lambda columns, x: columns.shape == (*x.shape[:-2], x.shape[-1]),
        ),
    ),
    "take_scaled_": (
        Dense("w", FLOATS, dims="two dimensions or more"),
        like("x", "w"),
        Dense("factors", dtype="w", on="w"),
        Condition(
            "factors",
            "have one number per row, per column or per matrix of w {w}",
            lambda factors, w: (
                factors.dim() == w.dim()
                and factors.shape[:-2] == w.shape[:-2]
                and factors.shape[-2:] in ((1, 1), (1, w.shape[-1]), (w.shape[-2], 1))
            ),
        ),
    ),
    "move_rows_": (
        Dense("x", FLOATS + I32),
        Dense("source", I64, on="x"),
        Condition(
            "source", "have one number per row of x {x}", lambda source, x: x.dim() >= 1 and source.shape == x.shape[:1]
        ),
    ),
    "cosine_scores_": (
        *_transformed("x"),
        Dense("sums", F64, on="x"),
        Condition("sums", "have one number per coefficient, ({m},)", lambda sums, m: sums.shape == (m,)),
        Condition("power", "be 1 or 2", lambda power: power in (1, 2)),
    ),
    "cosine_rows_": (
        *_transformed("x"),
        Let("first", "out", lambda _: 0),
        *_chosen("out", "x"),
        Condition("out", "have as many columns as x, {n}", lambda out, n: out.shape[1] == n),
    ),
    "add_cosines_": (*_transformed("w"), *_chosen("d", "w")),
}

# These have no CUDA kernel. The libraries of the device form such products, or the whole operator, in less time;
# torch's own sums and pointwise operators reach the speed of its memory; or the tensors are small, or rarely worked on.
CPU_ONLY = {
    "gram_", "add_sampled_product_", "squares_", "take_scaled_", "scale_factored_", "factored_energy_",
    "step_factored_", "projected_adam_rows_", "move_rows_", "cosine_scores_", "cosine_rows_", "add_cosines_",
}  # fmt: skip

# The schema of each operator without its name, and the function that checks its arguments.
OPERATORS: dict[str, tuple[str, Check]] = {
    name: (schema_of(getattr(reference, name)), checker(getattr(reference, name), rules))
    for name, rules in RULES.items()
}


def kernel(name: str) -> Callable[..., None]:
    """Return an operator, or under compilation its plain version, which a compiler fuses with the code around it."""
    if torch.compiler.is_compiling():
        return getattr(reference, name)  # type: ignore[no-any-return]
    return getattr(torch.ops.lowrank_optim, name).default  # type: ignore[no-any-return]


def define(namespace: str) -> torch.library.Library:
    """Define all operators in a namespace. Tests make a second one, for CUDA kernels that run on the CPU."""
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


define(NAMESPACE)
