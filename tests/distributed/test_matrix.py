"""Every cell of the matrix: two processes train as one does, or refuse, and docs/distributed.md says which."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import distributed_table
from tests.support import matrix
from tests.support.zero import apart

pytestmark = pytest.mark.slow  # its processes take long

FLOAT32, BFLOAT16 = matrix.DTYPES
STAGES = [column for column in matrix.COLUMNS if column.startswith("zero")]
cells = [(row, column) for row in matrix.ROWS for column in row.columns()]


def parametrized(some):
    return pytest.mark.parametrize(("row", "column"), some, ids=[f"{row.name}-{column}" for row, column in some])


@pytest.fixture(scope="module")
def filled():
    return matrix.run()


@functools.cache
def alone(row, dtype, side):
    return matrix.alone(row, dtype, side)


def of_one_process(row, column, dtype):
    return alone(row, dtype, column.partition(" ")[2] or "std")


def differences(row, column, dtype, filled):
    """(difference, largest entry) of each tensor, from one process; nothing where it is refused."""
    got = filled[row.name, column, dtype]
    if not isinstance(got, str):
        expected = of_one_process(row, column, dtype)
        for a, b in zip(row.compared(got), row.compared(expected), strict=True):
            yield (a.double() - b.double()).abs().max().item(), b.abs().max().item()


@parametrized(cells)
def test_float32_is_that_of_one_process(row, column, filled):
    """Within 1e-6; methods that decompose their own weights, within what float32 makes of that in one process."""
    some = list(differences(row, column, FLOAT32, filled))
    bound = 1e-6 * max((largest for _, largest in some), default=1)
    if isinstance(row, matrix.Converting):
        (one,), (exact,) = (row.compared(alone(row, dtype, "std")) for dtype in (FLOAT32, torch.float64))
        bound = max(bound, 4 * (one.double() - exact).abs().max().item())
    assert max((difference for difference, _ in some), default=0) <= bound


@parametrized([(row, column) for row, column in cells if column not in STAGES])
def test_bfloat16_is_that_of_one_process(row, column, filled):
    """Bit for bit, because averaging rounds nothing here; but shards of converted layers add up in other orders."""
    adds_up = isinstance(row, matrix.Converting) and column == "fsdp2"
    for difference, largest in differences(row, column, BFLOAT16, filled):
        assert difference <= (2**-7 * largest if adds_up else 0)


@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_stages_that_cut_alike_have_the_same_bits_in_bfloat16(row, filled):
    first, second = (filled[row.name, stage, BFLOAT16] for stage in ("zero1", "zero2"))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def rounded_alike(some, others):
    """Do tensors in bfloat16 differ in last bits of single elements at most?

    Sums that are split otherwise end in other last bits of float32, and of 2^16 such elements one is then rounded to
    its other neighbour.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(some, others, strict=True)]
    near = all(((a - b).abs() <= 2**-7 * b.abs()).all() for a, b in pairs)
    return near and all((a != b).sum() <= max(1, 0.01 * a.numel()) for a, b in pairs)


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_stages_differ_by_last_bits_of_single_weights_in_bfloat16(row, stage, filled):
    got, expected = (filled[row.name, one, BFLOAT16] for one in (stage, "zero1"))
    if isinstance(got, str) or isinstance(expected, str):
        return
    if isinstance(row, matrix.Converting):  # whose next gradients are of what was rounded
        assert apart(row.compared(got), row.compared(expected)) <= 2**-7 * row.compared(expected)[0].abs().max()
    else:
        assert rounded_alike(got, expected)


def test_refusals_name_the_method_and_a_way_out(filled):
    for (name, column, dtype), got in filled.items():
        if isinstance(got, str):
            row = next(row for row in matrix.ROWS if row.name == name)
            assert row.method in got, (column, dtype)
            assert "DistributedDataParallel" in got, (column, dtype)


def test_the_page_says_what_every_cell_says(filled):
    """Which is the test of the refusals: a cell that trained, or said something else, is another page."""
    page = distributed_table.PAGE.read_text()
    assert matrix.table(filled) in page, "run python -m benchmarks.distributed_table"
