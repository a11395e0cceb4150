"""The local part of a product that is merged into a weight has the bits of the whole product, wherever it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lowrank_optim.distributed.spans import Span, span


@pytest.mark.parametrize(("m", "n", "r"), [(37, 24, 4), (700, 33, 5), (256, 10, 1), (257, 10, 3), (3, 40, 2)])
def test_parts_of_a_product_have_the_bits_of_the_whole(m, n, r):
    torch.manual_seed(0)
    b, a = torch.randn(m, r), torch.randn(r, n)
    whole = span(torch.empty(m, n), n).of_product(b, a)
    torch.testing.assert_close(whole, b @ a)
    for cuts in ((0, m * n), (0, 5, 5, m * n // 2 + 3, m * n), (0, n, m * n - 1, m * n, m * n)):
        for start, stop in pairwise(cuts):
            part = Span(torch.empty(stop - start), start).of_product(b, a)
            assert torch.equal(part, whole.view(-1)[start:stop]), (start, stop)


def test_a_span_is_the_memory_of_its_weight():
    w = torch.zeros(3, 5)
    x, start = span(w, 5)
    x.add_(1)
    assert start == 0
    assert bool((w == 1).all())
