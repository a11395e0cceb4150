"""Flat tensors with ranges of parameters: cut anywhere they train like whole ones, with few rows on the way.

What DeepSpeed does to an optimizer is played here, so that cuts can fall where a test wants them; `test_zero.py` has
the real one.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowrank_optim
from lowrank_optim.distributed.deepspeed import ranges
from lowrank_optim.distributed.fragments import TouchedRows
from lowrank_optim.distributed.lockstep import Peers
from lowrank_optim.distributed.pieces import Piece
from lowrank_optim.wrappers.adoption import GROUP
from tests.cases import CASES, every_case, gradients
from tests.distributed.test_fsdp2 import message, spawn
from tests.support.collectives import Counted
from tests.support.sharded import ROWS
from tests.support.wrapped import equal

STEPS = 15  # refreshes before steps 0, 7 and 14, for most methods
# Two groups; tall, wide, square, one row, a long row, a convolution, a stack; in full space
WEIGHTS = [
    [("tall", (24, 10), 4), ("wide", (9, 22), 3), ("square", (12, 12), 5), ("few", (3, 40), 2), ("conv", (8, 3, 3), 2),
     ("stack", (4, 6, 16), 2)],
    [("table", (11, 8), None), ("bias", (13,), None), ("one", (1,), None), ("experts", (3, 4, 16), None)],
]  # fmt: skip
NEVER = {"galore_plus": "take density=0"}
ADAMW = next(case for case in CASES if case.name == "galore_adamw")


# -- what DeepSpeed does -----------------------------------------------------------------------------------------------


class Zero:
    """Stage 1 or 2: of each group one tensor, with a part of everything in the group."""

    def __init__(self, optimizer, cuts):
        """`cuts(size)`: where the parts of all ranks begin and end."""
        self.optimizer, self.rank = optimizer, dist.get_rank()
        self.groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self.parts = []
        for group, params in zip(optimizer.param_groups, self.groups, strict=True):
            whole = flattened(params)
            cut = cuts(len(whole))
            begin, end = cut[self.rank : self.rank + 2]
            at = 0
            for p in params:
                first, last = max(begin, at), min(end, at + p.numel())
                inside = SimpleNamespace(start=first - at, numel=last - first)
                address = dict(lp_fragment_address=inside, hp_fragment_address=SimpleNamespace(start=first - begin))
                p._hp_mapping, p._dp_group = SimpleNamespace(**address) if last > first else None, dist.group.WORLD
                at += p.numel()
            group["params"] = [whole[begin:end].clone()]
            self.parts.append((begin, end, cut))

    def step(self, grads):
        groups = self.optimizer.param_groups
        for group, own, (begin, end, _) in zip(groups, grads, self.parts, strict=True):
            group["params"][0].grad = flattened(own)[begin:end].clone()
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            self.optimizer.param_groups = groups

    def weights(self):
        """Of all ranks."""
        found = []
        for group, params, (_, _, cut) in zip(self.optimizer.param_groups, self.groups, self.parts, strict=True):
            pieces = [torch.empty(b - a, dtype=params[0].dtype) for a, b in itertools.pairwise(cut)]
            longest = max(map(len, pieces))
            padded = [torch.empty(longest, dtype=params[0].dtype) for _ in pieces]
            own = torch.zeros_like(padded[0])
            own[: len(group["params"][0])] = group["params"][0].detach()
            dist.all_gather(padded, own)
            whole = torch.cat([one[: len(piece)] for one, piece in zip(padded, pieces, strict=True)])
            shapes = [p.shape for p in params]
            found += [x.view(shape) for x, shape in zip(whole.split([s.numel() for s in shapes]), shapes, strict=True)]
        return found


def flattened(tensors):
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def equal_parts(size):
    world = dist.get_world_size()
    part = -(-size // world)
    return [min(size, part * rank) for rank in range(world + 1)]


def anywhere(seed):
    """Cuts that all ranks draw alike: some ranks may have nothing, or no more than a part of a row."""

    def cuts(size):
        world, draw = dist.get_world_size(), random.Random(f"{seed} {size}")
        inner = [draw.randrange(size + 1) for _ in range(world - 1)]
        if draw.random() < 0.5:
            inner[-1] = min(size, inner[0] + 3)
        return [0, *sorted(inner), size]

    return cuts


def build(case, dtype, side="std", **options):
    torch.manual_seed(0)
    groups = []
    for weights in WEIGHTS:
        params = [(name, nn.Parameter(torch.randn(shape).div(4).to(dtype))) for name, shape, _ in weights]
        for rank in dict.fromkeys(rank for *_, rank in weights):
            some = [one for one, (*_, own) in zip(params, weights, strict=True) if own == rank]
            group = {"params": some, "rank": rank, "as_matrix": "auto"}
            groups.append({**group, "proj_type": side} if case.has("proj_type", side) else group)
    return case.build(groups, **options)


def shapes(optimizer):
    return [[p.shape for p in group["params"]] for group in optimizer.param_groups]


def some_gradients(sizes, dtype):
    torch.manual_seed(1)
    whole = [[gradients(tuple(shape), STEPS, dtype) for shape in group] for group in sizes]
    return [[[one[step] for one in group] for group in whole] for step in range(STEPS)]


def difference(case, cuts, side, dtype=torch.float64, **options):
    """The largest from one process, also after moving to other cuts, or what was said instead of training."""
    optimizer, one = build(case, dtype, side, **options), build(case, dtype, side, **options)
    grads = some_gradients(shapes(one), dtype)
    zero = Zero(optimizer, cuts)
    for step in grads:
        try:
            zero.step(step)
        except NotImplementedError as error:
            return str(error)
        for group, own in zip(one.param_groups, step, strict=True):
            for p, g in zip(group["params"], own, strict=True):
                p.grad = g
        one.step()
    return max(apart(zero.weights(), one), moved(zero, one, build(case, dtype, side, **options), cuts, grads[-1]))


def apart(weights, one):
    expected = [p for group in one.param_groups for p in group["params"]]
    return max((a - b).abs().max().item() for a, b in zip(weights, expected, strict=True))


def moved(zero, one, optimizer, cuts, grads):
    """Return the largest difference of fragments with other cuts, resumed from a full state, from one process."""
    full = lowrank_optim.full_state(zero.optimizer)
    for p, w in zip((p for group in optimizer.param_groups for p in group["params"]), zero.weights(), strict=True):
        p.data.copy_(w)
    other = Zero(optimizer, lambda size: [0, *sorted(size - at for at in cuts(size)[1:-1]), size])
    lowrank_optim.load_full_state(optimizer, full)
    again = lowrank_optim.full_state(optimizer)
    same = dist.get_rank() > 0 or equal(again, {key: x for key, x in full.items() if key != "borders"})
    lowrank_optim.load_full_state(one, full)
    for group, own in zip(one.param_groups, grads, strict=True):
        for p, g in zip(group["params"], own, strict=True):
            p.grad = g
    one.step()
    other.step(grads)
    return apart(other.weights(), one) if same else math.inf


# -- what three processes do -------------------------------------------------------------------------------------------


def three(rank, world):
    results = {}
    for number, case in enumerate(CASES):
        for side in ("std", "right") if case.name in ROWS else ("std",):  # "std" is both, of tall ones and wide ones
            results[case.name, side] = difference(case, anywhere(number), side)
    results["full"] = difference(ADAMW, anywhere(len(CASES)), "full")
    for check in (algebra, counts, decisions, gathered, kept, narrow, refused):
        results[check.__name__] = check(rank)
    return results


@pytest.fixture(scope="module")
def results():
    return spawn(three, 3)


@pytest.mark.slow
@every_case
def test_cut_anywhere_equals_one_process(case, results):
    got, expected = results[case.name, "std"], {**ROWS, **NEVER}.get(case.name)
    if expected:
        assert expected in got, got
    else:
        assert got < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_method_that_reads_lines_can_project_the_other_side(name, results):
    assert results[name, "right"] < 1e-9


@pytest.mark.slow
def test_both_sides_are_projected(results):
    assert results["full"] < 1e-9


# -- the algebra -------------------------------------------------------------------------------------------------------


def algebra(rank):
    """The largest difference of each operation from the whole matrix, over random cuts."""
    found, draw = {}, random.Random(5)
    for _ in range(40):
        height, width = draw.randrange(1, 12), draw.randrange(1, 12)
        natural, turned = torch.randn(height, width).double(), draw.random() < 0.5
        dist.broadcast(natural, 0)
        cut = anywhere(draw.random())(natural.numel())
        start, length = cut[rank], cut[rank + 1] - cut[rank]
        first, last = start // width, -(-(start + length) // width) if length else start // width
        peers, side = Peers(dist.group.WORLD, "cpu"), -1 if turned else -2
        layout = TouchedRows(
            pieces={side: Piece(height, first, last - first, height, rank, dist.get_world_size(), peers)},
            natural={side: 0}, everyone=peers, width=width, skipped=start % width if length else 0, elements=length,
        )  # fmt: skip
        own, whole = layout.algebra([layout]), lowrank_optim.recipe.algebra.WHOLE
        rows, full = natural[first:last], natural
        masked = torch.zeros_like(natural).view(-1)
        masked[start : start + length] = natural.reshape(-1)[start : start + length]
        masked = masked.view_as(natural)[first:last]
        if turned:
            rows, full, masked = rows.mT, full.mT, masked.mT
        for name, get in OPERATIONS.items():
            here = get(
                own,
                rows,
                slice(first, last) if not turned else slice(None),
                slice(first, last) if turned else slice(None),
            )
            there = get(whole, full, slice(None), slice(None))
            if here.shape != there.shape:  # what is left of the cut side
                cut_dim = next(i for i in (-1, -2) if here.shape[i] != there.shape[i])
                there = there.narrow(cut_dim, first, last - first)
            error = (here - there).abs().max().item() if here.numel() else 0.0
            found[name] = max(found.get(name, 0.0), error)
        found["weight"] = max(found.get("weight", 0.0), (own.size(masked) - whole.size(full)).abs().item())
    return found


def thin(n, some):
    """(n, 2), of which some rows are here."""
    return torch.arange(2.0 * n).view(n, 2).double().cos()[some]


OPERATIONS = {
    "project": lambda a, g, rows, columns: a.project(thin(a.shape(g)[0], rows), g),
    "sketch": lambda a, g, rows, columns: a.sketch(g, thin(a.shape(g)[1], columns)),
    "random sketch": lambda a, g, rows, columns: a.random_sketch(g, 2, lambda some: thin(a.shape(g)[1], columns)[some]),
    "inner": lambda a, g, rows, columns: a.inner(thin(a.shape(g)[1], columns).mT, thin(a.shape(g)[1], columns)),
    "norm": lambda a, g, rows, columns: a.norm(g, (-2, -1)),
    "columns": lambda a, g, rows, columns: a.norm(g, -2),
    "rows": lambda a, g, rows, columns: a.mean(g, -1),
    "mean": lambda a, g, rows, columns: a.mean(g, (-2, -1)),
    "energy": lambda a, g, rows, columns: a.energy(g, -2).unsqueeze(-2),
    "largest": lambda a, g, rows, columns: a.largest(g).view(1, 1),
    "size": lambda a, g, rows, columns: a.size(g),
    "size of scaled columns": lambda a, g, rows, columns: a.size(g, thin(a.shape(g)[1], columns).mT[:1]),
    "entries": lambda a, g, rows, columns: a.total(a.once(g, -1).square().sum(-1), -1).unsqueeze(-1),
    "lines": lambda a, g, rows, columns: _lines(a, g),
    "every": lambda a, g, rows, columns: a.every(a.energy(g, -1)).unsqueeze(-1),
    "columns alone": lambda a, g, rows, columns: _of_columns(a, g),
    "span": lambda a, g, rows, columns: _captured(a, g, rows),
}  # fmt: skip


def _lines(a, g):
    """Some rows, each of which several ranks may have."""
    rows, mine = a.places(torch.arange(0, int(a.shape(g)[0]), 2))
    if mine is None:
        return g[rows]
    some = g[rows] if g.shape[0] else g.new_zeros(len(rows), g.shape[1])
    return a.completed(some.masked_fill(~mine.unsqueeze(-1), 0), rows)


def _of_columns(a, g):
    """The energy of the rows of a block of columns."""
    n = int(a.shape(g)[1])
    some, block = a.columns(g, [(0, n // 3), (n // 2, n)])
    return some.energy(block, -1).unsqueeze(-1)


def _captured(a, g, rows):
    """What the projection on a subspace leaves of some vectors, which is the same of all its bases."""
    m = int(a.shape(g)[0])
    if m < 2:
        return torch.zeros(1, 1).double()
    basis = a.orthonormal(thin(m + 1, slice(None))[1:][rows], -2)
    coordinates = a.project(basis, thin(m + 3, slice(None))[:m][rows])
    return coordinates.mT @ coordinates


@pytest.mark.slow
@pytest.mark.parametrize("operation", [*OPERATIONS, "weight"])
def test_every_operation_on_fragments(operation, results):
    assert results["algebra"][operation] < 1e-9


# -- traffic -----------------------------------------------------------------------------------------------------------


def one_matrix(side, **options):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(256, 96))
    optimizer = lowrank_optim.GaLoreAdamW(
        [("w", p)], rank=4, proj_type=side, update_proj_gap=2, stagger=False, **options
    )
    return optimizer, Zero(optimizer, equal_parts)


def counts(rank):
    """Elements sent at each of three steps, with one matrix that two cuts divide; a refresh is before steps 0 and 2."""
    found = {}
    for side in ("right", "left"):
        optimizer, zero = one_matrix(side)
        optimizer.state_dict()  # where everything is, is asked once
        found[side] = []
        for _ in range(3):
            torch.manual_seed(2)
            with Counted() as counted:
                zero.step([[torch.randn(256, 96)]])
            found[side].append(counted.sizes)
        found[side, "report"] = optimizer.report()
    return found


@pytest.mark.slow
def test_few_rows_travel(results):
    sizes, cuts = results["counts"], 2
    norms, edges = 2, cuts * 96
    assert sizes["right"][1] == [norms, edges], "between refreshes one row per cut"
    assert sizes["left"][1] == [norms, edges, 4 * 96], "and R, where the projected side is cut"
    for side in ("right", "left"):
        for step in (0, 2):
            assert max(sizes[side][step]) <= (4 + 16) * 96, "the longest sketch"
            assert sum(sizes[side][step]) < 256 * 96 / 3, "far less than one gradient"


@pytest.mark.slow
def test_the_report_describes_the_local_part(results):
    (row,) = results["counts"]["left", "report"]
    assert (row.name, row.shape, row.side) == ("w", (256, 96), "left")
    assert row.layout == f"{256 * 96 // 3} of {256 * 96} elements"
    assert row.full_bytes == 2 * 4 * 256 * 96 // 3
    assert row.sent_per_step == 4 * (2 * 96 + 4 * 96)
    assert row.sent_per_refresh > 0


# -- decisions and checkpoints -----------------------------------------------------------------------------------------


def decisions(rank):
    """What becomes of a gradient that is odd on one rank alone."""
    optimizer, zero = one_matrix("right")
    before = zero.weights()[0]
    g = torch.randn(256, 96, generator=torch.Generator().manual_seed(0))
    bad = g.clone()
    bad[-1, -1] = torch.nan
    zero.step([[bad]])
    found = {"skipped": optimizer.stats()["skipped_gradients"], "same": torch.equal(before, zero.weights()[0])}
    g[:200] = 0  # all that rank 0 has
    zero.step([[g]])
    found["refreshes"] = optimizer.stats()["refreshes"]
    return found


@pytest.mark.slow
def test_ranks_decide_together(results):
    assert results["decisions"] == {"skipped": 1, "same": True, "refreshes": 1}


def kept(rank):
    """Goes on from a state dict, in an optimizer that has not stepped: the difference at the end."""
    first, second = (Zero(build(ADAMW, torch.float32, moments="rotate"), equal_parts) for _ in range(2))
    grads = some_gradients([[p.shape for p in group] for group in first.groups], torch.float32)
    for step in grads[:8]:
        first.step(step)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for p, w in zip(itertools.chain(*second.groups), first.weights(), strict=True):  # as DeepSpeed does after that
        p.data.copy_(w)
    for new, old in zip(second.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        new["params"][0].data.copy_(old["params"][0])
    for step in grads[8:]:
        first.step(step)
        second.step(step)
    return max((a - b).abs().max().item() for a, b in zip(first.weights(), second.weights(), strict=True))


@pytest.mark.slow
def test_a_state_dict_resumes_exactly(results):
    assert results["kept"] == 0


def gathered(rank):
    """Bytes in the collectives of a full state, and of the state of each parameter."""
    zero = Zero(build(ADAMW, torch.float32), equal_parts)
    zero.step(some_gradients([[p.shape for p in group] for group in zero.groups], torch.float32)[0])
    with Counted() as counted:
        full = lowrank_optim.full_state(zero.optimizer)
    states = full["state"].values() if full else ()
    return counted.sizes, [sum(x.nbytes for x in state.values()) for state in states]


@pytest.mark.slow
def test_a_full_state_is_of_one_parameter_at_a_time(results):
    (clocks, *sizes), states = results["gathered"]
    assert clocks == 2 * len(states)
    assert sorted(sizes) == sorted(states)


def narrow(rank):
    """Of narrow state, and a frozen parameter: (equal bits in other cuts, edited lr, difference of weights, names)."""
    found, grads = {}, some_gradients([[(64, 64), (64, 64), (6, 32, 32)]], torch.float32)
    whole = [0, 4096, 8192, 14336]  # a matrix or a stack on each rank
    for dtype, cuts in (("int8", whole), ("int8", [0, 11264, 11264, 14336]), ("bfloat16", [0, 5000, 5003, 14336])):
        first, second = (narrowly(dtype, one) for one in (whole, cuts))
        for step in grads[:3]:
            first.step(step)
        first.optimizer.param_groups[0]["lr"] = 0.0042
        full = lowrank_optim.full_state(first.optimizer)
        for p, w in zip(itertools.chain(*second.groups), first.weights(), strict=True):
            p.data.copy_(w)
        (group,), (begin, end, _) = second.optimizer.param_groups, second.parts[0]
        group["params"][0].copy_(flattened(first.weights())[begin:end])
        lowrank_optim.load_full_state(second.optimizer, full)
        again = lowrank_optim.full_state(second.optimizer)
        same = rank > 0 or equal(again, full)
        for zero in (first, second):
            zero.step(grads[3])
        difference = max((a - b).abs().max().item() for a, b in zip(first.weights(), second.weights(), strict=True))
        lr = second.optimizer.param_groups[0]["lr"]
        found[dtype, cuts[1]] = same, lr, difference, sorted(full["state"] if full else ())
    return found


def narrowly(dtype, cuts):
    torch.manual_seed(0)
    shapes = {"a": (64, 64), "b": (64, 64), "stack": (6, 32, 32), "still": (64, 64)}
    params = [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    params[-1][1].requires_grad_(False)
    optimizer = lowrank_optim.GaLoreAdamW(params, rank=4, state_dtype=dtype, proj_type="right", weight_decay=0.1)
    return Zero(optimizer, lambda _: cuts)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "cut"), [("int8", 4096), ("int8", 11264), ("bfloat16", 5000)])
def test_narrow_state_moves_to_other_cuts(dtype, cut, results):
    same, lr, difference, names = results["narrow"][dtype, cut]
    assert (same, lr, names) == (True, 0.0042, ["a", "b", "stack"])
    assert difference == 0 if dtype == "int8" else difference < 1e-6


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(rank):
    galore, shape = lowrank_optim.GaLoreAdamW, (80, 70)
    found = {}

    def stepped(make, *params, **options):
        optimizer = make([(f"w{i}", p) for i, p in enumerate(params)], **{"rank": 2, **options})
        zero = Zero(optimizer, equal_parts)
        return message(NotImplementedError, zero.step, [[torch.ones_like(p) for p in params]])

    found["blocks"] = stepped(galore, nn.Parameter(torch.randn(shape)), proj_type="right", state_dtype="int8")
    found["capturable"] = stepped(galore, nn.Parameter(torch.randn(8, 6)), capturable=True)
    optimizer = galore([("w", nn.Parameter(torch.randn(8, 6)))], rank=2)
    zero = Zero(optimizer, equal_parts)
    optimizer.param_groups[0]["params"][0][:1].add_(1)
    copied, zero_too = one_matrix("right")
    zero_too.step([[torch.ones(256, 96)]])
    found |= no_full_state(rank)
    found["copy"] = message(NotImplementedError, copy.deepcopy, copied)
    moved = copied.state_dict()
    moved["state"] = {0: {"m5": moved["state"][0]["m0"]}}
    found["other pieces"] = message(ValueError, copied.load_state_dict, moved)
    found["wrong map"] = message(RuntimeError, zero.step, [[torch.ones(8, 6)]])
    return found


def no_full_state(rank):
    found, full = {}, lowrank_optim.full_state
    narrow = build(ADAMW, torch.bfloat16, bf16_update="kahan")
    Zero(narrow, equal_parts)
    found["kahan"] = message(NotImplementedError, full, narrow)
    differing, zero = one_matrix("right")
    zero.step([[torch.randn(256, 96, generator=torch.Generator().manual_seed(0))]])
    next(iter(differing.state.values()))["m0"]["basis"].add_(rank)
    found["ranks differ"] = message(RuntimeError, full, differing)
    alone = [dist.new_group([one]) for one in range(dist.get_world_size())][rank]
    spread = differing.table.spread
    spread.update({p: one._replace(peers=Peers(alone, "cpu")) for p, one in spread.items()})
    found["some ranks"] = message(NotImplementedError, full, differing)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("kahan", 'tall is stored in 16 bits in flat tensors, with bf16_update="kahan"'),
        ("ranks differ", r"ranks have different state \(basis of w"),
        ("some ranks", "w is in flat tensors of 1 of 3 ranks"),
        ("blocks", 'quantized in blocks that depend on the number of ranks.*"bfloat16"'),
        ("capturable", "capturable=True of GaLoreAdamW does not work under a wrapper"),
        ("copy", "cannot be copied or pickled"),
        ("other pieces", "has other ranges of the parameters than this rank"),
        ("wrong map", "does not match its master weights.*round_robin_gradients to false"),
    ],
)
def test_refusals(what, said, results):
    assert re.search(said, results["refused"][what]), results["refused"][what]


def given(**attributes):
    p = nn.Parameter(torch.randn(8, 6))
    for name, value in attributes.items():
        setattr(p, name, value)
    return p


def test_a_flat_tensor_without_an_owner_is_refused():
    """FSDP1 flattens, and says nothing of shapes."""
    optimizer = lowrank_optim.GaLoreAdamW([("w", given())], rank=2)
    optimizer.param_groups[0]["params"] = [torch.randn(48)]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(48)
    with pytest.raises(NotImplementedError, match=r"a flattened 1-D tensor.*FSDP1.*DeepSpeed ZeRO 0-3"):
        optimizer.step()


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        (SimpleNamespace(round_robin_gradients=True), "round_robin_gradients is not supported.*set it to false"),
        (SimpleNamespace(zenflow=True), "ZenFlow is not supported"),
        (SimpleNamespace(swap_optimizer=True), 'NVMe is not supported.*"device": "cpu"'),
        (SimpleNamespace(params_in_nvme_and_cpu=True), "NVMe"),
        (SimpleNamespace(partial_offload=0.5), "partial offload is not supported.*ratio"),
        (SimpleNamespace(zero_hpz_partition_size=2), "hpZ is not supported"),
        (type("MiCS_Optimizer", (), {})(), "MiCS is not supported"),
        (type("SuperOffloadOptimizer_Stage3", (), {})(), "SuperOffload is not supported"),
    ],
)
@pytest.mark.parametrize("name", ["_z3_optimizer", "_zero_optimizer"])
def test_features_of_deepspeed_are_refused_by_name(name, zero, said):
    p = given(**{name: zero, "_hp_mapping": None})
    with pytest.raises(NotImplementedError, match=said):
        ranges("GaLoreAdamW", torch.randn(24), [p], {})


@pytest.mark.parametrize(
    ("attributes", "group", "said"),
    [
        ({"allreduce": False}, {}, "expert groups"),
        ({}, {"moe": True}, "expert groups"),
        ({"ds_pipe_replicated": False}, {}, "the pipeline engine"),
        ({"selected_indices": None}, {}, "ZenFlow"),
    ],
)
def test_parameters_of_other_engines_are_refused(attributes, group, said):
    with pytest.raises(NotImplementedError, match=said):
        ranges("GaLoreAdamW", torch.randn(24), [given(_hp_mapping=None, **attributes)], group)


def test_an_unknown_deepspeed_is_named():
    with pytest.raises(RuntimeError, match=r"changed an attribute.*_dp_group.*0.16.9 to 0.19.x"):
        ranges("GaLoreAdamW", torch.randn(24), [given(_hp_mapping=None)], {})


def test_methods_that_need_their_parameters_are_refused():
    optimizer = lowrank_optim.LoQT(nn.Sequential(nn.Linear(32, 24)), rank=2)
    optimizer.param_groups[0]["params"] = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(NotImplementedError, match=r"LoQT does not work under DeepSpeed.*quantized weights"):
        optimizer.step()


def test_frozen_matrices_leave_nothing_to_project():
    optimizer = lowrank_optim.GaLoreAdamW([("w", given()), ("b", nn.Parameter(torch.randn(5)))], rank=2)
    optimizer.param_groups[0]["params"][0].requires_grad_(False)
    optimizer.param_groups[0]["params"] = [torch.randn(5)]
    with pytest.raises(ValueError, match=r"(?s)found nothing to project.*w: frozen"):
        optimizer.step()


def test_copies_take_the_place_of_parameters():
    """Stage 0 in bfloat16: clones in float32, without attributes; and a step on zeros before the first."""
    optimizer = build(ADAMW, torch.bfloat16)
    originals = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["params"] = [p.detach().clone().float() for p in group["params"]]
    copies = [p for group in optimizer.param_groups for p in group["params"]]
    for p in copies:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q.float()) for p, q in zip(copies, originals, strict=True)), "no decay"
    one = build(ADAMW, torch.float32)
    alone = [p for group in one.param_groups for p in group["params"]]
    for p, q in zip(alone, copies, strict=True):
        p.data.copy_(q)
        p.grad = q.grad = torch.randn(p.shape)
    optimizer.step()
    one.step()
    assert all(torch.equal(p, q) for p, q in zip(copies, alone, strict=True))
    assert [row.name for row in optimizer.report()] == [row.name for row in one.report()]
    restored = build(ADAMW, torch.float32)
    restored.load_state_dict(optimizer.state_dict())
    lowrank_optim.load_full_state(restored, lowrank_optim.full_state(optimizer))
    for p, q in zip((p for group in restored.param_groups for p in group["params"]), copies, strict=True):
        state, saved = restored.state[p], optimizer.state[q]
        assert saved["step"] == 1
        assert all(torch.equal(state[key], saved[key]) for key in saved)


def test_the_number_of_a_group_survives_and_is_ours():
    optimizer = lowrank_optim.GaLoreAdamW([{"params": [given()], GROUP: 7}, {"params": [given()]}], rank=2)
    assert [group[GROUP] for group in optimizer.param_groups] == [0, 1]
    other = lowrank_optim.GaLoreAdamW([{"params": [given()]}, {"params": [given()]}], rank=2)
    other.load_state_dict(optimizer.state_dict())
    assert [group[GROUP] for group in other.param_groups] == [0, 1]
