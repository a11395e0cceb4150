"""Weight-space methods under fully_shard: convert, shard, then make the optimizer; merges send thin factors only,
and what is quantized is shared out by rows."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lowrank_optim
from tests.support.processes import message, spawn
from tests.support.sharded import saved, whole
from tests.support.wrapped import apart

METHODS = {  # the optimizer and its options, and those of the layer alone
    "relora": (lowrank_optim.ReLoRA, {"merge_every": 3, "alpha": 7.0}, {}),
    "relora-nf4": (lowrank_optim.ReLoRA, {"merge_every": 3, "alpha": 7.0, "base": "nf4"}, {"by_rows": True}),
    "relora-int8": (lowrank_optim.ReLoRA, {"merge_every": 3, "alpha": 7.0, "base": "int8"}, {"by_rows": True}),
    "low_rank": (lowrank_optim.LowRankAdamW, {"refactor_every": 3, "reset_every": 4, "alpha": 5.0}, {"base": "none"}),
    "sltrain": (
        lowrank_optim.SLTrain,
        {"refactor_every": 3, "reset_every": 4, "alpha": 5.0, "density": 0.07},
        {},
    ),
    "lte": (lowrank_optim.LTE, {"heads": 3, "merge_every": 3, "alpha": 5.0}, {}),
    "lte-nf4": (lowrank_optim.LTE, {"heads": 1, "merge_every": 3, "reset": "drop", "base": "nf4"}, {"by_rows": True}),
    "sst": (lowrank_optim.SST, {"iteration_steps": 3, "iterations": 2}, {}),
    "loqt": (
        lowrank_optim.LoQT,
        {"update_proj_gap": 3, "gap_growth": 1, "stagger": False, "scale": 0.7, "base": "dense"},
        {},
    ),
}
QUANTIZED = ["relora-nf4", "relora-int8", "lte-nf4"]
MERGING = ["relora", "lte", *QUANTIZED]
SAVED = [name for name in METHODS if name not in ("relora-int8", "lte-nf4")]  # which are saved as others are
USUAL = {"lr": 0.013, "betas": (0.83, 0.97), "rank": 4, "weight_decay": 0.1}
# Adam divides a gradient by its own size: of one that is a rounding error in float32 it would make a step, in one
# process too (weights differ by 9e-7 where the batch comes in another order).
SMOOTH = {torch.float32: {"eps": 1e-2}}
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def net(dtype, width=18):
    torch.manual_seed(0)
    layers = nn.Linear(width, 37), nn.Tanh(), nn.Linear(37, 25), nn.Tanh(), nn.Linear(25, width)
    return nn.Sequential(*layers).to(dtype)


def options_of(name):
    """Of the optimizer alone, of both, and the width of the model: blocks of int8 and NF4 end with a row of 256."""
    make, options, how = METHODS[name]
    how = {**how, **{key: value for key, value in options.items() if key in make.layer_options}}
    exclude = {"exclude": [r"[24]\.weight"]} if name in QUANTIZED else {}
    return options, how, exclude, 256 if name in QUANTIZED else 18


def alone(name, dtype):
    """In one process, not sharded."""
    options, _, exclude, width = options_of(name)
    model = net(dtype, width)
    return model, METHODS[name][0](model, **USUAL, **SMOOTH.get(dtype, {}), **options, **exclude)


def train(model, optimizer, last=10, rank=0, world=1, first=0):
    dtype, width = next(model.parameters()).dtype, model[0].in_features
    heads = getattr(model[0], "heads", 1)
    for step in range(first, last):
        x = torch.randn(12, width, generator=torch.Generator().manual_seed(step)).to(dtype)
        # part h of the batch of every rank is of part h of the joined batch
        x = x.view(heads, world, -1, width)[:, rank].reshape(-1, width)
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()


def sharded(mesh, name, dtype, **more):
    options, how, exclude, width = options_of(name)
    make = METHODS[name][0]
    model = lowrank_optim.convert(net(dtype, width), make.layer, rank=4, **how, **exclude)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, make(model, **{**USUAL, **SMOOTH.get(dtype, {}), **options, **more})


class Gathered:
    """Shapes of the DTensors that are gathered while it is entered; what FSDP gathers for a layer is not among them."""

    def __enter__(self):
        self.shapes, self.before = [], DTensor.full_tensor

        def full_tensor(x, **options):
            self.shapes.append(tuple(x.shape))
            return self.before(x, **options)

        DTensor.full_tensor = full_tensor
        return self

    def __exit__(self, *_):
        DTensor.full_tensor = self.before


def two(rank, world, folder):
    mesh, results = init_device_mesh("cpu", (world,)), {}
    for name in METHODS:
        model, optimizer = sharded(mesh, name, torch.float64)
        with Gathered() as gathered:
            train(model, optimizer, 10, rank, world)
        table = optimizer.report()
        results[name] = whole(model), gathered.shapes, [row.reason for row in table], [row.state_bytes for row in table]
        results[name, "here"] = sum(p.to_local().nbytes for p in model.parameters())
        if name in MERGING:
            model, optimizer = sharded(mesh, name, torch.float32)
            train(model, optimizer, 10, rank, world)
            results[name, "float32"] = whole(model)
    model, optimizer = sharded(mesh, "relora", torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.125)
    for layer in (model[0], model[2]):
        layer.merge_(1)
    results["bf16"] = whole(model)
    results["refused"] = refusals(mesh)
    results["resumed"] = resumed(mesh, rank, world, folder, results)
    results["lost"] = a_lost_vector(mesh)
    results["dtypes"] = gathered_in_16_bits(mesh)
    return results


def resumed(mesh, rank, world, folder, results):
    """How far the end is from that of an undisturbed run, where two ranks go on with what one has saved, and one with
    what two have: before and after the restart that follows update 3."""
    one = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "shards"))["shards"]
    ways, found = {"2 to 1": (mesh, one), "1 to 2": (one, mesh)}, {}
    for name in SAVED:
        for way, (before, after) in ways.items():
            for at in (2, 3):
                found[name, way, at] = apart(results[name][0], gone_on(name, before, after, at, rank, world, folder))
    return found


def place_of(mesh, rank, world):
    return (rank, world) if mesh.size() > 1 else (0, 1)


def gone_on(name, before, after, at, rank, world, folder):
    """The end of a run that was saved by torch's checkpoints (at 2) or ours (at 3), and went on with another mesh."""
    model, optimizer = sharded(before, name, torch.float64)
    train(model, optimizer, at, *place_of(before, rank, world))
    again, other = sharded(after, name, torch.float64)
    if at == 2:
        checkpoint = f"{folder}/{name}-{before.size()}"
        dcp.save(saved(model, optimizer), checkpoint_id=checkpoint)
        state = saved(again, other)
        dcp.load(state, checkpoint_id=checkpoint)
        set_model_state_dict(again, state["model"])
        set_optimizer_state_dict(again, other, state["optimizer"])
    else:
        state = [get_model_state_dict(model, options=_FULL), lowrank_optim.full_state(optimizer)]
        torch.distributed.broadcast_object_list(state)
        set_model_state_dict(again, state[0], options=StateDictOptions(full_state_dict=True))
        lowrank_optim.load_full_state(other, state[1])
    train(again, other, 10, *place_of(after, rank, world), first=at)
    return whole(again)


def a_lost_vector(mesh):
    """A vector that an update has made zero becomes what it was."""
    model, _ = sharded(mesh, "sst", torch.float64)
    before = whole(model)
    with torch.no_grad():
        model[0].U_active.to_local()[:1].zero_()
    model[0].retract_()
    return apart(before, whole(model))


def gathered_in_16_bits(mesh):
    """What a layer's forward pass gets of its tensors under a policy of mixed precision."""
    found = {}
    for name in ("relora-nf4", "sst"):
        options, how, exclude, width = options_of(name)
        model = lowrank_optim.convert(net(torch.float32, width), METHODS[name][0].layer, rank=4, **how, **exclude)
        model[0].register_forward_pre_hook(
            lambda layer, _, name=name: found.update({name: {key: p.dtype for key, p in layer.named_parameters()}})
        )
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        train(model, METHODS[name][0](model, **USUAL, **options), 1)
    return found


def refusals(mesh):
    def shard(how=None, **options):
        how = {"rank": 4, "alpha": 32.0} if how is None else how
        model = lowrank_optim.convert(net(torch.float32), lowrank_optim.LowRankLinear, **how)
        fully_shard(model, mesh=mesh)
        return lowrank_optim.ReLoRA(model, **{"rank": 4, **options})

    def other(layer, make, dtype=torch.float32, how=None, **options):
        model = lowrank_optim.convert(net(dtype), layer, rank=4, **(how or {}))
        fully_shard(model, mesh=mesh)
        return make(model, rank=4, **options)

    bare = net(torch.float32)
    fully_shard(bare, mesh=mesh)
    sparse = lowrank_optim.convert(net(torch.float32), lowrank_optim.SparseLowRankLinear, rank=4)
    fully_shard(sparse, mesh=mesh)
    both = NotImplementedError, ValueError
    return {
        "bare": message(both, lowrank_optim.ReLoRA, bare, rank=4),
        "rank": message(both, shard, rank=3),
        "alpha": message(both, shard, alpha=5.0),
        "reset": message(both, shard, reset="magnitude", reset_ratio=0.9),
        "include": message(both, shard, include=["0.weight"]),
        "none": message(both, shard, {"rank": 4, "base": "none"}),
        "density": message(both, lowrank_optim.SLTrain, sparse, rank=4, density=0.1),
        "codes": message(both, shard, {"rank": 4, "base": "nf4"}, base="nf4"),
        "exact": message(
            both, shard, {"rank": 4, "base": "int8", "by_rows": True, "exact_base": True}, base="int8", exact_base=True
        ),
        "loqt": message(both, other, lowrank_optim.QuantizedLinear, lowrank_optim.LoQT),
        "heads": message(
            both, other, lowrank_optim.MultiHeadLinear, lowrank_optim.LTE, how={"ranks": True}, heads="ranks"
        ),
        "heads of one": message(both, other, lowrank_optim.MultiHeadLinear, lowrank_optim.LTE, heads="ranks"),
        "lte codes": message(
            both, other, lowrank_optim.MultiHeadLinear, lowrank_optim.LTE, how={"base": "int8"}, base="int8"
        ),
        "sigma": message(both, other, lowrank_optim.SpectralLinear, lowrank_optim.SST, torch.bfloat16),
        "merge": message(both, lowrank_optim.merge, sparse),
        "kind": message(both, lowrank_optim.ReLoRA, sparse, rank=4),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(two, 2, str(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def alones():
    """The ends of runs in one process, and their tables."""
    found = {}
    for name in METHODS:
        for dtype in (torch.float64, torch.float32):
            model, optimizer = alone(name, dtype)
            train(model, optimizer)
            found[name, dtype] = model, optimizer.report()
    return found


def as_plain(name, state, dtype):
    """Whole weights of layers, however they are kept: those that are quantized by rows are compared by value."""
    if name not in QUANTIZED:
        return state
    _, how, exclude, width = options_of(name)
    model = lowrank_optim.convert(net(dtype, width), METHODS[name][0].layer, rank=4, **how, **exclude)
    model.load_state_dict(state)
    return lowrank_optim.merge(model).state_dict()


def merged(name, model):
    return copy.deepcopy(lowrank_optim.merge(model) if name in QUANTIZED else model).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name, results, alones):
    """Over three restarts."""
    end, gathered, reasons, kept = results[name]
    model, table = alones[name, torch.float64]
    assert apart(as_plain(name, end, torch.float64), merged(name, copy.deepcopy(model))) < 1e-9
    layers = sum(row.reason.count("restarts") for row in table)
    if name == "sst":  # at the end of the one round
        vectors = [shape for m, n in ((37, 18), (25, 37), (18, 25)) for shape in sizes(m, n)]
        assert gathered == vectors[: 3 * layers]
    else:
        assert gathered, "restarts have sent something"
        assert max(min(shape) for shape in gathered) <= USUAL["rank"], "and factors only"
    assert reasons[:layers] == [row.reason for row in table][:layers]
    if name != "lte-nf4":  # whose one head is on one rank
        assert all(0 < ours < row.state_bytes for ours, row in zip(kept[:layers], table, strict=False))


def sizes(m, n):
    k = min(m, n)
    return [(k, m), (k,), (k, n)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGING)
def test_two_processes_equal_one_in_float32(name, results, alones):
    """The others restart from singular vectors, which rounding turns where values are close."""
    model, _ = alones[name, torch.float32]
    assert apart(as_plain(name, results[name, "float32"], torch.float32), merged(name, copy.deepcopy(model))) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 3], ids=["before", "after"])
@pytest.mark.parametrize("way", ["2 to 1", "1 to 2"])
@pytest.mark.parametrize("name", SAVED)
def test_another_number_of_ranks_resumes(name, way, at, results):
    """Right before and after the restart that follows update 3: from torch's checkpoint, and from ours."""
    assert results["resumed"][name, way, at] < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_tensor_of_a_layer_is_sharded(name, results, alones):
    """The first rank has the larger half of each tensor, by rows: codes, vectors and indices too."""
    _, how, exclude, width = options_of(name)
    model = lowrank_optim.convert(net(torch.float64, width), METHODS[name][0].layer, rank=4, **how, **exclude)
    assert results[name, "here"] == sum(-(-len(p) // 2) * p.nbytes // len(p) for p in model.parameters())


@pytest.mark.slow
def test_a_lost_vector_is_restored(results):
    assert results["lost"] < 1e-12


@pytest.mark.slow
def test_codes_and_indices_are_not_cast(results):
    kinds = results["dtypes"]
    assert kinds["relora-nf4"]["base"] == torch.uint8
    assert kinds["sst"]["index"] == torch.int64
    assert kinds["relora-nf4"]["B"] == kinds["sst"]["U"] == torch.bfloat16


@pytest.mark.slow
def test_merged_weights_are_rounded_as_in_one_process(results):
    model = lowrank_optim.convert(net(torch.bfloat16), lowrank_optim.LowRankLinear, rank=4, alpha=7.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.125)
    for layer in (model[0], model[2]):
        layer.merge_(1)
    assert apart(results["bf16"], model.state_dict()) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("bare", "convert the bare model first .lowrank_optim.convert., then shard it, and make the optimizer last"),
        ("rank", "converted with rank=4, and ReLoRA got 3"),
        ("alpha", "converted with alpha=32.0, and ReLoRA got 5.0"),
        ("reset", 'Use reset="drop"'),
        ("include", "give it to convert"),
        ("none", "converted with base='none', and ReLoRA got 'dense'"),
        ("density", "converted with density=0.03, and SLTrain got 0.1"),
        ("codes", "Convert the bare model with base='nf4' and by_rows=True, and then shard it"),
        ("exact", "every process would keep the whole copy"),
        ("loqt", 'codes of a quantized base are integers. .*base="dense"'),
        ("heads", "every process has the factors of a different head"),
        ("heads of one", "converted with ranks=False, and LTE got True"),
        ("lte codes", "Convert the bare model with base='int8' and by_rows=True"),
        ("sigma", "MixedPrecisionPolicy.param_dtype=torch.bfloat16."),
        ("merge", "Save the full state dict"),
        ("kind", "which ReLoRA does not know"),
    ],
)
def test_refusals(what, said, results):
    assert re.search(said, results["refused"][what]), results["refused"][what]
