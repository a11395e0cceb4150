"""Which rows of a parametrized test are run: all of one parameter, and of products of parameters a part.

The default run has each value of each parameter at least once, the default and the slow run together have each pair
of values. Two marks are for tests that are expensive: with `few(name=values)` the default run has the named values of
that parameter only; with `thin` the slow run has each value at least once, but not each pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb
from typing import Any

import pytest

# One method for each path through the engine: a fitted basis, a random one with a limiter, columns by index, a
# factored rule. All others differ from one of them in a single part.
FEW = ("galore_adamw", "apollo", "dct", "galore_adafactor")


def cover(rows: Sequence[Sequence[int]], size: int) -> set[int]:
    """Return the indices of a few rows that contain every combination of `size` values that any row contains.

    Args:
        rows: the index of the value of each parameter, for each row of the test.
        size: 1 for each value, 2 for each pair of values.
    """
    size = min(size, len(rows[0]))
    order = random.Random(0).sample(range(len(rows)), len(rows))  # so that values meet others in any order
    found = [set(combinations(enumerate(row), size)) for row in rows]
    missing, kept = set().union(*found), set()
    for gain in range(comb(len(rows[0]), size), 0, -1):
        for i in order:
            if len(found[i] & missing) >= gain:
                kept.add(i)
                missing -= found[i]
    return kept


def select(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the items to run and those left out, in their order; mark as slow what the default run leaves out."""
    tests: dict[str, list[pytest.Function]] = {}
    kept = []
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
        else:
            kept.append(item)
    for group in tests.values():
        kept += _rows_to_run(group)
    chosen = set(kept)
    return [item for item in items if item in chosen], [item for item in items if item not in chosen]


def _rows_to_run(group: list[pytest.Function]) -> list[pytest.Function]:
    rows = list(zip(*_independent(group), strict=True))
    mark = group[0].get_closest_marker("few")
    eligible = [i for i, item in enumerate(group) if mark is None or _is_among(item, mark.kwargs)]
    default = {eligible[i] for i in cover([rows[i] for i in eligible], 1)} if eligible else set()
    kept = default | cover(rows, 1 if group[0].get_closest_marker("thin") else 2)
    for i in kept - default:
        group[i].add_marker(pytest.mark.slow)
    return [item for i, item in enumerate(group) if i in kept]


def _independent(group: list[pytest.Function]) -> list[list[int]]:
    """Return which of its values each parameter has in each row, without parameters that another one determines."""
    columns: list[list[int]] = []
    for name in group[0].callspec.params:
        seen: dict[int, int] = {}  # values of one list are the same objects in all rows
        columns.append([seen.setdefault(id(item.callspec.params[name]), len(seen)) for item in group])
    kept: list[list[int]] = []
    for column in sorted(columns, key=lambda column: -len(set(column))):
        # (shape, rank) of one decorator: the shape says which rank
        if not any(len(set(zip(other, column, strict=True))) == len(set(other)) for other in kept):
            kept.append(column)
    return kept


def _is_among(item: pytest.Function, values: dict[str, Iterable[Any]]) -> bool:
    params = item.callspec.params
    return all(getattr(params[name], "name", params[name]) in few for name, few in values.items())


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Return the values of a parameter that this run needs of the module that asks, for a fixture of the module."""
    here = [x for x in request.session.items if isinstance(x, pytest.Function) and x.module is request.module]
    values = [x.callspec.params[name] for x in here if hasattr(x, "callspec") and name in x.callspec.params]
    return list({getattr(value, "name", value): value for value in values}.values())
