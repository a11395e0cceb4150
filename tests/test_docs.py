"""Pages in docs/ say what the code says."""

from __future__ import annotations

import pytest

from benchmarks import distributed_table


@pytest.mark.slow
def test_the_tables_of_the_distributed_page_are_what_their_command_writes():
    page = distributed_table.PAGE.read_text()
    assert distributed_table.written(page) == page, "run python -m benchmarks.distributed_table"
