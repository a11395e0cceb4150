"""The randomized basis on real gradients of the main job's nano model, not on matrices made for the purpose."""

from __future__ import annotations

import pytest

for module in ("transformers", "tokenizers", "tqdm"):
    pytest.importorskip(module, reason="the nano model comes from the extra `examples`")


@pytest.mark.slow
def test_the_randomized_basis_captures_what_svd_does():
    from benchmarks.subspace import energies

    rows = energies(at=(4, 8))
    assert len(rows) == 4 * 7
    for row in rows:
        assert 0.99 <= row["cold"] <= 1 + 1e-5, row
        assert 0.99 <= row["warm"] <= 1 + 1e-5, row
    real = sum(row["warm_svd_of_all"] < 0.99 for row in rows)
    assert real >= 7, "where rank 1/4 leaves nothing out, the test shows nothing"
