"""full_state and load_full_state: state moves between wrappers and numbers of processes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import lowrank_optim
from lowrank_optim import full_state, load_full_state
from tests.cases import CASES, Net, every_case, train
from tests.support.processes import message, spawn
from tests.support.selection import FEW
from tests.support.wrapped import apart, build, equal, steps, weights
from tests.weight_cases import WEIGHT_CASES, net
from tests.weight_cases import train as train_net

OPTIONS = [
    {"moments": "rotate"},
    {"dtype": torch.bfloat16, "bf16_update": "kahan", "state_dtype": "bfloat16"},
    {"state_dtype": "int8", "stagger": False},
]
GALORE = next(case for case in CASES if case.name == "galore_adamw")


def through_file(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_process_resumes_bit_for_bit(case, options, tmp_path):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    model, twin = Net().to(dtype), Net().to(dtype)
    optimizer, other = (case.build(m.named_parameters(), **options) for m in (model, twin))
    train(model, optimizer, 9)
    optimizer.param_groups[0]["lr"] *= 0.5
    state = through_file(full_state(optimizer), tmp_path)
    twin.load_state_dict(model.state_dict())
    load_full_state(other, state)
    assert equal(full_state(other), state)
    assert train(model, optimizer, 7, 9) == train(twin, other, 7, 9)


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=lambda case: case.name)
def test_methods_that_convert_a_model(case, tmp_path):
    model, twin = net(), net(seed=1)
    optimizer, other = case.build(model), case.build(twin)
    train_net(model, optimizer, 5)
    state = through_file(full_state(optimizer), tmp_path)
    twin.load_state_dict(model.state_dict())
    load_full_state(other, state)
    assert train_net(model, optimizer, 6, 5) == train_net(twin, other, 6, 5)


def test_groups_keep_their_numbers_whatever_their_order():
    model, twin = Net(), Net()

    def build(m, turn):
        named = list(m.named_parameters())
        groups = [{"params": named[:4], "lr": 0.1}, {"params": named[4:], "weight_decay": 0.3}]
        return GALORE.build(groups[::turn], rank=2)

    optimizer, other = build(model, 1), build(twin, -1)
    train(model, optimizer, 5)
    twin.load_state_dict(model.state_dict())
    load_full_state(other, full_state(optimizer))
    assert [group["lr"] for group in other.param_groups] == [GALORE.kwargs["lr"], 0.1]
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, GALORE.kwargs["weight_decay"]]
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        for key, x in optimizer.state[q].items():
            assert torch.equal(other.state[p][key], x), (name, key)


def test_a_full_state_is_a_copy():
    """Copies: neither does training change a state that was taken, nor one that was loaded."""
    model = Net()
    optimizer = GALORE.build(model.named_parameters())
    train(model, optimizer, 3)
    state = full_state(optimizer)
    before = copy.deepcopy(state)
    train(model, optimizer, 2)
    load_full_state(optimizer, state)
    train(model, optimizer, 2)
    assert equal(state, before)


def test_a_parameter_that_was_frozen_has_no_state():
    model, twin = Net(), Net()
    model.square.requires_grad_(False)
    optimizer, other = GALORE.build(model.named_parameters()), GALORE.build(twin.named_parameters())
    train(model, optimizer, 3)
    state = full_state(optimizer)
    assert "square.weight" not in state["state"]
    load_full_state(other, state)
    assert other.state[twin.square.weight]["step"] == 0
    assert other.state[twin.up.weight]["step"] == 3


class Renamed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: None, r"expected the keys .*got 'NoneType'"),
        (lambda s: s["state"], r"expected the keys .*Was it made by full_state"),
        (lambda s: {**s, "format": 2}, "it has format 2, and this version reads 1"),
        (lambda s: {**s, "method": "FiraAdamW"}, "it is of FiraAdamW, and this optimizer is GaLoreAdamW"),
        (lambda s: renamed(s, "up.bias", "up.b"), "it has nothing for up.bias"),
        (lambda s: {**s, "groups": [*s["groups"], {"names": ["new"]}]}, "no parameter here is called new"),
        (lambda s: halved(s), "its groups differ: .* are one group here"),
        (lambda s: with_state(s, "up.weight", "basis", torch.ones(2, 2)), r"fit up.weight: basis is \(2, 2\)"),
        (lambda s: with_state(s, "norm.weight", "more", torch.zeros(2)), "fit norm.weight: more on one"),
    ],
)  # fmt: skip
def test_a_full_state_that_does_not_fit_is_refused_whole(edit, said):
    model = Net()
    optimizer = GALORE.build(model.named_parameters())
    train(model, optimizer, 3)
    state = edit(full_state(optimizer))
    train(model, optimizer, 1)
    before = full_state(optimizer)
    with pytest.raises(ValueError, match=said) as error:
        load_full_state(optimizer, state)
    assert "nothing was loaded" in str(error.value)
    assert equal(full_state(optimizer), before)


def renamed(state, old, new):
    (group,) = state["groups"]
    return {**state, "groups": [{**group, "names": [new if name == old else name for name in group["names"]]}]}


def halved(state):
    (group,) = state["groups"]
    return {**state, "groups": [{**group, "names": group["names"][:3]}, {**group, "names": group["names"][3:]}]}


def with_state(state, name, key, tensor):
    return {**state, "state": {**state["state"], name: {**state["state"][name], key: tensor}}}


def test_two_parameters_of_one_name():
    params = [("w", nn.Parameter(torch.randn(8, 6))), ("module.w", nn.Parameter(torch.randn(8, 6)))]
    with pytest.raises(ValueError, match="two parameters are called w"):
        full_state(lowrank_optim.GaLoreAdamW(params, rank=2))


def test_another_optimizer_is_refused():
    other = torch.optim.AdamW([nn.Parameter(torch.randn(8, 6))])
    for call in (full_state, lambda optimizer: load_full_state(optimizer, {})):
        with pytest.raises(TypeError, match=r"an optimizer of lowrank_optim, got AdamW.* not engine.optimizer"):
            call(other)


# -- several processes -------------------------------------------------------------------------------------------------


METHODS = ("galore_adamw", "fira", "flora", "ldadam")
FIRST, SECOND, LAST = 6, 11, 16  # refreshes before steps 0, 7 and 14


def two(rank, world, folder):
    for case in CASES:
        if case.name in METHODS:
            for kind in ("ddp", "shards", "hybrid"):
                model, optimizer = build(case, kind)
                steps(model, optimizer, 0, FIRST, rank, world)
                state, whole = full_state(optimizer), weights(model)
                assert (state is None) == (rank > 0)
                # the same number of processes resumes bit for bit, from rank 0 alone
                twin, other = build(case, kind)
                set_model_state_dict(
                    twin.module if kind == "ddp" else twin,
                    dict(whole) if rank == 0 else {},  # into which torch puts DTensors
                    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
                )
                load_full_state(other, state)
                again = full_state(other)
                steps(model, optimizer, FIRST, SECOND, rank, world)
                steps(twin, other, FIRST, SECOND, rank, world)
                ends = weights(model), weights(twin)
                if rank == 0:
                    torch.save((state, whole, again, ends), f"{folder}/{case.name}.{kind}.pt")
    found = refusals(rank)
    if rank == 0:
        torch.save(found, f"{folder}/refusals.pt")


def refusals(rank):
    found = {}
    model, optimizer = build(GALORE, "ddp")
    steps(model, optimizer, 0, 2)
    state = full_state(optimizer)
    found["none on rank 0"] = message(ValueError, load_full_state, optimizer, {} if rank else None)
    found["misfit"] = message(ValueError, load_full_state, optimizer, None if rank else {**state, "format": 0})
    next(iter(optimizer.state.values()))["exp_avg"].add_(rank)
    found["ranks differ"] = message(RuntimeError, full_state, optimizer)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    spawn(two, 2, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "shards", "hybrid"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_resume_as_two_and_as_one(name, kind, folder):
    case = next(case for case in CASES if case.name == name)
    state, whole, again, (end, twin) = torch.load(folder / f"{name}.{kind}.pt", weights_only=True)
    assert equal(state, again)
    assert apart(end, twin) == 0
    model, optimizer = build(case, "one", whole)
    load_full_state(optimizer, state)
    assert equal(full_state(optimizer), state), "whole tensors of equal bits"
    steps(model, optimizer, FIRST, SECOND)
    assert apart(end, model.state_dict()) < 1e-6


@pytest.mark.slow
def test_all_ranks_say_what_does_not_fit(folder):
    for found in torch.load(folder / "refusals.pt"):
        assert "rank 0 was given None; nothing was loaded" in found["none on rank 0"]
        assert "it has format 0" in found["misfit"]
        assert re.search(r"different state \(exp_avg of embed.weight", found["ranks differ"])


def three(rank, world, folder):
    """Every rank reads what one process has left."""
    for case in CASES:
        if case.name in METHODS:
            state, whole = torch.load(f"{folder}/{case.name}.one.pt", weights_only=True)
            for kind in ("ddp", "shards"):
                model, optimizer = build(case, kind, whole)
                load_full_state(optimizer, state)
                again = full_state(optimizer)
                steps(model, optimizer, SECOND, LAST, rank, world)
                end = weights(model)
                if rank == 0:
                    torch.save((equal(state, again), end), f"{folder}/{case.name}.{kind}.three.pt")


@pytest.mark.slow
def test_from_two_to_one_to_three(folder):
    for name in METHODS:
        case = next(case for case in CASES if case.name == name)
        state, whole, *_ = torch.load(folder / f"{name}.shards.pt", weights_only=True)
        model, optimizer = build(case, "one", whole)
        load_full_state(optimizer, state)
        steps(model, optimizer, FIRST, SECOND)
        torch.save((full_state(optimizer), model.state_dict()), folder / f"{name}.one.pt")
    spawn(three, 3, str(folder))
    for name in METHODS:
        case = next(case for case in CASES if case.name == name)
        model, optimizer = build(case, "one")
        steps(model, optimizer, 0, LAST)  # undisturbed, in one process
        for kind in ("ddp", "shards"):
            same, end = torch.load(folder / f"{name}.{kind}.three.pt", weights_only=True)
            assert same
            assert apart(end, model.state_dict()) < 1e-6, (name, kind)
