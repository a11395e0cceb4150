"""Pages in docs/ say what the code says."""

from __future__ import annotations

import pytest

from benchmarks import distributed_table


@pytest.mark.slow
def test_the_tables_of_the_distributed_page_are_what_their_command_writes():
    """But the matrix, which `test_matrix.py` fills."""
    page, names = distributed_table.PAGE.read_text(), [name for name in distributed_table.TABLES if name != "matrix"]
    assert distributed_table.written(page, names) == page, "run python -m benchmarks.distributed_table"
