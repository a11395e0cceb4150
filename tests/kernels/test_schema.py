"""The operators: schemas, and which arguments they refuse in which words, in Python and in the native kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_optim.ops import schema

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
U8, I16, I32, I64 = torch.uint8, torch.int16, torch.int32, torch.int64
DTYPES = (F16, BF16, F32, F64, U8, I16, I32, I64)

# -- schemas -----------------------------------------------------------------------------------------------------------

NUMBERS = "int key, int purpose, int time, Tensor? at=None, int start=0"
MOMENTS = "Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor(c!) r"
MOMENT_LISTS = "Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor(c!)[] r"
RULE = "float beta1, float beta2, float eps, float t"
SCHEMAS = {
    "projected_adam_": f"{MOMENTS}, {RULE}, Tensor? step=None",
    "projected_adam_rows_": f"{MOMENTS}, float beta1, float beta2, float eps, Tensor ages",
    "projected_adam_list_": f"{MOMENT_LISTS}, {RULE}, Tensor? step=None",
    "projected_adam_bfloat16_list_": f"{MOMENT_LISTS}, {RULE}, "
    "Tensor? step, int[] key, int purpose, int purpose_sq, int time, Tensor? at, int[] start",
    "projected_adam_int8_list_": "Tensor(a!)[] exp_avg, Tensor(b!)[] peak, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] peak_sq, Tensor(e!)[] r, Tensor code_map, Tensor lower, Tensor code_map_sq, Tensor lower_sq, "
    f"int block, {RULE}, Tensor? step=None",
    "gram_": "Tensor(a!) out, Tensor y, bool across=False",
    "fix_signs_": "Tensor(a!) basis",
    "philox_bits16_": f"Tensor(a!) out, {NUMBERS}",
    "philox_noise16_": f"Tensor(a!) out, {NUMBERS}",
    "philox_uniform_": f"Tensor(a!) out, {NUMBERS}",
    "philox_normal_": f"Tensor(a!) out, {NUMBERS}",
    "round_to_bfloat16_": f"Tensor(a!) out, Tensor x, {NUMBERS}",
    "add_nearest_": "Tensor(a!) w, Tensor x, float keep, Tensor? factor=None, int first=0",
    "add_kahan_": "Tensor(a!) w, Tensor(b!) owed, Tensor x, float keep, Tensor? factor=None, int first=0",
    "add_stochastic_": f"Tensor(a!) w, Tensor x, float keep, {NUMBERS}, int pitch=0, Tensor? factor=None, int first=0",
    "quantize_blockwise_": "Tensor(a!) codes, Tensor(b!) absmax, Tensor x, Tensor code_map, Tensor lower, "
    "Tensor midpoint, int block, bool signed_peak=False, Tensor? noise=None",
    "quantize_affine_": "Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) low, Tensor x, int bits, int block, "
    "Tensor? noise=None",
    "quantize_sixteenths_": "Tensor(a!) codes, Tensor(b!) largest, Tensor x, int block, Tensor? noise=None",
    "dequantize_blockwise_": "Tensor(a!) x, Tensor codes, Tensor absmax, Tensor code_map, int block",
    "dequantize_affine_": "Tensor(a!) x, Tensor codes, Tensor scale, Tensor low, int block",
    "pack4_": "Tensor(a!) packed, Tensor codes",
    "unpack4_": "Tensor(a!) codes, Tensor packed",
    "select_top_": "Tensor(a!) index, Tensor scores",
    "add_at_": "Tensor(a!) dense, Tensor positions, Tensor values, int start=0",
    "gather_at_": "Tensor(a!) out, Tensor dense, Tensor positions, int start=0",
    "add_sampled_product_": "Tensor(a!) out, Tensor left, Tensor right, Tensor positions",
    "scale_factored_": "Tensor(a!) out, Tensor x, Tensor rows, Tensor columns, float most",
    "factored_energy_": "Tensor(a!) sums, Tensor x, Tensor rows, Tensor columns, float most",
    "step_factored_": "Tensor(a!) w, Tensor(b!)? exp_avg, Tensor x, Tensor rows, Tensor columns, float most, "
    "float beta, float gain, float length, float keep",
    "squares_": "Tensor(a!) rows, Tensor(b!) columns, Tensor x",
    "take_scaled_": "Tensor(a!) w, Tensor x, Tensor factors, float keep",
    "move_rows_": "Tensor(a!) x, Tensor source",
    "cosine_scores_": "Tensor(a!) sums, Tensor x, bool third, int power, bool across",
    "cosine_rows_": "Tensor(a!) out, Tensor x, Tensor index, bool third, bool across",
    "add_cosines_": "Tensor(a!) w, Tensor d, Tensor index, float alpha, float beta, bool third, bool across, "
    "int first=0",
}
every_operator = pytest.mark.parametrize("name", SCHEMAS)


def test_these_are_all_operators():
    assert SCHEMAS.keys() == schema.OPERATORS.keys()


@every_operator
def test_registered_schemas(name):
    registered = getattr(torch.ops.lowrank_optim, name).default._schema
    assert registered == torch._C.parse_schema(f"lowrank_optim::{name}({SCHEMAS[name]}) -> ()")
    assert str(registered) == f"lowrank_optim::{name}({SCHEMAS[name]}) -> ()"


# -- arguments that are accepted ---------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def accepted() -> dict[str, list[Any]]:
    """Arguments for each operator: matrices (4, 6), of which 4 elements are a block; lists of two tensors."""
    x, y, w, owed = zeros(4, 6), zeros(4, 6), zeros(4, 9, dtype=BF16), zeros(4, 9, dtype=BF16)
    codes, half_bytes, one, two = zeros(4, 6, dtype=U8), zeros(4, 3, dtype=U8), zeros(4, 2), zeros(4, 2)
    rule, step = (0.9, 0.99, 1e-8, 1.0), torch.ones(1)
    number, factor, noise = (1, 2, 3, zeros(1, dtype=I64), 0), torch.ones(1), torch.full((4, 6), 0.5)
    levels, lower, midpoint = torch.linspace(-1, 1, 256), zeros(1 << 16, dtype=U8), zeros(1 << 16)
    positions, index = torch.tensor([1, 5]), torch.tensor([0, 2], dtype=I32)
    factors = zeros(4, 1), zeros(1, 6)

    def lists(dtype: torch.dtype = F32) -> list[torch.Tensor]:
        return [zeros(4, 6, dtype=dtype), zeros(2, 3, dtype=dtype)]

    def peaks() -> list[torch.Tensor]:
        return [zeros(6), zeros(2)]

    return {
        "projected_adam_": [zeros(4, 6), x, y, *rule, step],
        "projected_adam_rows_": [zeros(4, 6), x, y, *rule[:3], torch.ones(4)],
        "projected_adam_list_": [lists(), lists(), lists(), *rule, step],
        "projected_adam_bfloat16_list_": [
            *(lists(BF16), lists(BF16), lists(), *rule, step),
            *([1, 2], 3, 4, 5, zeros(1, dtype=I64), [0, 7]),
        ],
        "projected_adam_int8_list_": [
            *(lists(U8), peaks(), lists(U8), peaks(), lists()),
            *(levels, lower, levels.clone(), lower.clone(), 4, *rule, step),
        ],
        "gram_": [zeros(6, 6, dtype=F64), x, False],
        "fix_signs_": [x],
        "philox_bits16_": [zeros(4, 6, dtype=I32), *number],
        "philox_noise16_": [x, *number],
        "philox_uniform_": [x, *number],
        "philox_normal_": [x, *number],
        "round_to_bfloat16_": [zeros(4, 6, dtype=BF16), x, *number],
        "add_nearest_": [w, x, 0.9, factor, 3],
        "add_kahan_": [w, owed, x, 0.9, factor, 3],
        "add_stochastic_": [w, x, 0.9, *number, 6, factor, 3],
        "quantize_blockwise_": [codes, one, x, levels, lower, midpoint, 4, True, noise],
        "quantize_affine_": [codes, one, two, x, 8, 4, noise],
        "quantize_sixteenths_": [codes, one, x, 4, noise],
        "dequantize_blockwise_": [x, codes, one, levels, 4],
        "dequantize_affine_": [x, codes, one, two, 4],
        "pack4_": [half_bytes, codes],
        "unpack4_": [codes, half_bytes],
        "select_top_": [zeros(4, 2, dtype=I32), x],
        "add_at_": [x, positions, zeros(2), 0],
        "gather_at_": [zeros(2), x, positions, 0],
        "add_sampled_product_": [zeros(2), zeros(4, 3), zeros(6, 3), positions],
        "scale_factored_": [x, y, *factors, 1.0],
        "factored_energy_": [zeros(dtype=F64), x, *factors, 1.0],
        "step_factored_": [zeros(4, 6), x, y, *factors, 1.0, 0.9, 1.0, 1.0, 1.0],
        "squares_": [zeros(4, dtype=F64), zeros(6, dtype=F64), x],
        "take_scaled_": [x, y, zeros(4, 1), 1.0],
        "move_rows_": [x, torch.tensor([0, 2, 3, -1])],
        "cosine_scores_": [zeros(4, dtype=F64), x, False, 1, False],
        "cosine_rows_": [zeros(2, 6), x, index, False, False],
        "add_cosines_": [x, zeros(2, 8), index, 1.0, 1.0, False, False, 2],
    }


def operator(name: str) -> Any:
    return getattr(torch.ops.lowrank_optim, name).default


def names_of(name: str) -> list[str]:
    return [argument.name for argument in operator(name)._schema.arguments]


def changed(name: str, changes: dict[str, Any]) -> list[Any]:
    """Return the accepted arguments with some replaced: by another dtype, device or shape of theirs, or by a value.

    Of a list the last entry is changed.
    """
    arguments = dict(zip(names_of(name), accepted()[name], strict=True))
    for argument, change in changes.items():
        before = arguments[argument]
        if isinstance(before, list) and not isinstance(change, list):
            arguments[argument] = [*before[:-1], changed_to(before[-1], change)]
        else:
            arguments[argument] = changed_to(before, change)
    return list(arguments.values())


def changed_to(x: Any, change: Any) -> Any:
    if isinstance(change, torch.dtype | str) and isinstance(x, torch.Tensor):
        if change == "gaps":
            return torch.stack([x, x], dim=-1)[..., 0]
        return x.to(change)
    return x.new_zeros(change) if isinstance(change, tuple) and isinstance(x, torch.Tensor) else change


def check(name: str, arguments: list[Any]) -> None:
    schema.OPERATORS[name][1](*arguments)


def every(dtype: torch.dtype, *arguments: str) -> dict[str, Any]:
    return dict.fromkeys(arguments, dtype)


# Changes of the arguments above under which they are still accepted.
ADAM = ("exp_avg", "exp_avg_sq", "r")
FACTORED = {"x": (3, 4, 6), "rows": (3, 4, 1), "columns": (3, 1, 6)}
NUMBER = [{"at": None}, {"at": ()}, {"key": -1, "start": -9}]
FACTOR = [{"factor": None}, {"factor": F64}, {"factor": ()}, {"first": 0}, {"x": (4, 0), "first": 9}]
NOISE = [{"noise": None}, {"x": BF16}]
STILL_ACCEPTED: dict[str, list[dict[str, Any]]] = {
    "projected_adam_": [{"step": None}, {"step": F64}, {"step": ()}, every(F64, *ADAM), every((), *ADAM)],
    "projected_adam_rows_": [every(F64, *ADAM, "ages"), {"ages": (2, 2)}, {**every((5,), *ADAM), "ages": ()}],
    "projected_adam_list_": [{"step": None}, {"step": F64}, every([], *ADAM), {**every([], *ADAM), "step": I16}],
    "projected_adam_bfloat16_list_": [
        *({"step": None}, {"step": F64}, {"at": None}, every([], *ADAM, "key", "start")),
        {**every([], *ADAM, "key", "start"), "step": I16, "at": I16},
    ],
    "projected_adam_int8_list_": [
        *({"step": None}, {"step": F64}, {"code_map": (1,)}, every((1, 2), "peak", "peak_sq")),
        *({"block": 256, **every([zeros(1), zeros(1)], "peak", "peak_sq")}, every([], *ADAM, "peak", "peak_sq")),
        {**every([], *ADAM, "peak", "peak_sq"), **every(F64, "code_map", "code_map_sq"), "step": I16},
    ],
    "gram_": [{"out": (4, 4), "across": True}, {"y": (3, 4, 6), "out": (3, 6, 6)}],
    "fix_signs_": [{"basis": F64}, {"basis": (3, 4, 6)}, {"basis": (0, 0)}],
    "philox_bits16_": NUMBER,
    "philox_noise16_": NUMBER,
    "philox_uniform_": NUMBER,
    "philox_normal_": NUMBER,
    "round_to_bfloat16_": [*NUMBER, every((), "out", "x")],
    "add_nearest_": FACTOR,
    "add_kahan_": FACTOR,
    "add_stochastic_": [*FACTOR, *NUMBER],
    "quantize_blockwise_": [*NOISE, {"code_map": (1,)}],
    "quantize_affine_": [*NOISE, {"bits": 1}, {"block": 5}],
    "quantize_sixteenths_": [*NOISE, {"block": 3}],
    "dequantize_blockwise_": [{"x": BF16}, {"code_map": (1,)}, {"block": 5}],
    "dequantize_affine_": [{"x": BF16}, {"block": 5}],
    "pack4_": [{"codes": (4, 5)}, {"codes": (6,), "packed": (3,)}],
    "unpack4_": [{"codes": (4, 5)}, {"codes": (6,), "packed": (3,)}],
    "select_top_": [{"scores": F64}, {"index": (4, 6)}, {"index": (4, 0)}],
    "add_at_": [{"positions": I32}, every(F64, "dense", "values"), every(BF16, "dense", "values")],
    "gather_at_": [{"positions": I32}, every(F64, "dense", "out"), every(BF16, "dense", "out")],
    "add_sampled_product_": [{"positions": I32}, every(F64, "out", "left", "right")],
    "scale_factored_": [every(F64, "out", "x", "rows", "columns"), {**FACTORED, "out": (3, 4, 6)}],
    "factored_energy_": [every(F64, "x", "rows", "columns"), {**FACTORED, "sums": (3,)}],
    "step_factored_": [
        *({"exp_avg": None}, every(F64, "w", "exp_avg", "x", "rows", "columns")),
        {**FACTORED, "w": (3, 4, 6), "exp_avg": (3, 4, 6)},
    ],
    "squares_": [{"x": F64}, {"x": BF16}, {"x": (3, 4, 6), "rows": (3, 4), "columns": (3, 6)}],
    "take_scaled_": [{"factors": (1, 6)}, {"factors": (1, 1)}, every(F64, "w", "x", "factors")],
    "move_rows_": [{"x": F64}, {"x": I32}, {"x": (4,)}, {"x": (4, 2, 3)}, {"x": (0, 3), "source": (0,)}],
    "cosine_scores_": [{"x": F64}, {"power": 2}, {"across": True, "sums": (6,)}],
    "cosine_rows_": [every(F64, "out", "x"), {"across": True, "out": (2, 4)}, {"index": (0,), "out": (0, 6)}],
    "add_cosines_": [every(F64, "w", "d"), {"across": True, "d": (2, 6)}, {"first": 0, "d": (2, 6)}],
}


@every_operator
def test_accepted_arguments(name):
    for changes in ({}, *STILL_ACCEPTED[name]):
        check(name, changed(name, changes))
        operator(name)(*changed(name, changes))


@every_operator
def test_arguments_that_have_defaults_may_be_left_out(name):
    arguments = accepted()[name]
    least = sum(not argument.has_default_value() for argument in operator(name)._schema.arguments)
    for count in range(least, len(arguments) + 1):
        check(name, arguments[:count])


# -- arguments that are refused ----------------------------------------------------------------------------------------

Refused = list[tuple[dict[str, Any], str]]


def typed(argument: str, words: str) -> Refused:
    others = [dtype for dtype in DTYPES if str(dtype).removeprefix("torch.") not in words.split(" or ")]
    return [({argument: dtype}, f"{argument} must be {words}, got {dtype}") for dtype in others]


def follows(argument: str, like: str) -> Refused:
    return [({argument: I16}, f"{argument} must have the dtype of {like}, got torch.int16")]


def dense(*arguments: str) -> Refused:
    return [({argument: "gaps"}, f"{argument} must be contiguous; use .contiguous()") for argument in arguments]


def placed(like: str, *arguments: str) -> Refused:
    return [({argument: "meta"}, f"{argument} must be on the device of {like}") for argument in arguments]


def shaped(argument: str, like: str, expected: str = "(4, 6)") -> Refused:
    words = f"{argument} must have the shape of {like} {expected}, got"
    return [({argument: (3, 6)}, f"{words} (3, 6)"), ({argument: (4, 6, 1)}, f"{words} (4, 6, 1)")]


def like(argument: str, of: str, expected: str = "(4, 6)", *, dtype: str = "") -> Refused:
    types = typed(argument, dtype) if dtype else follows(argument, of)
    return [*types, *shaped(argument, of, expected), *dense(argument), *placed(of, argument)]


def one_number(argument: str, of: str, words: str = "float32 or float64") -> Refused:
    several = [({argument: (2,)}, f"{argument} must be one number, got (2,)")]
    return [*typed(argument, words), *several, *placed(of, argument)]


def misfits(argument: str, words: str, *shapes: tuple[int, ...]) -> Refused:
    return [({argument: shape}, f"{argument} must have {words}, got {shape}") for shape in shapes]


def long(*arguments: str) -> Refused:
    words = "must have one entry for each of r, 2, got"
    lists = [({argument: [zeros(4, 6)]}, f"{argument} {words} 1") for argument in arguments if "exp" in argument]
    return [*lists, *[({argument: []}, f"{argument} {words} 0") for argument in arguments]]


def of_lists(*arguments: str) -> Refused:
    """Return what the lists of `projected_adam_bfloat16_list_` and of `projected_adam_int8_list_` are refused for."""
    entry = [*typed("r", "float32"), *dense("r"), *placed("its first tensor", "r")]
    return [*long(*arguments), *entry, *one_number("step", "r")]


def of_codes(*numbers: str, like_codes: tuple[str, ...] = ("x", "noise")) -> Refused:
    words = "one number per block of 4 of codes (4, 6)"
    return [
        *(*typed("codes", "uint8"), *dense("codes"), *like("x", "codes", dtype="float32 or bfloat16")),
        *(like("noise", "codes", dtype="float32") if "noise" in like_codes else []),
        (every((), "codes", *like_codes), "x must have a last dimension to be cut into blocks, got a scalar"),
        *[({"block": block}, f"block must be at least 1, got {block}") for block in (0, -1)],
        *[fault for number in numbers for fault in typed(number, "float32")],
        *(*dense(*numbers), *placed("codes", *numbers)),
        *[fault for number in numbers for fault in misfits(number, words, (4, 1), (8,), (4, 2, 1))],
    ]


def of_map(code_map: str, of: str) -> Refused:
    words = "1 to 256 entries"
    faults = [*typed(code_map, "float32"), *dense(code_map), *placed(of, code_map)]
    return [*faults, *misfits(code_map, words, (0,), (257,), (16, 16))]


def of_table(table: str, dtype: str, of: str) -> Refused:
    few = [({table: (5,)}, f"{table} must have 65536 entries, got 5")]
    return [*typed(table, dtype), *dense(table), *placed(of, table), *few]


def of_draw(dtype: str) -> Refused:
    return [*typed("out", dtype), *dense("out"), *one_number("at", "out", "int64")]


def of_weight() -> Refused:
    words = "x must have the rows of w (4, 9) and fit into its columns from {} on, got {}"
    return [
        *(*typed("w", "bfloat16"), *dense("w"), *typed("x", "float32"), *dense("x"), *placed("w", "x")),
        *(*misfits("w", "two dimensions", (4,), (4, 9, 1)), *one_number("factor", "w")),
        *[({"x": shape}, words.format(3, shape)) for shape in ((3, 6), (4, 7), (4, 6, 1), (4,))],
        *[({"first": first}, words.format(first, (4, 6))) for first in (-1, 4)],
    ]


def of_positions(numbers: str, of: str) -> Refused:
    """Return what positions, and numbers that have the dtype of the argument `of`, are refused for."""
    return [
        *(*typed("positions", "int32 or int64"), *dense("positions"), *placed(numbers, "positions")),
        *misfits("positions", "one dimension", (1, 2), ()),
        *(*follows(numbers, of), *dense(numbers), *placed(of, numbers)),
        *[({numbers: shape}, f"{numbers} must have the shape of positions (2,), got {shape}") for shape in ((3,), ())],
    ]


def of_factored(*like_x: str) -> Refused:
    faults = [*typed("x", "float32 or float64"), *dense("x"), *misfits("x", "two dimensions or more", (6,), ())]
    for factors, line, shapes in (
        ("rows", "row", ((4,), (1, 4), (1, 4, 1))),
        ("columns", "column", ((6,), (6, 1), (1, 1, 6))),
    ):
        faults += [*follows(factors, "x"), *dense(factors), *placed("x", factors)]
        faults += misfits(factors, f"one number per {line} of x (4, 6)", *shapes)
    faults += [fault for argument in like_x for fault in like(argument, "x")]
    return faults


def of_cosines(x: str) -> Refused:
    words = f"{x} must have an even length without prime factors above 7, got"
    return [
        *(*typed(x, "float32 or float64"), *dense(x), *misfits(x, "two dimensions", (6,), (1, 4, 6))),
        *[({x: (m, 6)}, f"{words} {m}") for m in (0, 1, 5, 22)],
        ({x: (4, 13), "across": True}, f"{words} 13"),
    ]


def of_chosen(d: str, x: str, column: int) -> Refused:
    words = f"a row per index and the columns of {x}, (2, 6) from column {column} on"
    index = [*typed("index", "int32"), *dense("index"), *placed(x, "index"), *misfits("index", "one dimension", (1, 2))]
    chosen = [*follows(d, x), *dense(d), *placed(x, d), *misfits(d, words, (3, 8), (2, 5), (2,), (1, 2, 8))]
    return [*index, *chosen]


MOMENTS = [*typed("r", "float32 or float64"), *dense("r"), *like("exp_avg", "r"), *like("exp_avg_sq", "r")]
COUNT = one_number("step", "r")
TIME = one_number("at", "w", "int64")
OF_R = "r (2, 3)"  # the last of the list
SUMS = dict(dtype="float64")
REFUSED: dict[str, Refused] = {
    "projected_adam_": [*MOMENTS, *COUNT],
    "projected_adam_rows_": [
        *(*MOMENTS, *follows("ages", "r"), *dense("ages"), *placed("r", "ages")),
        *misfits("ages", "one number per row of r (4, 6)", (6,), ()),
        (every((), *ADAM), "r must have one dimension or more, got ()"),
    ],
    "projected_adam_list_": [
        *(*long("exp_avg", "exp_avg_sq"), *typed("r", "float32 or float64")[:3], *dense("r"), *COUNT),
        *[fault for argument in ADAM[:2] for fault in like(argument, "r", "(2, 3)")],
        (every(F64, *ADAM), "r must have the dtype of its first tensor, got torch.float64"),
        (every("meta", *ADAM), "r must be on the device of its first tensor"),
    ],
    "projected_adam_bfloat16_list_": [
        *(*of_lists("exp_avg", "exp_avg_sq", "key", "start"), *one_number("at", "r", "int64")),
        *[fault for argument in ADAM[:2] for fault in like(argument, "r", "(2, 3)", dtype="bfloat16")],
    ],
    "projected_adam_int8_list_": [
        *of_lists("exp_avg", "exp_avg_sq", "peak", "peak_sq"),
        *[fault for argument in ADAM[:2] for fault in like(argument, "r", "(2, 3)", dtype="uint8")],
        *[fault for argument in ("peak", "peak_sq") for fault in typed(argument, "float32")],
        *(*dense("peak", "peak_sq"), *placed("r", "peak", "peak_sq")),
        *misfits("peak", f"one number per block of 4 of {OF_R}", (3,), (4, 1), (0, 2), (2, 2), ()),
        *misfits("peak_sq", f"one number per block of 4 of {OF_R}", (3,)),
        ({"peak_sq": (2, 1)}, "peak_sq must have the shape of peak (2,), got (2, 1)"),
        *(*of_map("code_map", "r"), *of_map("code_map_sq", "r")),
        *(*of_table("lower", "uint8", "r"), *of_table("lower_sq", "uint8", "r")),
        *[({"block": block}, f"block must be 1 to 256, got {block}") for block in (0, 257)],
        ({**every([], *ADAM, "peak", "peak_sq"), "block": 0}, "block must be 1 to 256, got 0"),
    ],
    "gram_": [
        *(*typed("y", "float32"), *dense("y"), *misfits("y", "two dimensions or more", (6,), ())),
        *(*typed("out", "float64"), *dense("out"), *placed("y", "out")),
        *misfits("out", "one number per two columns of y (4, 6)", (4, 4), (6,), (1, 6, 6)),
        ({"across": True}, "out must have one number per two columns of y (4, 6), got (6, 6)"),
    ],
    "fix_signs_": [
        *(*typed("basis", "float32 or float64"), *dense("basis"), *misfits("basis", "two dimensions or more", (6,), ()))
    ],
    "philox_bits16_": of_draw("int32"),
    "philox_noise16_": of_draw("float32"),
    "philox_uniform_": of_draw("float32"),
    "philox_normal_": of_draw("float32"),
    "round_to_bfloat16_": [*of_draw("bfloat16"), *like("x", "out", dtype="float32")],
    "add_nearest_": of_weight(),
    "add_kahan_": [*of_weight(), *like("owed", "w", "(4, 9)", dtype="bfloat16")],
    "add_stochastic_": [*of_weight(), *TIME],
    "quantize_blockwise_": [
        *(*of_codes("absmax"), *of_map("code_map", "codes")),
        *(*of_table("lower", "uint8", "codes"), *of_table("midpoint", "float32", "codes")),
    ],
    "quantize_affine_": [
        *(*of_codes("scale", "low"), *[({"bits": bits}, f"bits must be 1 to 8, got {bits}") for bits in (0, 9)])
    ],
    "quantize_sixteenths_": of_codes("largest"),
    "dequantize_blockwise_": [*of_codes("absmax", like_codes=("x",)), *of_map("code_map", "codes")],
    "dequantize_affine_": of_codes("scale", "low", like_codes=("x",)),
    **{
        name: [
            *(*typed("packed", "uint8"), *typed("codes", "uint8"), *dense("packed", "codes")),
            *(*placed("codes", "packed"), ({"codes": ()}, "codes must have a last dimension, got a scalar")),
            *misfits("packed", "one byte for two codes (4, 6)", (4, 4), (3,), (3, 3), (4, 3, 1)),
        ]
        for name in ("pack4_", "unpack4_")
    },
    "select_top_": [
        *(*typed("index", "int32"), *dense("index"), *placed("scores", "index")),
        *(*typed("scores", "float32 or float64"), *dense("scores")),
        *[
            (change, f"index must have the shape of scores {scores}, its last dimension not longer, got {index}")
            for change, scores, index in (
                *(({"index": shape}, (4, 6), shape) for shape in ((3, 2), (4, 7), (2,), (1, 4, 2))),
                (every((), "index", "scores"), (), ()),
            )
        ],
        (
            {"index": zeros(1, dtype=I32).to("meta"), "scores": torch.empty(1 << 30, device="meta")},
            "scores must have fewer than 2^30 numbers in a line, got (1073741824,)",
        ),
    ],
    "add_at_": [
        *(*typed("dense", "float32 or float64 or bfloat16"), *dense("dense"), *of_positions("values", "dense"))
    ],
    "gather_at_": [
        *(*typed("dense", "float32 or float64 or bfloat16"), *dense("dense"), *of_positions("out", "dense"))
    ],
    "add_sampled_product_": [
        *(*typed("left", "float32 or float64"), *follows("right", "left"), *dense("left", "right")),
        *(*placed("left", "right"), *of_positions("out", "left")),
        *[
            ({argument: shape}, f"left and right must have lines of one length, got {left} and {right}")
            for argument, shape, left, right in (
                *(("left", shape, shape, (6, 3)) for shape in ((4, 2), (3,), (1, 4, 3))),
                *(("right", shape, (4, 3), shape) for shape in ((6, 2), (3,), (1, 6, 3))),
            )
        ],
    ],
    "scale_factored_": of_factored("out"),
    "factored_energy_": [
        *(*of_factored(), *typed("sums", "float64"), *placed("x", "sums")),
        *misfits("sums", "one number per matrix of x (4, 6)", (1,), (4, 6)),
        ({**FACTORED, "sums": zeros(6, dtype=F64)[::2]}, "sums must be contiguous; use .contiguous()"),
        ({**FACTORED, "sums": (3, 1)}, "sums must have one number per matrix of x (3, 4, 6), got (3, 1)"),
    ],
    "step_factored_": of_factored("w", "exp_avg"),
    "squares_": [
        *(
            *typed("x", "float32 or float64 or bfloat16"),
            *dense("x"),
            *misfits("x", "two dimensions or more", (6,), ()),
        ),
        *(*typed("rows", "float64"), *typed("columns", "float64"), *dense("rows", "columns")),
        *(*placed("x", "rows", "columns"), *misfits("rows", "one number per row of x (4, 6)", (6,), (4, 1), ())),
        *misfits("columns", "one number per column of x (4, 6)", (4,), (1, 6), ()),
    ],
    "take_scaled_": [
        *(*typed("w", "float32 or float64"), *dense("w"), *misfits("w", "two dimensions or more", (6,), ())),
        *(*like("x", "w"), *follows("factors", "w"), *dense("factors"), *placed("w", "factors")),
        *misfits("factors", "one number per row, per column or per matrix of w (4, 6)", (4, 6), (6,), (), (1, 1, 1)),
    ],
    "move_rows_": [
        *(*typed("x", "float32 or float64 or int32"), *dense("x")),
        *(*typed("source", "int64"), *dense("source"), *placed("x", "source")),
        *misfits("source", "one number per row of x (4, 6)", (3,), (4, 1), ()),
        (every((), "x", "source"), "source must have one number per row of x (), got ()"),
    ],
    "cosine_scores_": [
        *(*of_cosines("x"), *typed("sums", "float64"), *dense("sums"), *placed("x", "sums")),
        *misfits("sums", "one number per coefficient, (4,)", (6,), (4, 1), ()),
        ({"across": True}, "sums must have one number per coefficient, (6,), got (4,)"),
        *[({"power": power}, f"power must be 1 or 2, got {power}") for power in (0, 3)],
    ],
    "cosine_rows_": [
        *(*of_cosines("x"), *of_chosen("out", "x", 0)),
        *misfits("out", "as many columns as x, 6", (2, 7)),
        *[({"out": (2, 4)}, "out must have a row per index and the columns of x, (2, 6) from column 0 on, got (2, 4)")],
    ],
    "add_cosines_": [
        *(*of_cosines("w"), *of_chosen("d", "w", 2)),
        ({"first": -1}, "d must have a row per index and the columns of w, (2, 6) from column -1 on, got (2, 8)"),
        ({"first": 3}, "d must have a row per index and the columns of w, (2, 6) from column 3 on, got (2, 8)"),
    ],
}


@every_operator
def test_refused_arguments(name):
    """In Python and in native kernels: their messages name the argument, what is expected, and what was given."""
    for changes, message in REFUSED[name]:
        arguments = changed(name, changes)
        with pytest.raises(RuntimeError) as plain:
            check(name, arguments)
        assert str(plain.value) == message
        with pytest.raises(RuntimeError) as ours:
            operator(name)(*arguments)
        assert message in str(ours.value)


@every_operator
def test_each_tensor_is_refused_on_another_device_or_with_gaps(name):
    """Or with another dtype. The first tensor of all has no device to be compared with."""
    for argument in operator(name)._schema.arguments:
        if "Tensor" in str(argument.type):
            changes = [next(iter(change.values())) for change, _ in REFUSED[name] if [*change] == [argument.name]]
            assert any(isinstance(change, torch.dtype) for change in changes), argument.name
            assert any(isinstance(change, str) for change in changes), argument.name
