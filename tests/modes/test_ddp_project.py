"""ddp_project: DistributedDataParallel sends coordinates between refreshes, and trains as if it had not.

One set of processes works through everything, because starting it takes longer than the work.
"""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim import ddp_project
from tests.cases import CASES, Net
from tests.support.processes import Chosen, message, same_everywhere, shared_gradients, spawn

STEPS = 16  # refreshes before steps 0, 7 and 14
OPTIONS = {"moments": "rotate"}
THIN = ("galore_adamw", "galore_adafactor", "golore", "q_galore", "dct")
GALORE = next(case for case in CASES if case.name == "galore_adamw")
# Ways to wrap a model, and to run its steps; for the first method alone.
WAYS = {
    "one bucket": {},
    "many buckets": {"bucket_cap_mb": 1e-4},
    "views": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
}


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batch(step, world=1):
    return torch.randint(0, 11, (4 * world, 9), generator=torch.Generator().manual_seed(step))


def wrapped(model, **ways):
    dist._DEFAULT_FIRST_BUCKET_BYTES = 64 if "bucket_cap_mb" in ways else 1 << 20
    return DistributedDataParallel(model, **ways)


def made(case, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    return model, case.build(model.named_parameters(), **OPTIONS, **options)


def alone(case, world, micro=1, dtype=torch.float64, last=STEPS, **options):
    """One process, with the batches of all ranks."""
    model, optimizer = made(case, dtype, **options)
    for step in range(last):
        optimizer.zero_grad()
        for k in range(micro):
            (loss_of(model, batch(step * micro + k, world)) / micro).backward()
        optimizer.step()
    return model


def trained(case, rank, world, ways=None, micro=1, dtype=torch.float64, first=0, last=STEPS, start=None, **options):
    """The wrapped model, the optimizer and the handle, some steps on; `start` gives a checkpoint."""
    model, optimizer = made(case, dtype, **options)
    if start is not None:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
    model = wrapped(model, **(ways or {}))
    handle = ddp_project(model, optimizer)
    for step in range(first, last):
        optimizer.zero_grad()
        for k in range(micro):
            own = batch(step * micro + k, world).chunk(world)[rank]
            with contextlib.nullcontext() if k == micro - 1 else model.no_sync():
                (loss_of(model, own) / micro).backward()
        optimizer.step()
    return model, optimizer, handle


def apart(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((p.double() - q.double()).abs().max().item() for p, q in pairs)


def parity(rank, world):
    """Differences from one process; None where ranks are not the same bits."""
    found = {}

    def compare(key, case, **how):
        model, optimizer, _ = trained(case, rank, world, **how)
        how.pop("ways", None)
        state = [x for p in model.parameters() for x in optimizer.state[p].values()]
        equal = same_everywhere([*model.parameters(), *state])
        found[key] = apart(model.module, alone(case, world, **how)) if equal else None

    for case in CASES:
        if case.name in THIN:
            compare((case.name, "float64"), case)
            compare((case.name, "float32"), case, dtype=torch.float32)
    for name, ways in WAYS.items():
        compare((name, "together"), GALORE, ways=ways, stagger=False)
        compare((name, "staggered"), GALORE, ways=ways, stagger=True)
        compare((name, "accumulated"), GALORE, ways=ways, micro=3)
    compare("stacked", GALORE, foreach=True)
    return found


def two(rank, world):
    checks = (parity, traffic, gradient, narrow, resumed, odd_gradients, clipped, passes, refused)
    return {check.__name__: check(rank, world) for check in checks}


@pytest.fixture(scope="module")
def results():
    return spawn(two, 2)


def close(found):
    """`{what: difference}` with None where ranks differ."""
    assert None not in found.values(), found
    for key, got in found.items():
        assert got < (1e-6 if "float32" in key else 1e-12), f"{key}: {got}"


@pytest.mark.slow
def test_two_processes_equal_one(results):
    close(results["parity"])


@pytest.mark.slow
def test_three_processes_equal_one():
    close(spawn(parity, 3))


# -- what is sent ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted():
    """The lengths of all all-reduces; DDP's own hook is in C++ and not seen."""
    sizes, before = [], dist.all_reduce

    def all_reduce(x, *args, **kwargs):
        sizes.append(x.numel())
        return before(x, *args, **kwargs)

    dist.all_reduce = all_reduce
    yield sizes
    dist.all_reduce = before


def traffic(rank, world):
    """Elements sent in steps with a refresh (0, 7) and without; what `report()` says of the first parameters."""
    model, optimizer = made(GALORE, torch.float32, stagger=False, rank=2)
    model = wrapped(model)
    ddp_project(model, optimizer)
    sizes = []
    for step in range(9):
        optimizer.zero_grad()
        with counted() as sent:
            loss_of(model, batch(step)).backward()
        optimizer.step()
        sizes.append(sum(sent))
    return {"sizes": sizes, "rows": list(optimizer.report()), "text": str(optimizer.report())}


@pytest.mark.slow
def test_only_coordinates_are_sent_between_refreshes(results):
    found, net = results["traffic"], Net()
    rows = {row.name: row for row in found["rows"]}
    whole = sum(p.numel() for p in net.parameters())
    matrices = {name: p.numel() for name, p in net.named_parameters() if rows[name].rank}
    long = {"conv.weight": 36, "up.weight": 20, "down.weight": 20, "square.weight": 12, "experts": 3 * 18}
    assert matrices.keys() == long.keys()
    thin = whole - sum(matrices.values()) + 2 * sum(long.values())
    assert found["sizes"] == [whole, *[thin] * 6, whole, thin]
    for name, p in net.named_parameters():
        sent = (4 * 2 * long[name], 4 * p.numel()) if name in long else (4 * p.numel(), None)
        assert (rows[name].sent_per_step, rows[name].sent_per_refresh) == sent, name
    assert "gradients are sent projected between refreshes" in found["text"]
    assert "sent/step" in found["text"]


def gradient(rank, world):
    """Which parameters have a gradient after backward: with a refresh, and without; and of the other optimizers'."""
    model, optimizer = made(GALORE, stagger=False)
    model = wrapped(model, gradient_as_bucket_view=True)
    ddp_project(model, optimizer)
    found = []
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        found.append({name for name, p in model.module.named_parameters() if p.grad is not None})
        optimizer.step()
    return found


@pytest.mark.slow
def test_only_averaged_gradients_are_visible(results):
    first, second = results["gradient"]
    net = dict(Net().named_parameters())
    assert first == set(net)
    assert second == {name for name, p in net.items() if p.dim() < 2} | {"embed.weight"}


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


def narrow(rank, world):
    """Differences in bfloat16, of gradients whose mean is a bfloat16 as well."""
    found = {}
    for case in CASES:
        if case.name in THIN:
            torch.manual_seed(0)
            model = Chosen(torch.bfloat16)
            one = copy.deepcopy(model)
            kept = shared_gradients(one, 9)
            optimizers = [case.build(m.named_parameters(), rank=4) for m in (model, one)]
            model = wrapped(model)
            ddp_project(model, optimizers[0])
            for step in range(9):
                for m, optimizer, shift in ((model, optimizers[0], (-1) ** rank / 8), (one, optimizers[1], 0)):
                    optimizer.zero_grad()
                    m([(g + shift).bfloat16() for g in kept[step]]).backward()
                    optimizer.step()
            assert same_everywhere(model.parameters())
            pairs = list(zip(model.parameters(), one.parameters(), strict=True))
            odd = sum((p != q).sum().item() for p, q in pairs) / sum(p.numel() for p, _ in pairs)
            found[case.name] = odd, max(((p - q).abs() / q.abs().clamp(min=0.01)).max().item() for p, q in pairs)
    return found


@pytest.mark.slow
def test_bfloat16_weights_are_those_of_one_process_but_for_roundings(results):
    """R is summed in float32, in another order: a weight in a thousand is then rounded the other way."""
    for name, (odd, largest) in results["narrow"].items():
        assert odd < 3e-3, name
        assert largest < 2**-6, name


# -- the loop ----------------------------------------------------------------------------------------------------------


def resumed(rank, world):
    """Saved between two refreshes, gone on with: differences from an undisturbed run."""
    found = {}
    for name, ways in WAYS.items():
        whole = trained(GALORE, rank, world, ways)[0].module
        model, optimizer, _ = trained(GALORE, rank, world, ways, last=10)
        start = copy.deepcopy((model.module.state_dict(), optimizer.state_dict()))
        found[name] = apart(whole, trained(GALORE, rank, world, ways, first=10, start=start)[0].module)

    # a checkpoint that is loaded between backward and step: what was gathered belongs to other weights
    loss_of(model, batch(99)).backward()
    model.module.load_state_dict(start[0])
    optimizer.load_state_dict(copy.deepcopy(start[1]))
    before = copy.deepcopy(model.module)
    optimizer.step()
    return {**found, "dropped": apart(before, model.module)}


@pytest.mark.slow
def test_resume(results):
    """DDP puts buckets into another order after its first step, and matmuls of a gradient at another address may round
    in another way: so it is with views, hook or not."""
    found = results["resumed"]
    assert found["one bucket"] == found["dropped"] == 0
    assert max(found.values()) < 1e-15


def odd_gradients(rank, world):
    """A gradient that is not finite on one rank; a first step on zeros."""
    model, optimizer = made(GALORE, stagger=False)
    twin = model
    model, found = wrapped(model), {}
    ddp_project(model, optimizer)
    (0.0 * loss_of(model, batch(0))).backward()
    optimizer.step()
    found["phantom"] = [float(optimizer.state[p]["step"]) for p in twin.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        if step == 2 and rank == 1:
            loss = loss + twin.up.weight[0, 0] * torch.inf
        loss.backward()
        optimizer.step()
    found["skipped"] = {row.name for row in optimizer.report() if row.skipped}
    found["finite"] = all(bool(p.isfinite().all()) for p in twin.parameters())
    found["equal"] = same_everywhere(twin.parameters())
    return found


@pytest.mark.slow
def test_odd_gradients(results):
    found = results["odd_gradients"]
    assert set(found["phantom"]) == {0.0}, "the first step on zeros exists and does nothing"
    assert "up.weight" in found["skipped"]
    assert found["finite"]
    assert found["equal"]


def clipped(rank, world):
    """The norms that clipping knew, and how long the steps were; SGD in the subspace moves by what it is given."""
    found = {}
    for clip in ("global", "tensor"):
        torch.manual_seed(0)
        model = Chosen(torch.float64)
        options = {"momentum": "none", "scaling": "none", "rank": 4, "lr": 1.0, "weight_decay": 0.0}
        optimizer = lowrank_optim.compose(model.named_parameters(), basis="svd", residual="drop", **options)
        model = wrapped(model)
        handle = ddp_project(model, optimizer, clip_norm=0.5, clip=clip)
        for _ in range(2):  # the second one without a refresh
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            model([torch.ones_like(p) * (1 + rank) for p in model.parameters()]).backward()
            optimizer.step()
        moved = [(p - q).norm().item() for p, q in zip(model.parameters(), before, strict=True)][:3]
        found[clip] = handle.grad_norm, moved
    return found


@pytest.mark.slow
def test_gradients_are_clipped(results):
    """Ones have rank one, so R is as long as G. The bias is served by AdamW, whose step does not tell."""
    lengths = [1.5 * n**0.5 for n in (24 * 10, 9 * 22, 12 * 12, 13)]
    together = sum(x**2 for x in lengths) ** 0.5
    norm, moved = results["clipped"]["global"]
    assert norm == pytest.approx(together)
    assert moved == pytest.approx([0.5 * x / together for x in lengths[:3]], rel=1e-5)
    norm, moved = results["clipped"]["tensor"]
    assert norm == pytest.approx(together)
    assert moved == pytest.approx([0.5] * 3, rel=1e-5)


def passes(rank, world):
    """Several synchronised passes add up; zero_grad drops; a local pass afterwards is an error."""
    model, optimizer = made(GALORE, stagger=False)
    model, found = wrapped(model), {}
    ddp_project(model, optimizer)
    one, other = made(GALORE, stagger=False)

    def run(step, losses, model, own):
        for k in range(losses):
            tokens = batch(7 * step + k, world)
            loss_of(model, tokens.chunk(world)[rank] if own else tokens).backward()

    for step in range(4):
        optimizer.zero_grad()
        other.zero_grad()
        if step == 2:
            run(50, 1, model, True)
            optimizer.zero_grad()
        run(step, 2, model, True)
        run(step, 2, one, False)
        optimizer.step()
        other.step()
    found["apart"] = apart(model.module, one)
    optimizer.zero_grad()
    run(5, 1, model, True)
    with model.no_sync():
        run(6, 1, model, True)
    found["stray"] = message(RuntimeError, optimizer.step)
    optimizer.zero_grad()
    optimizer.step()  # nothing to do
    found["after"] = apart(model.module, one)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, batch(0))).backward()
    found["scaler"] = message(RuntimeError, scaler.step, optimizer)
    return found


@pytest.mark.slow
def test_backward_passes_add_up(results):
    found = results["passes"]
    assert found["apart"] < 1e-12
    assert found["after"] == found["apart"], "nothing was updated"
    assert "has a gradient in p.grad in addition to its projected one" in found["stray"]
    assert "a GradScaler unscales p.grad" in found["scaler"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(rank, world):
    net, galore = Net(), lowrank_optim.GaLoreAdamW
    model = wrapped(net)
    options = {"rank": 2}

    def unused():
        strange = wrapped(Net(), find_unused_parameters=True)
        return ddp_project(strange, galore(strange.named_parameters(), **options))

    def static():
        strange = wrapped(Net(), static_graph=True)
        return ddp_project(strange, galore(strange.named_parameters(), **options))

    def hooked():
        strange = wrapped(Net())
        strange.register_comm_hook(None, lambda state, bucket: None)
        return ddp_project(strange, galore(strange.named_parameters(), **options))

    def twice():
        other, optimizer = wrapped(Net()), None
        optimizer = galore(other.named_parameters(), **options)
        ddp_project(other, optimizer)
        ddp_project(other, optimizer)

    def copied():
        other = wrapped(Net())
        copy.deepcopy(ddp_project(other, galore(other.named_parameters(), **options)))

    def joined():
        other = wrapped(Net())
        optimizer = galore(other.named_parameters(), **options)
        ddp_project(other, optimizer)
        with other.join():
            loss_of(other, batch(0)).backward()

    def ranks_differ():
        other = wrapped(Net())
        ddp_project(other, galore(other.named_parameters(), rank=2 + rank))

    whole = galore(net.named_parameters(), **options)
    made = {
        "model": lambda: ddp_project(net, whole),
        "optimizer": lambda: ddp_project(model, torch.optim.AdamW(net.parameters())),
        "copied": lambda: ddp_project(model, galore(Net().named_parameters(), **options)),
        "capturable": lambda: ddp_project(model, galore(net.named_parameters(), capturable=True, **options)),
        "clip": lambda: ddp_project(model, whole, clip_norm=1.0, clip="delayed"),
        "clip nothing": lambda: ddp_project(model, whole, clip="tensor"),
        "copy": copied, "unused": unused, "static": static, "hooked": hooked, "twice": twice, "ranks": ranks_differ,
    }  # fmt: skip
    found = {name: message(Exception, call) for name, call in made.items()}
    for case in CASES:
        fresh = wrapped(Net())
        found[case.name] = message(ValueError, ddp_project, fresh, case.build(fresh.named_parameters()))
    found["joined"] = message(Exception, joined)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("model", "needs the model that DistributedDataParallel returned, got Net"),
        ("optimizer", "needs an optimizer of lowrank_optim, got AdamW"),
        ("copied", "is no parameter of this model"),
        ("capturable", "the graph reads whole gradients"),
        ("clip", "clip must be one of 'global', 'tensor', got 'delayed'"),
        ("clip nothing", "without clip_norm clips nothing"),
        ("copy", "which copy and pickle do not follow"),
        ("unused", "with find_unused_parameters=True"),
        ("static", "with static_graph=True"),
        ("hooked", "with another communication hook"),
        ("twice", "call ddp_project once"),
        ("ranks", "ranks have different parameters, shapes, ranks or sides"),
        ("joined", r"within model.join\(\)"),
        ("fira", "FiraAdamW needs whole gradients: it also uses the part of the gradient outside the subspace"),
        ("apollo", "part of the gradient outside the subspace"),
        ("ldadam", "part of the gradient outside the subspace"),
        ("frugal", "part of the gradient outside the subspace"),
        ("subset_norm", "nothing is projected"),
        ("subspace_momentum", "part of the gradient outside the subspace"),
        ("snsm", "second moments are of the whole gradient|part of the gradient outside the subspace"),
        ("galore_plus", "part of the gradient outside the subspace"),
        ("flora", "second moments are of the whole gradient|part of the gradient outside the subspace"),
    ],
)
def test_refusals(what, said, results):
    assert re.search(said, results["refused"][what]), results["refused"][what]


@pytest.mark.slow
def test_every_method_is_projected_or_refused(results):
    taken = {case.name for case in CASES if not results["refused"][case.name]}
    assert taken == set(THIN)
