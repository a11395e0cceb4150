"""Runs that are saved and loaded continue bit for bit, for every dtype and way, and a failed load changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import lowrank_optim
from tests.cases import Net, every_case, ranked, train
from tests.support.saving import through_dcp, through_file, through_helpers
from tests.support.selection import FEW


def through_flat_helpers(*args):
    through_helpers(*args, flatten_optimizer_state_dict=True)


WAYS = [through_file, through_helpers, through_flat_helpers, through_dcp]
OPTIONS = [
    dict(dtype=torch.float32),
    dict(dtype=torch.bfloat16, bf16_update="stochastic"),
    dict(dtype=torch.bfloat16, bf16_update="kahan", state_dtype="bfloat16", moments="rotate"),
    dict(dtype=torch.bfloat16, bf16_update="none", moments="reset", proj_type="full"),
    dict(dtype=torch.float64, basis="svd", stagger=False),
]


@every_case
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(str(v).replace("torch.", "") for v in o.values()))
@pytest.mark.parametrize("at", [5, 7], ids=["inside a window", "right before a refresh"])
def test_resume_is_bit_exact(case, way, options, at, tmp_path):
    options = dict(options)
    dtype = options.pop("dtype")
    model, model2 = Net().to(dtype), Net().to(dtype)
    optimizer = case.build(model.named_parameters(), **options)
    train(model, optimizer, at)
    optimizer2 = case.build(model2.named_parameters(), **options)
    way(model, optimizer, model2, optimizer2, tmp_path)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            other = optimizer2.state[q][key]
            assert other.dtype == value.dtype, key
            assert torch.equal(other, value), key
            assert other.data_ptr() != value.data_ptr(), "two optimizers must not share a counter"
    assert train(model, optimizer, 10, at) == train(model2, optimizer2, 10, at)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.few(case=FEW)
@every_case
def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(case):
    """torch's helper steps an optimizer that has no state; a basis from that step would stay for a whole interval."""
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [case.build(model.named_parameters()) for model in models]
    get_optimizer_state_dict(models[0], optimizers[0])
    assert train(models[0], optimizers[0], 9) == train(models[1], optimizers[1], 9)


@pytest.mark.few(case=FEW)
@every_case
def test_loading_onto_an_optimizer_that_has_trained(case):
    model, model2 = Net(), Net()
    optimizer, optimizer2 = case.build(model.named_parameters()), case.build(model2.named_parameters())
    train(model, optimizer, 3)
    train(model2, optimizer2, 8)
    through_file(model, optimizer, model2, optimizer2, None)
    assert train(model, optimizer, 5, 3) == train(model2, optimizer2, 5, 3)


@pytest.mark.few(case=FEW)
@every_case
def test_hooks_of_a_state_dict_still_run(case):
    model = Net()
    optimizer, seen = case.build(model.named_parameters()), []
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    halved = copy.deepcopy(saved)
    for group in halved["param_groups"]:
        group["lr"] = 1e-5
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append("pre") or halved)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(float(next(iter(opt.state.values()))["step"])))
    optimizer.load_state_dict(state_dict=saved)
    assert seen == ["pre", 2.0], "once each, the second with the state in place"
    assert optimizer.param_groups[0]["lr"] == 1e-5
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.few(case=FEW)
@ranked
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(rank=2), r"does not fit .*: \w+ is \(.*\), expected \(.*\b2\b.*\); nothing was loaded"),
        (dict(bf16_update="kahan"), r"does not fit embed.weight: compensation on one side only; nothing was loaded"),
    ],
)
def test_state_that_does_not_fit_is_refused_whole(case, other, message):
    model, model2 = Net().bfloat16(), Net().bfloat16()
    optimizer, optimizer2 = (
        case.build(model.named_parameters(), rank=4),
        case.build(model2.named_parameters(), **{"rank": 4, **other}),
    )
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:  # as if only the tensors were from elsewhere
        group.update({key: optimizer2.param_groups[0][key] for key in other})
    before = copy.deepcopy(optimizer2.state_dict())
    match = message.replace("embed.weight", r"\S+")
    with pytest.raises(ValueError, match=match):
        optimizer2.load_state_dict(saved)
    after = optimizer2.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())
    train(model2, optimizer2, 2)


def test_a_state_dict_of_adamw_is_refused():
    model = Net()
    adamw = torch.optim.AdamW(model.parameters())
    optimizer = lowrank_optim.GaLoreAdamW(model.parameters())
    with pytest.raises(ValueError, match="the state dict holds no state; nothing was loaded"):
        optimizer.load_state_dict(adamw.state_dict())
    train(model, adamw, 1)
    with pytest.raises(ValueError, match=r"does not fit param \d+: .* on one side only; nothing was loaded"):
        optimizer.load_state_dict(adamw.state_dict())
    train(model, optimizer, 1)


@pytest.mark.few(case=FEW)
@every_case
def test_a_checkpoint_from_before_unfreezing(case):
    model, model2 = Net(), Net()
    model.square.requires_grad_(False)
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, 4)
    optimizer2 = case.build(model2.named_parameters())
    through_file(model, optimizer, model2, optimizer2, None)
    assert optimizer2.state[model2.square.weight]["step"] == 0
    train(model2, optimizer2, 2)


@pytest.mark.few(case=FEW)
@every_case
def test_a_hook_that_raises_leaves_everything(case):
    model, model2 = Net(), Net()
    optimizer, optimizer2 = case.build(model.named_parameters()), case.build(model2.named_parameters())
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    saved["extra"] = 1

    def fail(_):
        raise RuntimeError("no")

    optimizer2.register_load_state_dict_pre_hook(lambda opt, state: state.pop("extra") and None)
    handle = optimizer2.register_load_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        optimizer2.load_state_dict(saved)
    assert "extra" in saved, "a hook gets a copy, as in torch"
    assert all(not state["step"] for state in optimizer2.state.values())
    handle.remove()
    optimizer2.load_state_dict(saved)
    assert all(state["step"] == 3 for state in optimizer2.state.values())


@pytest.mark.few(case=FEW)
@every_case
def test_loaded_groups_are_checked(case):
    model = Net()
    optimizer = case.build(model.named_parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["update_proj_gap"] = 0
    with pytest.raises(ValueError, match="update_proj_gap must be an int >= 1, got 0"):
        optimizer.load_state_dict(saved)
    train(model, optimizer, 1)


@pytest.mark.few(case=FEW)
@every_case
def test_a_meta_model_can_be_loaded(case):
    model = Net()
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, 3)
    with torch.device("meta"):
        twin = Net()
    optimizer2 = case.build(twin.named_parameters())
    optimizer2.load_state_dict(optimizer2.state_dict())
    optimizer2.load_state_dict(optimizer.state_dict())
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        torch.utils.swap_tensors(p, torch.nn.Parameter(q.detach().clone()))
    twin.lm_head.weight = twin.embed.weight
    assert train(twin, optimizer2, 4, 3) == train(model, optimizer, 4, 3)
