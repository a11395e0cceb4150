"""Promises of every method that changes how weights are stored, for every row of weight_cases.py."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim.layers.convert import converted
from lowrank_optim.recipe.weights import COMPENSATION
from tests.support.processes import spawn
from tests.support.saving import through_dcp, through_file, through_helpers
from tests.weight_cases import CONVERTED, WEIGHT_CASES, batch, every_case, every_variant, loss_of, net, train

OVERWRITING = [case for case in WEIGHT_CASES if case.name in ("relora", "low_rank", "sltrain")]
PLAIN_LINEARS = {name for name, module in net().named_modules() if isinstance(module, nn.Linear)}


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


# -- conversion and back -----------------------------------------------------------------------------------------------


@every_case
def test_converts_what_param_groups_would_project_and_nothing_else(case):
    model = net()
    case.build(model)
    assert {name for name, _ in converted(model)} == {*CONVERTED, "second"}
    assert isinstance(model.frozen, nn.Linear)
    assert isinstance(model.gate, nn.Linear)
    assert model.lm_head.weight is model.embed.weight


@every_case
def test_conversion_keeps_the_function(case):
    model, tokens = net(torch.float64), batch(0)
    before = model(tokens)
    case.build(model)
    assert torch.allclose(model(tokens), before, atol=1e-12) == case.keeps


@pytest.mark.few(options=({},))
@every_variant
def test_merge_gives_back_the_architecture_and_the_function(case, options):
    model, tokens = net(torch.float64), batch(0)
    names, bias = list(model.state_dict()), model.up.bias
    train(model, case.build(model, **options), 5)
    model.eval()
    before = model(tokens)
    assert lowrank_optim.merge(model) is model
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == PLAIN_LINEARS
    assert list(model.state_dict()) == names
    assert model.up.bias is bias
    assert model.second.weight is model.first.weight
    assert model.second.bias is not model.first.bias
    assert all(p.requires_grad for p in model.up.parameters())
    assert (model(tokens) - before).abs().max() < 1e-12
    net(torch.float64).load_state_dict(model.state_dict())


@every_case
def test_shared_weights_stay_shared(case):
    model = net()
    train(model, case.build(model), 4)
    assert model.first.leader is model.second.leader
    assert model.first.bias is not model.second.bias
    assert torch.equal(model.first.dense(), model.second.dense())


@every_case
def test_a_failed_construction_leaves_the_model_as_it_was(case):
    model = net()
    before = copy.deepcopy(model.state_dict())
    for broken in (dict(lr=-1), dict(seed=-1), dict(nonfinite="stop"), dict(strict=True), dict(fused=True)):
        with pytest.raises(ValueError):
            case.build(model, **broken)
    with pytest.raises(ValueError, match="no_such"):
        case.build(model, include=["no_such"])
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == PLAIN_LINEARS
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@every_case
def test_errors_say_the_way_out(case):
    with pytest.raises(TypeError, match="takes the model"):
        case.build(list(net().parameters()))
    model = net()
    case.build(model)
    with pytest.raises(ValueError, match=r"converted already.*merge"):
        case.build(model)
    with pytest.raises(ValueError, match="quantized"):
        case.build(lowrank_optim.quantize_weights(net()))
    with pytest.raises(ValueError, match="Lower `rank`"):
        case.build(net(), rank=24)
    with pytest.raises(ValueError, match="nothing to convert"):
        case.build(nn.Sequential(nn.Embedding(30, 20)))
    with pytest.raises(ValueError, match="in place"):
        case.build(nn.Linear(20, 20))
    with pytest.raises(ValueError, match="wrap it then"):
        case.build(torch.compile(net()))
    hooked = net()
    hooked.up.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="up has hooks"):
        case.build(hooked)
    broken = net()
    broken.up.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        case.build(broken)
    with pytest.raises(ValueError, match="capturable"):
        case.build(net(), capturable=True)
    with pytest.raises(ValueError, match="rank"):
        case.build(net(), rank=None)
    with pytest.raises(ValueError, match="rank"):
        case.build(net()).add_param_group({"params": [("extra", nn.Parameter(torch.ones(20, 20)))], "rank": 3})


@every_case
def test_random_numbers_depend_on_seed_and_name_alone(case):
    first, second, other = net(), net(), net()
    state = torch.get_rng_state()
    a, b, c = case.build(first), case.build(second), case.build(other, seed=5)
    for model, optimizer in ((first, a), (second, b), (other, c)):
        train(model, optimizer, 4)
    assert torch.equal(torch.get_rng_state(), state)
    same(first, second)
    assert torch.equal(first.up.weight, other.up.weight) != case.draws


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(options=({},))
@every_variant
def test_learns_over_many_restarts(case, options):
    model = net()
    tokens, optimizer = batch(0), case.build(model, **options)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.stats()["restarts"] >= 4 * len(CONVERTED)


@pytest.mark.few(options=({},))
@every_variant
def test_the_first_update_after_a_restart_is_not_longer_than_lr(case, options):
    model, lr = net(), 0.013
    optimizer = case.build(model, lr=lr, weight_decay=0.0, betas=(0.9, 0.999), **options)
    for step in range(4 * case.period + 1):
        before = {
            name: (layer, {key: getattr(layer, key).clone() for key in layer.factors if key not in case.retracted})
            for name, layer in converted(model)
        }
        restarts = optimizer.stats()["restarts"]
        train(model, optimizer, 1, first=step)
        if step % case.period == 0 and step and optimizer.stats()["restarts"] == restarts:
            for name, (layer, old) in before.items():
                for key, x in old.items():
                    assert (getattr(layer, key) - x).abs().max() <= 1.05 * lr, name


@pytest.mark.few(options=({},))
@every_variant
def test_step_in_backward_is_the_same_optimizer(case, options):
    plain, other = net(), net()
    ours, theirs = case.build(plain, **options), case.build(other, **options)
    lowrank_optim.step_in_backward(other, theirs)
    train(plain, ours, 2 * case.period + 2)
    train(other, theirs, 2 * case.period + 2)
    same(plain, other)
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.cpus
@pytest.mark.parametrize("case", [case for case in WEIGHT_CASES if not case.splits], ids=lambda case: case.name)
def test_gradients_accumulate_over_micro_batches(case):
    whole, parts = net(torch.float64), net(torch.float64)
    ours, theirs = case.build(whole), case.build(parts)
    for step in range(2 * case.period + 1):
        ours.zero_grad(), theirs.zero_grad()
        loss_of(whole, batch(step)).backward()
        for part in batch(step).chunk(2):
            (loss_of(parts, part) / 2).backward()
        ours.step(), theirs.step()
    for (name, x), (_, y) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-8), name


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("foreach", [False, True])
def test_foreach_and_compile_change_nothing_but_rounding(case, foreach):
    plain, other = net(torch.float64), net(torch.float64)
    ours, theirs = case.build(plain, foreach=False), case.build(other, foreach=foreach)
    if not foreach:
        theirs.compile(backend="eager")
    train(plain, ours, 2 * case.period + 1)
    train(other, theirs, 2 * case.period + 1)
    for (name, x), (_, y) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-9), name


@every_case
def test_maximize_ascends(case):
    model = net()
    optimizer = case.build(model, maximize=True)
    losses = train(model, optimizer, 6)
    assert losses[-1] > losses[0]


@every_case
def test_a_gradient_that_is_not_finite_costs_one_update_of_one_layer(case):
    model, twin = net(), net()
    optimizer, reference = case.build(model), case.build(twin)
    for one in (model, twin):
        train(one, optimizer if one is model else reference, 1)
    optimizer.zero_grad()
    loss_of(model, batch(1)).backward()
    for p in model.up.parameters():
        if p.grad is not None:
            p.grad.fill_(torch.nan)
    with pytest.warns(UserWarning, match="non-finite"):
        optimizer.step()
    train(twin, reference, 1, first=1)
    assert torch.equal(model.square.dense(), twin.square.dense())
    train(model, optimizer, 2 * case.period, first=2)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    row = next(row for row in optimizer.report() if row.name == "up")
    assert row.skipped == 1


@every_case
def test_a_first_step_on_zeros_and_layers_without_gradients_change_nothing(case):
    model = net()
    optimizer = case.build(model)
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(2 * case.period):
        optimizer.step()
    for name, x in model.state_dict().items():
        assert not isinstance(x, torch.Tensor) or torch.equal(x, before[name]), name
    assert optimizer.stats()["restarts"] == 0


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_train(case, dtype):
    model = net(dtype)
    optimizer = case.build(model, bf16_update="kahan" if dtype == torch.float16 else "stochastic", eps=1e-4)
    losses = train(model, optimizer, 3 * case.period)
    assert losses[-1] < losses[0]
    assert model.up.leader.dtype == dtype
    assert model(batch(0)).dtype == dtype


@pytest.mark.few(options=({},))
@every_variant
def test_autocast(case, options):
    model = net()
    optimizer = case.build(model, **options)
    losses = []
    for _ in range(3 * case.period):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(0))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())


@every_case
def test_gradient_scaler(case):
    plain, scaled = net(torch.float64), net(torch.float64)
    ours, theirs = case.build(plain), case.build(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(2 * case.period):
        ours.zero_grad(), theirs.zero_grad()
        loss_of(plain, batch(step)).backward()
        scaler.scale(loss_of(scaled, batch(step))).backward()
        ours.step()
        scaler.step(theirs)
        scaler.update()
    for (name, x), (_, y) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-8), name


# -- checkpoints -------------------------------------------------------------------------------------------------------

DTYPES = [
    dict(dtype=torch.float32),
    dict(dtype=torch.bfloat16),
    dict(dtype=torch.bfloat16, state_dtype="bfloat16", bf16_update="kahan"),
    dict(dtype=torch.float32, state_dtype="int8"),
]


@pytest.mark.thin
@pytest.mark.few(options=({},))
@every_variant
@pytest.mark.parametrize("kept", DTYPES, ids=lambda kept: "-".join(str(v).replace("torch.", "") for v in kept.values()))
def test_resumes_bit_for_bit_around_a_restart(case, options, kept, tmp_path):
    kept = dict(kept)
    dtype = kept.pop("dtype")
    for done in (case.period - 1, case.period, case.period + 1):
        model = net(dtype)
        optimizer = case.build(model, **options, **kept)
        train(model, optimizer, done)
        again = net(dtype, seed=1)
        resumed = case.build(again, **options, **kept)
        through_file(model, optimizer, again, resumed, tmp_path)
        train(model, optimizer, case.period + 2, first=done)
        train(again, resumed, case.period + 2, first=done)
        same(model, again)


@every_case
@pytest.mark.parametrize("way", [through_helpers, through_dcp], ids=lambda way: way.__name__)
def test_resumes_by_the_ways_of_torch(case, way, tmp_path):
    model, again = net(), net(seed=1)
    optimizer, resumed = case.build(model), case.build(again)
    train(model, optimizer, case.period + 1)
    way(model, optimizer, again, resumed, tmp_path)
    train(model, optimizer, case.period + 1, first=4)
    train(again, resumed, case.period + 1, first=4)
    same(model, again)


@pytest.mark.few(options=({},))
@every_variant
def test_copies_and_pickles(case, options):
    model = net()
    optimizer = case.build(model, **options)
    train(model, optimizer, case.period + 1)
    copied = copy.deepcopy((model, optimizer))
    file = io.BytesIO(pickle.dumps((model, optimizer)))
    pickled = pickle.loads(file.getvalue())
    train(model, optimizer, case.period + 1, first=5)
    for other, resumed in (copied, pickled):
        train(other, resumed, case.period + 1, first=5)
        same(model, other)


@every_case
def test_a_state_that_does_not_fit_changes_nothing(case):
    model = net()
    optimizer = case.build(model)
    train(model, optimizer, 2)
    other = net()
    wrong = case.build(other, rank=5)
    train(other, wrong, 1)
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(ValueError, match="nothing was loaded"):
        wrong.load_state_dict(optimizer.state_dict())
    after = wrong.state_dict()
    for key, state in before["state"].items():
        assert all(torch.equal(x, after["state"][key][name]) for name, x in state.items())


# -- what a user sees --------------------------------------------------------------------------------------------------


@pytest.mark.few(options=({},))
@every_variant
def test_report_has_a_row_for_every_layer_and_parameter(case, options):
    model = net()
    optimizer = case.build(model, **options)
    train(model, optimizer, case.period + 1)
    rows = {row.name: row for row in optimizer.report()}
    for name, shape in CONVERTED.items():
        assert rows[name].shape == shape
        assert rows[name].rank == options.get("rank", 4)
        assert rows[name].method == case.make.__name__
        assert "restart" in rows[name].reason
    assert "too" in rows["gate.weight"].reason or "below 16" in rows["gate.weight"].reason
    assert rows["norm.weight"].reason == "a vector or scalar"
    total = sum(row.state_bytes for row in rows.values())
    counters = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert total == counters or (case.name == "loqt" and total <= counters)
    assert f"{len(CONVERTED)} of" in str(optimizer.report())


@pytest.mark.few(options=({},))
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimated_bytes_are_those_kept(case, options, dtype):
    model = net(dtype)
    estimate = lowrank_optim.estimate_memory(net(dtype), case.make, **{**case.common, **case.kwargs, **options})
    optimizer = case.build(model, **options)
    train(model, optimizer, 1)
    tensors = {*model.parameters(), *model.buffers()}
    weights = sum(x.stored_bytes() if hasattr(x, "stored_bytes") else x.nbytes for x in tensors)
    assert estimate.weights == weights
    assert estimate.optimizer == sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert estimate.gradients >= sum(p.nbytes for layer in (model.up, model.down) for p in [layer.leader])
    with torch.device("meta"):
        bare = type(model)()
    assert lowrank_optim.estimate_memory(
        bare, case.make, dtype=dtype, **{**case.common, **case.kwargs, **options}
    ).total == estimate.total  # fmt: skip


@every_case
def test_memory_report_runs(case):
    model = net()
    optimizer = case.build(model)
    train(model, optimizer, 2)
    report = lowrank_optim.memory_report(model, optimizer, step=lambda: train(model, optimizer, 1))
    dense = sum(m * n for m, n in CONVERTED.values())
    rest = sum(p.numel() for group in optimizer.param_groups[1:3] for p in group["params"])
    assert report["weights"].adamw == report["gradients"].adamw == 4 * (dense + rest)
    assert report["optimizer"].adamw == 2 * 4 * (dense + rest) + 4 * (len(CONVERTED) + 9)
    assert report["frozen weights"].adamw == sum(p.nbytes for p in model.frozen.parameters())
    assert report["optimizer"].measured == report["optimizer"].predicted
    text = " ".join(report.reasons)
    assert "projected" not in text
    assert "quantize_weights" not in text
    assert "Embeddings and heads are not converted" in text or case.name == "lte"


@every_case
def test_weight_can_be_read_where_modules_read_it(case):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "embed": nn.Embedding(11, 32)})
    optimizer = case.build(model)
    x = model["embed"](torch.arange(10).view(2, 5))
    before = case.keeps and attention(x, x, x)[0].detach()
    assert not case.keeps or torch.allclose(attention(x, x, x)[0], before)
    for _ in range(2):
        x = model["embed"](torch.arange(10).view(2, 5))
        attention(x, x, x)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("case", OVERWRITING, ids=lambda case: case.name)
def test_factors_that_a_restart_overwrites_owe_nothing(case):
    """To what they were: Kahan's compensation is the rest of a rounding that is no longer there."""
    model = net(torch.bfloat16)
    optimizer = case.build(model, bf16_update="kahan")
    for steps, owing in ((case.period - 1, True), (1, False)):
        train(model, optimizer, steps)
        for _, layer in converted(model):
            for p in (layer.B, layer.A):
                assert bool(optimizer.state[p][COMPENSATION].any()) is owing


# -- data parallel -----------------------------------------------------------------------------------------------------


def _rank(rank, world, folder):
    for case, same in [(case, same) for case in WEIGHT_CASES for same in (True, False)]:
        model = net(torch.float64, seed=0 if same else rank)
        optimizer = case.build(model)
        wrapped = DistributedDataParallel(model)
        for step in range(2 * case.period + 2):
            optimizer.zero_grad()
            loss_of(wrapped, batch(step).chunk(world)[rank]).backward()
            optimizer.step()
        torch.save(model.state_dict(), f"{folder}/{case.name}.{same}.{rank}.pt")


@pytest.mark.cpus
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    spawn(_rank, 2, str(tmp_path))
    for case in WEIGHT_CASES:
        model = net(torch.float64)
        train(model, case.build(model), 2 * case.period + 2)
        first, second = (torch.load(tmp_path / f"{case.name}.False.{rank}.pt") for rank in (0, 1))
        for name, x in first.items():
            assert torch.equal(second[name], x), f"{case.name}: {name} stays as each rank had drawn it"
        first, second = (torch.load(tmp_path / f"{case.name}.True.{rank}.pt") for rank in (0, 1))
        for name, x in model.state_dict().items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(first[name], second[name]), f"{case.name}: {name} differs between ranks"
                equal = case.splits or torch.allclose(first[name], x, atol=1e-8)
                assert equal, f"{case.name}: {name} differs from one process"
