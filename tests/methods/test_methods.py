"""What is special about single methods, beyond what all share: the oracles of their specifications, on the engine."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import ops
from lowrank_optim.memory.peak import Peak
from lowrank_optim.ops import cosines, reference
from lowrank_optim.ops import dictionary as dictionaries
from lowrank_optim.ops.dictionary import KINDS, atoms, dictionary, scores
from lowrank_optim.parts import Affine, Dictionary, PowerIteration, Random, Rows
from lowrank_optim.recipe.algebra import WHOLE
from lowrank_optim.recipe.plan import resolve_side
from tests.cases import SHAPES, Net, gradients, train
from tests.reference import q_galore


def steps(optimizer, p, grads):
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach().clone()


# -- dictionaries ------------------------------------------------------------------------------------------------------

WIDTHS = [1, 2, 3, 8, 12, 15, 33, 64, 96, 257]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", WIDTHS)
def test_dictionaries_are_orthonormal(kind, n):
    d = dictionary(kind, n, torch.float64, torch.device("cpu"))
    assert (d.mT @ d - torch.eye(n)).abs().max() < 1e-12
    assert dictionary(kind, n, torch.float64, torch.device("cpu")) is d, "one per width, dtype and device"


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
    steps(optimizer, w, [torch.randn(shape)])
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
    steps(optimizer, p, [g])
    assert optimizer.state[p]["index"].tolist() == [0, 1, 2, 3, 4]


def test_dct2_is_the_textbook_one_and_dct3_its_transpose():
    n = 6
    d = dictionary("dct2", n, torch.float64, torch.device("cpu"))
    assert torch.allclose(d[:, 0], torch.full((n,), n**-0.5, dtype=torch.float64)), "the constant vector"
    k, j = 2, 3
    assert float(d[j, k]) == pytest.approx(math.sqrt(2 / n) * math.cos(math.pi * k * (2 * j + 1) / (2 * n)))
    assert torch.allclose(dictionary("dct3", n, torch.float64, torch.device("cpu")), d.mT)


@pytest.mark.parametrize("kind", [*KINDS, "identity"])
def test_l2_selection_minimises_the_error(kind):
    n, rank = 6, 2
    basis = Rows("norm") if kind == "identity" else Dictionary(kind)
    d = torch.eye(n).double() if kind == "identity" else dictionary(kind, n, torch.float64, torch.device("cpu"))
    for _ in range(5):
        g = torch.randn(n, 9, dtype=torch.float64)
        errors = {
            chosen: float((g - d[:, chosen] @ (d[:, chosen].mT @ g)).norm())
            for chosen in itertools.combinations(range(n), rank)
        }
        index = basis.fit(WHOLE, g, None, rank, lambda shape, purpose="": torch.zeros(shape), 0.0)["index"]
        assert tuple(index.tolist()) == min(errors, key=errors.get)


@pytest.mark.parametrize("options", [{"dictionary": kind} for kind in (*KINDS, "identity")] + [{"fft": True}], ids=str)
def test_any_mix_of_widths(options):
    model = Net()
    losses = train(model, lowrank_optim.DCTAdamW(model.named_parameters(), lr=3e-3, rank=3, **options), 40)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_indices_above_256_survive_a_checkpoint_of_bf16_weights():
    """torch's own loader casts all state to the dtype of the parameter, where 257 becomes 256."""
    p = nn.Parameter(torch.randn(600, 610).bfloat16())
    optimizer = lowrank_optim.DCTAdamW([p], rank=200)
    steps(optimizer, p, [torch.randn(600, 610).bfloat16()])
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


@pytest.mark.parametrize(("kept", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.3)])
def test_error_feedback_keeps_what_is_left_out(kept, tolerance):
    p, g = nn.Parameter(torch.zeros(80, 90)), torch.randn(80, 90)
    optimizer = lowrank_optim.DCTAdamW([p], rank=8, error_feedback=kept)
    steps(optimizer, p, [g])
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


# -- residuals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lowrank_optim.FiraAdamW, lowrank_optim.APOLLO], ids=lambda make: make.__name__)
def test_the_limiter_recovers_from_a_zero_gradient(make):
    """As published it is held at 1 % of growth per step from zero, for two thousand steps."""
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = make([p], lr=1.0, rank=4, weight_decay=0.0)
    grads = gradients((16, 24), 20)
    for g in (*grads[:8], torch.zeros(16, 24), *grads[8:12]):
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
        moved = (p - before).norm()
    assert moved > 1.0
    sizes = []
    for g in grads[12:]:
        p.grad = g
        optimizer.step()
        sizes.append(float(optimizer.state[p]["residual_size"]))
    assert all(b <= 1.0101 * a for a, b in itertools.pairwise(sizes))


def test_apollo_moves_each_channel_along_its_gradient():
    p, g = nn.Parameter(torch.zeros(12, 30)), torch.randn(12, 30)
    moves = {}
    for scale in (1.0, 4.0):
        p.data.zero_()
        optimizer = lowrank_optim.APOLLO([p], lr=1.0, rank=3, weight_decay=0.0, scale=scale, limit=None)
        moves[scale] = steps(optimizer, p, [g])
    ratio = moves[1.0] / g
    assert ((ratio - ratio[0]).abs() < 1e-4 * ratio.abs()).all(), "one factor per column of a wide matrix"
    assert torch.allclose(moves[4.0], 2 * moves[1.0]), "scale enters as its square root"
    p.data.zero_()
    mini = steps(lowrank_optim.APOLLOMini([p], lr=1.0, weight_decay=0.0), p, [g]) / g
    assert torch.allclose(mini, mini[0, 0].expand_as(mini), rtol=1e-4), "one factor for all"


def test_apollo_mini_has_rank_one_by_default():
    optimizer = lowrank_optim.APOLLOMini(Net().named_parameters())
    assert {row.rank for row in optimizer.report() if row.rank is not None} == {1}
    assert optimizer.param_groups[0]["scale"] == 128


def test_fira_forms_agree_where_scale_is_one():
    grads, ends = gradients((14, 20), 6), []
    for form in ("paper", "code"):
        p = nn.Parameter(torch.zeros(14, 20))
        ends.append(steps(lowrank_optim.FiraAdamW([p], rank=3, form=form, basis="svd"), p, grads))
    assert torch.allclose(*ends, atol=1e-7)


def test_frugal_steps_by_signs_outside_of_its_rows():
    p, g = nn.Parameter(torch.zeros(12, 30)), torch.randn(12, 30)
    optimizer = lowrank_optim.FRUGAL([p], lr=0.5, rank=3, sign_scale=0.2, weight_decay=0.0)
    moved = steps(optimizer, p, [g])
    rows = torch.zeros(12, dtype=torch.bool)
    rows[optimizer.state[p]["index"].long()] = True
    assert torch.equal(moved[~rows], -0.5 * 0.2 * g[~rows].sign())
    assert torch.allclose(moved[rows], -0.5 * g[rows].sign(), atol=1e-4), "Adam's first step"


def test_error_feedback_of_ldadam_loses_nothing():
    """Without momentum, what was projected and what is still owed add up to all gradients."""
    p = nn.Parameter(torch.zeros(10, 16, dtype=torch.float64))
    optimizer = lowrank_optim.LDAdamW([p], lr=1.0, betas=(0.0, 0.9), rank=3, weight_decay=0.0)
    projected, grads = torch.zeros_like(p), gradients((10, 16), 9, torch.float64)
    for g in grads:
        owed = optimizer.state[p]["error"].clone()
        steps(optimizer, p, [g])
        basis = optimizer.state[p]["basis"]
        projected += basis @ (basis.mT @ (g + owed))
    assert torch.allclose(projected + optimizer.state[p]["error"], sum(grads), atol=1e-10)


# -- random subspaces --------------------------------------------------------------------------------------------------


def test_gaussian_subspaces_are_unbiased():
    total, m, rank = torch.zeros(8, 8), 8, 4
    for seed in range(4000):
        p = Random().derive(
            WHOLE, torch.zeros(m, 5), {}, rank, lambda shape, purpose="", seed=seed: ops.normal(shape, seed, (0, 0))
        )
        total += p["basis"] @ p["basis"].mT
    assert (total / 4000 - torch.eye(8)).abs().max() < 0.06


def test_floras_momentum_must_fade():
    shape = (256, 512)
    with pytest.raises(ValueError, match=r"momentum would grow without bound.*update_proj_gap >= \d+") as caught:
        lowrank_optim.Flora([nn.Parameter(torch.zeros(shape))], rank=4, update_proj_gap=5)
    least = int(str(caught.value).split("update_proj_gap >= ")[1].split()[0])
    sizes = []
    for options in ({"update_proj_gap": least}, {"update_proj_gap": 1, "orthonormal": True}):
        p = nn.Parameter(0.1 * torch.randn(64, 80))
        optimizer = lowrank_optim.Flora([p], rank=2, **options)
        for _ in range(150):
            p.grad = torch.randn(64, 80)
            optimizer.step()
        sizes.append(float(optimizer.state[p]["exp_avg"].norm()))
    assert all(math.isfinite(size) and size < 1e3 for size in sizes)
    with pytest.raises(ValueError, match="without bound"):
        lowrank_optim.Flora([nn.Parameter(torch.zeros(shape))], rank=4, update_proj_gap=least - 1)


def test_golore_turns_to_random_subspaces():
    p = nn.Parameter(torch.zeros(20, 30))
    optimizer = lowrank_optim.GoLoreAdamW([p], rank=3, update_proj_gap=2, random_after=4, stagger=False)
    g = torch.randn(20, 3) @ torch.randn(3, 30)  # of rank 3: its own subspace holds all of it
    held = []
    for _ in range(8):
        steps(optimizer, p, [g])
        basis = optimizer.state[p]["basis"]
        held.append(float((basis.mT @ g).norm() / g.norm()))
    assert min(held[:4]) > 0.999
    assert max(held[4:]) < 0.9
    with pytest.raises(TypeError, match="random_after"):
        lowrank_optim.GoLoreAdamW([p])


# -- Q-GaLore ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 70), (64, 90)])
def test_int4_bases_equal_the_loop_with_the_same_quantizer(shape):
    weight, grads = 0.2 * torch.randn(shape, dtype=torch.float64), gradients(shape, 20, torch.float64)
    p = nn.Parameter(weight.clone())
    options = dict(lr=3e-3, betas=(0.83, 0.97), eps=3e-7, weight_decay=0.1, scale=0.7)
    optimizer = lowrank_optim.QGaLoreAdamW(
        [p], rank=9, update_proj_gap=4, basis="svd", state_dtype="float32", threshold=0.3, queue=2, **options
    )
    assert optimizer.state[p]["basis"].dtype == torch.uint8
    assert optimizer.state[p]["basis"].numel() == min(shape) * 9 // 2
    got = steps(optimizer, p, grads)
    want = q_galore.q_galore_adamw(
        weight, grads, set(), rank=9, side=resolve_side("std", *shape), gap=4, threshold=0.3, queue=2,
        quantize=lambda basis: Affine(4).rounded(basis, torch.float64), **options,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_refreshes_become_rare_where_the_subspace_stands_still():
    p, q = nn.Parameter(torch.zeros(20, 30)), nn.Parameter(torch.zeros(20, 30))
    optimizer = lowrank_optim.QGaLoreAdamW([p, q], rank=3, update_proj_gap=2, stagger=False)
    g = torch.randn(20, 3) @ torch.randn(3, 30)
    for _ in range(60):
        p.grad, q.grad = g.clone(), torch.randn(20, 30)
        optimizer.step()
    still, turning = optimizer.state[p], optimizer.state[q]
    assert int(still["refresh_gap"]) > 8
    assert int(still["refreshes"]) < 13
    assert int(turning["refresh_gap"]) == 2, "noise has no subspace: overlap 3 / 20"
    assert int(turning["refreshes"]) == 30


@pytest.mark.parametrize("make", [lowrank_optim.QGaLoreAdamW, lowrank_optim.FiraAdamW, lowrank_optim.SubsetNormAdamW])
def test_int8_weights_train(make):
    torch.manual_seed(1)
    teacher, x = torch.randn(64, 64) / 8, torch.randn(256, 64)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    plain = copy.deepcopy(model)
    lowrank_optim.quantize_weights(model)
    losses = {}
    for name, net in (("int8", model), ("float32", plain)):
        optimizer = make(net.named_parameters(), lr=3e-3)
        for _ in range(80):
            optimizer.zero_grad()
            loss = (net(x) - torch.tanh(x @ teacher)).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert isinstance(model[0].weight, lowrank_optim.Int8Weight)
    assert losses["int8"] < 1.3 * losses["float32"]


def test_int8_weights_resume_bit_for_bit():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    lowrank_optim.quantize_weights(model)
    x = torch.randn(32, 64)

    def run(net, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    optimizer = lowrank_optim.QGaLoreAdamW(model.named_parameters(), rank=8, update_proj_gap=3, lr=1e-2)
    run(model, optimizer, 5)
    model2 = copy.deepcopy(model)
    optimizer2 = lowrank_optim.QGaLoreAdamW(model2.named_parameters(), rank=8, update_proj_gap=3, lr=1e-2)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, 5)
    run(model2, optimizer2, 5)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p.detach() + 0, q.detach() + 0)


def test_the_estimate_knows_int8_weights():
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    lowrank_optim.quantize_weights(model)
    planned = lowrank_optim.estimate_memory({"w": (64, 96)}, lowrank_optim.QGaLoreAdamW, rank=8)
    packed = lowrank_optim.estimate_memory(
        [{"params": list(model.named_parameters())}], lowrank_optim.QGaLoreAdamW, rank=8
    )
    assert planned.weights == 4 * 64 * 96
    assert packed.weights == 64 * 96 + 8 * 64 * 96 // 256
    assert packed.gradients == planned.gradients


# -- names, stores -----------------------------------------------------------------------------------------------------


def test_the_original_packages_names():
    p = nn.Parameter(torch.randn(80, 90))
    optimizer = lowrank_optim.GaLoreAdamW8bit([p], lr=1e-3, rank=8)
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[p]["basis"].dtype == torch.bfloat16
    assert optimizer.param_groups[0]["state_dtype"] == "int8"
    assert lowrank_optim.GaLoreAdamW8bit([p], rank=8, state_dtype="int4").param_groups[0]["state_dtype"] == "int4"


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_vectors_and_small_matrices_keep_full_precision(state_dtype):
    large, small, vector = (
        nn.Parameter(torch.randn(64, 80)),
        nn.Parameter(torch.randn(20, 30)),
        nn.Parameter(torch.randn(9000)),
    )
    optimizer = lowrank_optim.GaLoreAdamW([large, small, vector], rank=4, state_dtype=state_dtype)
    assert optimizer.state[large]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert optimizer.state[small]["basis"].dtype == torch.float32
    assert optimizer.state[vector]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("int8", 0.05), ("int4", 0.35)])
def test_quantized_moments_follow_exact_ones(state_dtype, tolerance):
    ends, signal = [], torch.randn(64, 96)
    for kept in ("float32", state_dtype):
        p = nn.Parameter(torch.zeros(64, 96))
        optimizer = lowrank_optim.GaLoreAdamW([p], lr=1e-2, rank=16, basis="svd", state_dtype=kept, weight_decay=0.0)
        torch.manual_seed(3)
        ends.append(steps(optimizer, p, [signal + 0.5 * torch.randn(64, 96) for _ in range(40)]))
    assert (ends[0] - ends[1]).norm() < tolerance * ends[0].norm()


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_quantized_second_moments_never_vanish(state_dtype):
    """Nine decades within a block: rounded to zero, a second moment would leave its first to be divided by eps."""
    p = nn.Parameter(torch.zeros(64, 96))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=1.0, rank=16, state_dtype=state_dtype, weight_decay=0.0)
    for g in gradients((64, 96), 20):
        before = p.detach().clone()
        steps(optimizer, p, [g])
        assert (p - before).norm() < 2 * (16 * 96) ** 0.5, "entries of Adam's direction have about size 1"


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


# -- found by review ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_quantized_moments_have_no_preferred_sign(state_dtype):
    """The maps have 1 and no -1: a block with a negative peak would lose a part of it at every write."""
    p, q = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.randn(8, 8))
    groups = [{"params": [p], "rank": None}, {"params": [q], "rank": 2}]
    options = dict(lr=1.0, betas=(0.99, 0.999), weight_decay=0.0, state_dtype=state_dtype)
    optimizer = lowrank_optim.GaLoreAdamW(groups, **options)
    rows = torch.where(torch.arange(64) < 32, -1.0, 1.0).unsqueeze(1)  # whole blocks of either sign
    for _ in range(300):
        before = p.detach().clone()
        p.grad = 0.01 * rows.expand(64, 128).contiguous()
        optimizer.step()
    moved = (p.detach() - before) * rows
    assert moved.abs().min() > 0.9
    assert (moved[:32].mean() - moved[32:].mean()).abs() < 1e-3


def test_maximize_is_minimizing_the_negative_also_in_int4():
    ends, grads = [], [torch.randn(64, 96) for _ in range(30)]
    for up in (False, True):
        p = nn.Parameter(torch.zeros(64, 96))
        options = dict(lr=1e-2, rank=8, state_dtype="int4", maximize=up, weight_decay=0.0)
        ends.append(steps(lowrank_optim.GaLoreAdamW([p], **options), p, [-g if up else g for g in grads]))
    assert (ends[0] - ends[1]).norm() < 0.01 * ends[0].norm()


def test_int4_second_moments_follow_growth():
    """A step adds a thousandth; rounded to the nearest sixteenth, it would be lost."""
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=1e-3, rank=32, state_dtype="int4", update_proj_gap=10_000)
    store = optimizer.recipe(optimizer.param_groups[0]).spec((64, 128), 32)["exp_avg_sq"].store
    kept = {suffix: torch.zeros(shape, dtype=dtype) for suffix, (shape, dtype, _) in
            zip(store.suffixes, store.layout((32, 128), torch.float32), strict=True)}  # fmt: skip
    v = torch.full((32, 128), 0.01)
    v[:, ::2] = 1.0
    for step in range(3000):
        store.write_(kept, v, (7, (1, step), 0))
        v = 0.999 * store.read(kept, (32, 128), torch.float32) + 0.001
    assert float(v[:, 1::2].mean()) == pytest.approx(1.0, rel=0.1)


def test_kahan_owes_nothing_after_a_cast():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=8, bf16_update="kahan", weight_decay=0.0)
    steps(optimizer, model.weight, [torch.randn(64, 64).bfloat16() for _ in range(5)])
    model.float()
    owed = optimizer.state[model.weight]["compensation"].float()
    before = model.weight.detach() + owed
    optimizer.param_groups[0]["lr"] = 0.0
    after = steps(optimizer, model.weight, [torch.randn(64, 64) for _ in range(5)])
    assert owed.any()
    assert torch.equal(after, before)
    assert "compensation" not in optimizer.state[model.weight]


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_blocks_of_a_plain_stack_are_not_cut(state_dtype, monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.limits.SLICE", 1024)
    ends = []
    for turned in (False, True):  # a gradient with strides of its own is never cut
        torch.manual_seed(2)
        p, q = nn.Parameter(torch.zeros(5, 41, 33)), nn.Parameter(torch.randn(8, 8))
        groups = [{"params": [p], "rank": None, "as_matrix": "batch"}, {"params": [q], "rank": 2}]
        optimizer = lowrank_optim.GaLoreAdamW(groups, lr=1e-2, state_dtype=state_dtype)
        for _ in range(6):
            g = torch.randn(5, 41, 33) * torch.logspace(-3, 3, 5).view(-1, 1, 1)
            p.grad = g.mT.contiguous().mT if turned else g
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, atol=1e-5)


EDITS = [
    (lowrank_optim.GaLoreAdamW, {"state_dtype": "int8"}),
    (lowrank_optim.GaLoreAdamW, {"seed": 5}),
    (lowrank_optim.APOLLO, {"limit": None}),
    (lowrank_optim.APOLLO, {"store_projection": True}),
    (lowrank_optim.FRUGAL, {"basis": "topk"}),
    (lowrank_optim.DCTAdamW, {"moments": "keep"}),
    (lowrank_optim.DCTAdamW, {"dictionary": "dct3"}),
    (lowrank_optim.LDAdamW, {"error_feedback": "int8"}),
    (lowrank_optim.GaLoreAdafactor, {"beta1": 0.9}),
    (lowrank_optim.QGaLoreAdamW, {"update_proj_gap": 2}),
    (lowrank_optim.GaLorePlusAdamW, {"density": 0.5}),
    (lowrank_optim.Composed, {"residual": "fira"}),
    (lowrank_optim.GaLoreAdamW, {"wieght_decay": 0.5}),
    (lowrank_optim.GaLoreAdamW, {"weight_decay": -0.5}),
    (lowrank_optim.Flora, {"update_proj_gap": 2}),
]


@pytest.mark.parametrize(("make", "edit"), EDITS, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
def test_edits_of_a_group_are_refused_before_anything_moves(make, edit):
    p, q = nn.Parameter(torch.randn(70, 80)), nn.Parameter(torch.randn(70, 80))
    optimizer = make([{"params": [p]}, {"params": [q]}], rank=4)
    p.grad, q.grad = torch.randn(70, 80), torch.randn(70, 80)
    optimizer.step()
    before = p.detach().clone(), q.detach().clone()
    optimizer.param_groups[1].update(edit)
    with pytest.raises(ValueError, match=next(iter(edit)).replace("update_proj_gap", "gap|update_proj_gap")):
        optimizer.step()
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_edits_that_take_effect_are_fine():
    p = nn.Parameter(torch.zeros(20, 30))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=1.0, rank=4, weight_decay=0.0)
    optimizer.param_groups[0].update(scale=0.5, betas=(0.5, 0.9), eps=1e-6, update_proj_gap=3)
    moved = steps(optimizer, p, [torch.randn(20, 30)])
    assert float((moved / 0.5).norm()) == pytest.approx((4 * 30) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("make", [lowrank_optim.APOLLO, lowrank_optim.Flora])
def test_subspaces_that_follow_from_names_are_not_resumed_under_others(make):
    nets = [nn.Sequential(nn.Linear(20, 30, bias=False)) for _ in range(2)]
    saved = make(nets[0].parameters(), rank=4)
    steps(saved, nets[0][0].weight, [torch.randn(30, 20)])
    other = make(nets[1].named_parameters(), rank=4)
    with pytest.raises(ValueError, match="draws its subspaces by the names of the parameters"):
        other.load_state_dict(saved.state_dict())
    wrapped = make([(f"module.{name}", p) for name, p in nets[1].named_parameters()], rank=4)
    other = make(nets[0].named_parameters(), rank=4)
    wrapped.load_state_dict(other.state_dict())
    keeps = make(nets[1].named_parameters(), rank=4, store_projection=True)
    keeps.load_state_dict(make(nets[0].parameters(), rank=4, store_projection=True).state_dict())


@pytest.mark.parametrize(("moments", "seen"), [("rotate", [0, 1, 2, 3]), ("reset", [0, 1, 1, 1])])
def test_a_basis_knows_the_clock_of_the_moments(moments, seen, monkeypatch):
    """Read with the global step, a mean that was emptied a step ago would seem ten times shorter."""
    fit, times = PowerIteration.fit, []
    monkeypatch.setattr(PowerIteration, "fit", lambda *args: (times.append(args[-1]), fit(*args))[1])
    p = nn.Parameter(torch.zeros(20, 30))
    steps(lowrank_optim.LDAdamW([p], rank=4, moments=moments), p, gradients((20, 30), 4))
    assert [(at.step, at.seen) for at in times] == list(enumerate(seen))


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


@pytest.mark.parametrize("basis", ["svd", "rsvd"])
def test_rounding_noise_has_no_sign(basis):
    p = nn.Parameter(torch.zeros(40, 60))
    optimizer = lowrank_optim.FRUGAL([p], lr=1.0, rank=8, basis=basis, weight_decay=0.0, sign_scale=100.0)
    moved = steps(optimizer, p, [torch.randn(40, 4) @ torch.randn(4, 60)])
    assert (moved.abs() > 50).float().mean() < 0.05


def test_emptied_momentum_of_flora_has_its_own_clock():
    p = nn.Parameter(torch.randn(40, 60))
    options = dict(rank=38, orthonormal=True, moments="reset", update_proj_gap=20, stagger=False, scale_parameter=False)
    optimizer = lowrank_optim.Flora([p], lr=1e-2, **options)
    sizes, g = [], torch.randn(40, 60)
    for _ in range(45):
        before = p.detach().clone()
        steps(optimizer, p, [g])
        sizes.append(float((p - before).norm()))
    assert min(sizes) > 0.7 * max(sizes)


@pytest.mark.parametrize("make", [lowrank_optim.SubsetNormAdamW, lowrank_optim.GaLoreAdamW, lowrank_optim.DCTAdamW])
def test_empty_matrices_are_left_alone(make):
    empty, p = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.randn(12, 12))
    optimizer = make([empty, p])
    assert optimizer.report()[0].reason == "empty"
    empty.grad, p.grad = torch.zeros(0, 5), torch.randn(12, 12)
    optimizer.step()


def test_no_entries_in_a_stack():
    p = nn.Parameter(torch.randn(2, 64, 64))
    optimizer = lowrank_optim.GaLorePlusAdamW([p], rank=4, density=0.0, state_dtype="int8")
    steps(optimizer, p, [torch.randn(2, 64, 64)])
    assert not any(key.startswith("entries") for key in optimizer.state[p])


def test_what_was_never_meant_is_refused():
    p = nn.Parameter(torch.randn(12, 12))
    with pytest.raises(ValueError, match="moments must be one of 'keep', 'reset', got 'rotate'"):
        lowrank_optim.APOLLO([p], moments="rotate")
    with pytest.raises(ValueError, match="overflow"):
        lowrank_optim.compose([p], rank=2, basis="gaussian", moments="rotate")
    with pytest.raises(ValueError, match="an age each"):
        lowrank_optim.compose([p], rank=2, basis="dct2", moments="rotate", scaling="factored")
    with pytest.raises(ValueError, match="fft=True needs"):
        lowrank_optim.DCTAdamW([p], rank=2, fft=True, dictionary="hadamard")
    with pytest.raises(ValueError, match="SubsetNormAdamW found nothing to serve"):
        lowrank_optim.SubsetNormAdamW([nn.Parameter(torch.randn(5))])
    with pytest.raises(ValueError, match="proj_type must be one of 'std'"):
        lowrank_optim.SubsetNormAdamW([{"params": [p], "proj_type": "full"}])
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(lowrank_optim.CompressedAccumulation([p]))
