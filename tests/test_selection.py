"""tests/support/selection.py: which rows of products of parameters are run."""

from __future__ import annotations

import itertools

import pytest

from tests.support.selection import FEW, cover

ROWS = list(itertools.product(range(14), range(5), range(2), range(2)))


@pytest.mark.parametrize(("size", "most"), [(1, 14), (2, 90)])
def test_every_combination_of_values_occurs_in_few_rows(size, most):
    kept = [ROWS[i] for i in cover(ROWS, size)]
    for places in itertools.combinations(range(4), size):
        assert {tuple(row[i] for i in places) for row in kept} == {tuple(row[i] for i in places) for row in ROWS}
    assert len(kept) <= most


def test_one_parameter_keeps_all_its_values():
    assert cover([(0,), (1,), (2,)], 1) == cover([(0,), (1,), (2,)], 2) == {0, 1, 2}


def test_the_few_methods_are_in_the_table():
    from tests.cases import CASES

    assert set(FEW) <= {case.name for case in CASES}


def test_default_and_slow_run_of_a_product(pytester):
    pytester.makeconftest(
        "import pytest\n"
        "from tests.support import selection\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_collection_modifyitems(items): items[:], _ = selection.select(items)\n"
    )
    pytester.makeini("[pytest]\nmarkers = slow\n  few\n  thin\n")
    pytester.makepyfile(
        "import pytest\n"
        "product = lambda f: pytest.mark.parametrize('x', range(4))(pytest.mark.parametrize('y', range(3))(f))\n"
        "@product\ndef test_product(x, y): pass\n"
        "@pytest.mark.few(x=(1,))\n@product\ndef test_few(x, y): pass\n"
        "@pytest.mark.thin\n@product\ndef test_thin(x, y): pass\n"
    )
    found = {}
    for name in ("product", "few", "thin"):
        for run in ("not slow", "slow"):
            found[name, run] = pytester.inline_run("-m", run, "-k", f"test_{name}").countoutcomes()[0]
    assert found == {
        ("product", "not slow"): 4, ("product", "slow"): 8,  # each value, then the remaining pairs
        ("few", "not slow"): 3, ("few", "slow"): 9,
        ("thin", "not slow"): 4, ("thin", "slow"): 0,
    }  # fmt: skip
