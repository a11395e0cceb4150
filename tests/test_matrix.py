"""Every cell of the matrix: two processes train as one does, or refuse, and docs/distributed.md says which."""

from __future__ import annotations

import functools

import matrix
import pytest
import torch

from benchmarks import distributed_table

pytestmark = pytest.mark.slow  # its processes take long

FLOAT32, BFLOAT16 = matrix.DTYPES
ONE_PROCESS = [column for column in matrix.COLUMNS if not column.startswith("zero")]  # weights without masters
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


@parametrized(cells)
def test_float32_is_that_of_one_process(row, column, filled):
    got = filled[row.name, column, FLOAT32]
    if not isinstance(got, str):
        expected = of_one_process(row, column, FLOAT32)
        largest = max(x.abs().max().item() for x in expected)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max().item() <= 1e-6 * largest


@parametrized([(row, column) for row, column in cells if column in ONE_PROCESS])
def test_bfloat16_is_that_of_one_process(row, column, filled):
    """Bit by bit, although sums over ranks round in another order: few weights are that near to two numbers."""
    got = filled[row.name, column, BFLOAT16]
    if not isinstance(got, str):
        for a, b in zip(got, of_one_process(row, column, BFLOAT16), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_stages_have_the_same_bits_in_bfloat16(row, filled):
    trained = [got for stage in STAGES if not isinstance(got := filled[row.name, stage, BFLOAT16], str)]
    for got in trained[1:]:
        for a, b in zip(got, trained[0], strict=True):
            assert a.dtype == torch.bfloat16
            assert torch.equal(a, b)


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
