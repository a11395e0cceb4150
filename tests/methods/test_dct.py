"""Laws of DCT-AdamW and its dictionaries, on the paper's loop and on the engine."""

from __future__ import annotations

import copy
import math
from itertools import combinations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.memory.peak import Peak
from lowrank_optim.ops import cosines, reference
from lowrank_optim.ops import dictionary as dictionaries
from lowrank_optim.ops.dictionary import KINDS, atoms, dictionary, scores
from lowrank_optim.parts import Affine, Dictionary
from tests.cases import SHAPES, Net, gradients, train
from tests.reference.dct import matrix, moved
from tests.reference.galore import rotate
from tests.support.laws import ADAM, COMMON, LINEAR, RANK, STEPS, M, N, close, moves, problem, steps_of, torch_path_end

pytestmark = pytest.mark.cpus

WIDTHS = [1, 2, 3, 8, 12, 15, 33, 64, 96, 257]
OF_LOOPS = ("dct2", "dct3", "identity")  # the engine has no dictionary of the identity: it takes rows


def atoms_of(kind, name, n):
    """Return the dictionary that the loop or the engine has, (n, n), with atoms in columns."""
    return matrix(name, n) if kind == "loop" else dictionary(name, n, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize(("kind", "name"), [*(("loop", x) for x in OF_LOOPS), *(("engine", x) for x in KINDS)])
def test_dictionaries_are_orthonormal(kind, name, n):
    d = atoms_of(kind, name, n)
    close(d.mT @ d, torch.eye(n, dtype=torch.float64))
    if name == "dct2":
        close(d[:, 0], torch.full((n,), n**-0.5, dtype=torch.float64))


def test_there_is_one_dictionary_per_width_dtype_and_device():
    one, other = (dictionary("dct2", 12, torch.float64, torch.device("cpu")) for _ in range(2))
    assert one is other


@pytest.mark.parametrize("kind", ["loop", "engine"])
def test_dct3_holds_the_dct2_atoms_in_rows_and_has_no_constant_atom(kind):
    d = atoms_of(kind, "dct3", M)
    close(d, atoms_of(kind, "dct2", M).T, atol=0)
    assert (d.std(0) > 0.1).all()


@pytest.mark.parametrize("name", sorted({*OF_LOOPS, *KINDS}))
def test_l2_picks_the_atoms_that_drop_least(run, name):
    if run.kind == "loop" and name not in OF_LOOPS:
        pytest.skip("the loop has no such dictionary")
    weight, grads = problem(steps=1)
    d = atoms_of("loop" if name in OF_LOOPS else "engine", name, M)
    bases = [d[:, list(atoms)] for atoms in combinations(range(M), RANK)]
    best = min(bases, key=lambda p: (grads[0] - p @ (p.T @ grads[0])).norm())
    (step,) = moves(run.dct, weight, grads, **COMMON, dictionary=name)
    r = best.T @ grads[0]
    close(step, ADAM["lr"] * COMMON["scale"] * best @ (r / (r.abs() + ADAM["eps"])))


def test_l1_and_l2_disagree_where_they_should(run):
    """Row 0 has one large entry, row 1 many of middling size."""
    weight = torch.zeros(2, 8, dtype=torch.float64)
    grad = torch.zeros_like(weight)
    grad[0, 0], grad[1] = 3.0, 1.0
    for norm, row in (("l2", 0), ("l1", 1)):
        (step,) = moves(run.dct, weight, [grad], **{**COMMON, "rank": 1}, dictionary="identity", norm=norm)
        assert step.abs().sum(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_with_every_row_is_adam(run, moments):
    weight, grads = problem()
    options = {**COMMON, "rank": M, "scale": 1.0}
    close(
        run.dct(weight, grads, set(range(STEPS)), **options, dictionary="identity", moments=moments),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


def test_error_feedback_loses_nothing(run):
    weight, grads = problem()
    options = {**COMMON, **LINEAR, "betas": (0.0, 0.99), "lr": 1.0, "error_feedback": True}
    error = sum(grads) - sum(moves(run.dct, weight, grads, {0, 2, 4, 6, 8}, **options))
    assert error.norm() > 1
    close(moves(run.dct, weight, [*grads, -error], {0, 2, 4, 6, 8}, **options)[-1], torch.zeros_like(weight), 1e-7)


def test_rotation_is_the_permutation_that_rotation_matrices_give():
    d, old, new = matrix("dct2", M), [0, 2, 3], [1, 2, 3]
    m, v = torch.randn(RANK, N, dtype=torch.float64), torch.rand(RANK, N, dtype=torch.float64) + 9
    expected = rotate(m, v, (d[:, old], None), (d[:, new], None), 0.5, 0.7)
    close((moved(m, old, new), moved(v, old, new)), expected)


def test_an_atom_that_enters_moves_like_adams_first_step(run):
    """Rows 0 and 1 first, then 1 and 2: row 2 moves by lr, and row 1 as if nothing had happened."""
    weight = torch.zeros(3, 8, dtype=torch.float64)
    size = torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64)
    sign = torch.randn(2, 3, 8, dtype=torch.float64).sign()
    grads = [size * sign[0], size.roll(-2, 0) * sign[1]]
    options = {**COMMON, "rank": 2, "dictionary": "identity", "scale": 1.0}
    first, second = moves(run.dct, weight, grads, {0, 1}, **options)
    assert first[2].abs().max() == second[0].abs().max() == 0
    close(second[2], ADAM["lr"] * sign[1][2], 1e-9)
    adam = torch_path_end(torch.optim.AdamW, weight, grads, **{**ADAM, "weight_decay": 0.0})
    close(-first[1] - second[1], adam[1])


# -- the engine --------------------------------------------------------------------------------------------------------


def test_a_wide_dictionary_in_float32_is_orthonormal_too():
    """Built from float32 angles it would be off by 2e-4."""
    d = dictionary("dct2", 4096, torch.float32, torch.device("cpu"))[:, 2000:2100]
    assert (d.mT @ d - torch.eye(100)).abs().max() < 2e-6


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", WIDTHS)
def test_scores_are_those_of_the_coefficients(kind, n, power, turned, monkeypatch):
    """Of one column they are the coefficients; the FFT takes three columns of seven at a time."""
    monkeypatch.setattr(cosines, "_IN_CACHE", 3 * n)
    for k in (1, 7):
        g = torch.randn(k, n, dtype=torch.float64).mT if turned else torch.randn(n, k, dtype=torch.float64)
        before, exact = g.clone(), dictionary(kind, n, torch.float64, g.device).mT @ g
        for fast in (True, False):
            got = scores(kind, g, power, fast)
            torch.testing.assert_close(got, exact.abs().pow(power).sum(-1), atol=1e-12 * n, rtol=1e-12)
            assert torch.equal(g, before), "it may be the memory of p.grad"


@pytest.mark.parametrize("kind", ["dct2", "dct3"])
@pytest.mark.parametrize("n", WIDTHS)
def test_atoms_are_computed_as_the_dictionary_is(kind, n):
    index = torch.stack([torch.randperm(n)[: max(1, n // 3)] for _ in range(2)])
    for dtype in (torch.float64, torch.float32):
        whole = dictionary(kind, n, dtype, index.device)
        for fast in (True, False):
            assert torch.equal(atoms(kind, n, index[0], dtype, fast), whole[:, index[0]])
            assert torch.equal(atoms(kind, n, index, dtype, fast), torch.stack([whole[:, one] for one in index]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "fft", "elements"), [(64, None, 64**2), (512, None, 0), (512, False, 512**2), (64, True, 0)]
)
def test_wide_cosines_need_no_dictionary(kind, n, fft, elements):
    shared = Dictionary(kind, fast=fft).shared((n, 4 * n))
    assert sum(shared.values()) == (elements if kind in ("dct2", "dct3") else n**2)


@pytest.mark.parametrize("fft", [True, False])
@pytest.mark.parametrize("shape", [(640, 2000), (2000, 640), (1200, 1200)])  # of several blocks
@pytest.mark.parametrize("plain", [True, False])
def test_a_selection_makes_at_most_one_tensor_of_the_gradients_size(shape, fft, plain, monkeypatch):
    """By FFT a few columns at a time; with a dictionary the product."""
    if plain:  # of which the memory is seen
        monkeypatch.setattr(dictionaries, "kernel", lambda name: getattr(reference, name))
    w = nn.Parameter(torch.randn(shape))
    optimizer = lowrank_optim.DCTAdamW([w], rank=8, fft=fft)
    steps_of(optimizer, w, [torch.randn(shape)])
    w.grad = torch.randn(shape)
    with Peak() as peak:
        optimizer.step()
    assert peak.most < (1.0 if fft else 1.1) * w.nbytes


def test_the_first_of_equal_vectors_are_chosen():
    """All coefficients of one entry in Hadamard's dictionary are equal."""
    p = nn.Parameter(torch.zeros(16, 40))
    optimizer = lowrank_optim.DCTAdamW([p], rank=5, dictionary="hadamard")
    g = torch.zeros(16, 40)
    g[3, 7] = 2.0
    steps_of(optimizer, p, [g])
    assert optimizer.state[p]["index"].tolist() == [0, 1, 2, 3, 4]


def test_dct2_is_the_textbook_one_and_dct3_its_transpose():
    n = 6
    d = dictionary("dct2", n, torch.float64, torch.device("cpu"))
    assert torch.allclose(d[:, 0], torch.full((n,), n**-0.5, dtype=torch.float64)), "the constant vector"
    k, j = 2, 3
    assert float(d[j, k]) == pytest.approx(math.sqrt(2 / n) * math.cos(math.pi * k * (2 * j + 1) / (2 * n)))
    assert torch.allclose(dictionary("dct3", n, torch.float64, torch.device("cpu")), d.mT)


@pytest.mark.parametrize("options", [{"dictionary": kind} for kind in (*KINDS, "identity")] + [{"fft": True}], ids=str)
def test_any_mix_of_widths(options):
    model = Net()
    losses = train(model, lowrank_optim.DCTAdamW(model.named_parameters(), lr=3e-3, rank=3, **options), 40)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_indices_above_256_survive_a_checkpoint_of_bf16_weights():
    """torch's own loader casts all state to the dtype of the parameter, where 257 becomes 256."""
    p = nn.Parameter(torch.randn(600, 610).bfloat16())
    optimizer = lowrank_optim.DCTAdamW([p], rank=200)
    steps_of(optimizer, p, [torch.randn(600, 610).bfloat16()])
    before = optimizer.state[p]["index"].clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after = optimizer.state[p]["index"]
    assert after.dtype == torch.int32
    assert torch.equal(before, after)
    assert before.max() > 512


def test_a_new_vector_does_not_start_with_a_leap():
    """With the global step for its bias correction a new coordinate would move by 3.16 lr."""
    p = nn.Parameter(torch.zeros(12, 30))
    optimizer = lowrank_optim.DCTAdamW([p], lr=1.0, rank=2, dictionary="identity", weight_decay=0.0)
    for step in range(60):
        p.grad = torch.zeros(12, 30)
        p.grad[0 if step < 50 else 5] = 1.0
        p.grad[1] = 0.5
        before = p.detach().clone()
        optimizer.step()
        moved = (p.detach() - before)[5].abs().max()
        assert moved <= 1.0001
    assert moved > 0.99


@pytest.mark.parametrize(("kept", "tolerance"), [("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.3)])
def test_error_feedback_keeps_what_is_left_out(kept, tolerance):
    p, g = nn.Parameter(torch.zeros(80, 90)), torch.randn(80, 90)
    optimizer = lowrank_optim.DCTAdamW([p], rank=8, error_feedback=kept)
    steps_of(optimizer, p, [g])
    state = optimizer.state[p]
    d = dictionary("dct2", 80, torch.float32, p.device)[:, state["index"].long()]
    left = g - d @ (d.mT @ g)
    names = [key for key in state if key.startswith("error")]
    store = {"int8": Affine(8), "int4": Affine(4)}.get(kept)
    error = store.read({key[5:]: state[key] for key in names}, (80, 90), torch.float32) if store else state["error"]
    assert (error.float() - left).abs().max() < tolerance
    assert torch.corrcoef(torch.stack([error.float().flatten(), left.flatten()]))[0, 1] > 0.98


def test_the_shared_dictionary_is_counted():
    shapes = [(64, 200), (64, 100), (96, 120)]
    planned = lowrank_optim.estimate_memory(shapes, lowrank_optim.DCTAdamW, rank=8)
    assert planned.shared == 4 * (64**2 + 96**2)
    assert lowrank_optim.estimate_memory(shapes, lowrank_optim.DCTAdamW, rank=8, fft=True).shared == 0
    assert planned.total > planned.shared + planned.optimizer


@pytest.mark.parametrize(("shape", "rank"), SHAPES[:3])
def test_a_stack_of_stacks_of_aged_coordinates(shape, rank):
    """Ages differ between the matrices of a batch: one by one they must come out alike."""
    together = nn.Parameter(0.1 * torch.randn(3, *shape, dtype=torch.float64))
    apart = [nn.Parameter(w.detach().clone()) for w in together]
    options = dict(lr=1e-2, rank=rank, dictionary="hadamard")
    one = lowrank_optim.DCTAdamW([{"params": [together], "as_matrix": "batch"}], **options)
    many = lowrank_optim.DCTAdamW(apart, **options)
    for g in gradients((3, *shape), 9, torch.float64):
        together.grad = g
        for p, own in zip(apart, g, strict=True):
            p.grad = own.clone()
        one.step()
        many.step()
    assert torch.allclose(together, torch.stack(apart), atol=1e-12)


def test_the_age_of_a_vector_begins_with_the_basis():
    p = nn.Parameter(torch.zeros(2, 16, 32))
    optimizer = lowrank_optim.DCTAdamW([p], lr=1.0, rank=4, weight_decay=0.0, dictionary="identity")
    for _ in range(100):
        p.grad = torch.stack([torch.randn(16, 32), torch.zeros(16, 32)])
        optimizer.step()
    p.grad = torch.randn(2, 16, 32)
    before = p.detach().clone()
    optimizer.step()
    assert float((p - before)[1].abs().max()) <= 1.0001
    assert optimizer.state[p]["age"][1].tolist() == [1] * 4
