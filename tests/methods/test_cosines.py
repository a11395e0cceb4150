"""Cosine transforms are products with the dictionaries, rows move in place, and a step needs no vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.ops import cosines, reference
from lowrank_optim.ops.dictionary import add_combination_, coefficients, dictionary, scores, transforms
from lowrank_optim.recipe.turn import Reindex
from tests.reference.dct import matrix

ops = torch.ops.lowrank_optim
LENGTHS = [2, 4, 6, 8, 10, 14, 16, 24, 30, 42, 64, 98, 240, 512, 768, 1280]  # all factors, alone and together
COLUMNS = [0, 1, 2, 15, 16, 17, 33, 300]  # around a vector of columns, and more than are summed at once
RELATIVE = {torch.float32: 1e-6, torch.float64: 2e-15}


def exact(kind, n):
    return dictionary(kind, n, torch.float64, torch.device("cpu"))


def laid(x, across):
    """The same matrix, with its own strides or transposed."""
    return x.mT.contiguous().mT if across else x.contiguous()


def assert_near(got, want, dtype):
    """Errors of a transform are relative to all of a column, of which numbers are about 1 here."""
    assert got.shape == want.shape
    if want.numel():
        assert float((got.double() - want).abs().max()) <= RELATIVE[dtype] * (1 + float(want.abs().max())) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("kind", ["dct2", "dct3"])
@pytest.mark.parametrize("n", LENGTHS)
def test_transforms_are_products_with_the_dictionary(n, kind, across, dtype):
    d, index = exact(kind, n), (torch.rand(n) < 0.4).nonzero().flatten().int()
    for k in COLUMNS:
        g, w = (laid(torch.randn(n, k, dtype=dtype), across) for _ in range(2))
        before, all_of_it = g.clone(), d.mT @ g.double()
        assert_near(coefficients(kind, g, index), all_of_it[index.long()], dtype)
        for power in (1, 2):
            got = scores(kind, g, power, fast=True)
            assert got.dtype == torch.float64
            want = all_of_it.abs().pow(power).sum(1)
            assert bool(((got - want).abs() <= 8 * RELATIVE[dtype] * (1 + want)).all())
        moved = torch.randn(len(index), k, dtype=dtype)
        want = 0.7 * w.double() - 0.3 * d[:, index.long()] @ moved.double()
        strides = w.stride()
        add_combination_(kind, w, moved, index, alpha=-0.3, beta=0.7)
        assert_near(w, want, dtype)
        assert w.stride() == strides
        assert torch.equal(g, before), "it may be the memory of p.grad"


@pytest.mark.parametrize("kind", ["dct2", "dct3"])
def test_the_dictionary_is_that_of_the_reference_loop(kind):
    d = matrix(kind, 30)
    eye = torch.eye(30, dtype=torch.float64)
    assert_near(coefficients(kind, eye, torch.arange(30, dtype=torch.int32)), d.T, torch.float64)


def test_other_lengths_are_multiplied():
    """And are refused by the operators, with the same words by all kernels."""
    for n in range(1, 40):
        check_length(n)


def check_length(n):
    fits = n % 2 == 0 and all(n % prime for prime in (11, 13, 17, 19))
    assert cosines.transforms(n) == fits
    g = torch.randn(n, 5)
    assert transforms("dct2", g, fast=True) == fits
    assert not transforms("hadamard", g, fast=True)
    assert not transforms("dct2", g, fast=False)
    assert_near(scores("dct2", g, 1, fast=True), (exact("dct2", n).mT @ g.double()).abs().sum(1), torch.float32)
    if not fits:
        with pytest.raises(RuntimeError, match="x must have an even length without prime factors above 7, got"):
            ops.cosine_scores_.default(torch.zeros(n, dtype=torch.float64), g, False, 2, False)


def test_memory_that_is_not_read_may_hold_anything():
    """With beta 0 w is overwritten, also where it is not a number."""
    index, d = torch.tensor([1, 4], dtype=torch.int32), torch.randn(2, 19)
    for across in (False, True):
        w = laid(torch.full((6, 19), torch.nan), across)
        add_combination_("dct2", w, d, index, 1.0, 0.0)
        assert_near(w, exact("dct2", 6)[:, [1, 4]] @ d.double(), torch.float32)


@pytest.mark.parametrize("places", [[-1], [3, 6]])
def test_vectors_that_there_are_not(places):
    index, x, d = torch.tensor(places, dtype=torch.int32), torch.randn(6, 3), torch.full((len(places), 3), 7.0)
    for rows, add in ((ops.cosine_rows_.default, ops.add_cosines_.default),
                      (reference.cosine_rows_, reference.add_cosines_)):  # fmt: skip
        before = x.clone()
        with pytest.raises(RuntimeError, match="index must be from 0 to below 6, got"):
            rows(d, x, index, False, False)
        with pytest.raises(RuntimeError, match="index must be from 0 to below 6, got"):
            add(x, d, index, 1.0, 1.0, False, False)
        assert torch.equal(x, before), "nothing is written"
        assert bool((d == 7).all())


def test_threads_change_no_bit():
    g, index = torch.randn(96, 4001), torch.arange(0, 96, 3, dtype=torch.int32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            w, r = g.mT.contiguous().mT.clone(), coefficients("dct2", g, index)
            add_combination_("dct2", w, r, index, 0.5, 0.9)
            found.append([scores("dct2", g, 2, True), r, w])
        finally:
            torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize("across", [False, True])
def test_gradients_in_16_bits_are_widened_block_by_block(across, monkeypatch):
    monkeypatch.setattr("lowrank_optim.ops.blocks.BLOCK", 64 * 48)
    g, index = laid(torch.randn(48, 150).bfloat16(), across), torch.arange(5, dtype=torch.int32)
    got = coefficients("dct3", g, index)
    assert got.dtype == torch.float32
    assert_near(got, exact("dct3", 48)[:, :5].mT @ g.double(), torch.float32)


def test_stacks_and_matrices_with_other_strides():
    """Each matrix of a stack has vectors of its own; what is contiguous neither way is copied."""
    index = torch.tensor([[0, 2, 7], [1, 2, 3]], dtype=torch.int32)
    g, w = torch.randn(2, 12, 40)[:, :, ::2], torch.randn(2, 12, 40)[:, :, ::2]
    d, want = exact("dct2", 12), w.double()
    r = coefficients("dct2", g, index)
    for i in range(2):
        chosen = d[:, index[i].long()]
        assert_near(r[i], chosen.mT @ g[i].double(), torch.float32)
        want[i] = 0.5 * want[i] + 2.0 * chosen @ r[i].double()
    add_combination_("dct2", w, r, index, 2.0, 0.5)
    assert_near(w, want, torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_rows_move_in_place_as_they_move_to_a_copy(rows):
    """Upwards, downwards and both at once."""
    for _ in range(50):
        old, new = ((torch.rand(2 * rows).topk(rows).indices.sort().values) for _ in range(2))
        found = [old.tolist().index(atom) if atom in old.tolist() else -1 for atom in new.tolist()]
        x, turn = torch.randn(rows, 3), Reindex(torch.tensor(found))
        want = turn(x)
        for y in (x.clone(), x.mT.contiguous().mT):  # the second in two steps, as it is not contiguous
            turn.move_(y)
            assert torch.equal(y, want)


@pytest.mark.parametrize("source", [[1, 0], [0, 0], [-2, 1], [0, 2]])
def test_rows_that_do_not_ascend(source):
    x = torch.randn(2, 3)
    for run in (ops.move_rows_.default, reference.move_rows_):
        before = x.clone()
        with pytest.raises(RuntimeError, match="source must ascend from at least 0 to below 2, none of them twice"):
            run(x, torch.tensor(source))
        assert torch.equal(x, before), "nothing is written"


@pytest.mark.parametrize("shape", [(576, 640), (640, 576), (512, 512)])
@pytest.mark.parametrize("dictionary_", ["dct2", "dct3"])
def test_wide_matrices_are_trained_without_a_dictionary(shape, dictionary_):
    """Three refreshes and a step between two, against the dense dictionary, to rounding."""
    grads, found = [torch.randn(shape, dtype=torch.float64) for _ in range(5)], []
    for fft in (None, False):
        p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = lowrank_optim.DCTAdamW(
            [p], lr=0.01, rank=37, dictionary=dictionary_, fft=fft, update_proj_gap=2, betas=(0.7, 0.97)
        )
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        found.append((p.detach(), optimizer.state[p]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-12, rtol=0)
    assert torch.equal(found[0][1]["index"], found[1][1]["index"])
