"""Changes that a user may make to a converted model, and the promises that still hold after them."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lowrank_optim
from lowrank_optim import LoQT, ReLoRA, ops
from tests.weight_cases import batch, every_case, loss_of, net, train

OPTIONS = dict(rank=4, lr=0.01)


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.mark.few(case=("relora", "loqt"))
@every_case
def test_the_plain_layers_are_let_go(case):
    model = net()
    plain = weakref.ref(model.up)
    optimizer = case.build(model)
    gc.collect()
    assert plain() is None, f"{type(optimizer).__name__} keeps all dense weights in memory"


@every_case
def test_layers_that_share_a_weight_have_hooks_of_their_own(case):
    model, seen = net(), []
    case.build(model)
    model.first.register_forward_hook(lambda *_: seen.append("first"))
    model.second(torch.ones(2, 24))
    assert not seen


@pytest.mark.parametrize("pattern", ["first", "second"])
def test_patterns_reach_a_shared_weight_by_all_its_names(pattern):
    model = lowrank_optim.convert(net(), rank=4, exclude=[pattern])
    assert type(model.first) is type(model.second) is nn.Linear
    model = lowrank_optim.convert(net(), rank=4, include=[rf"{pattern}\.weight"])
    assert model.first.leader is model.second.leader


def test_a_model_whose_layers_are_of_another_class_says_so():
    with pytest.raises(ValueError, match="Conv1D"):
        ReLoRA(nn.ModuleDict({"embed": nn.Embedding(30, 20), "lm_head": nn.Linear(20, 30)}))


@every_case
def test_state_dicts_hold_tensors_only(case):
    model = net()
    case.build(model)
    assert all(isinstance(x, torch.Tensor) for x in model.state_dict().values())


def test_uniform_numbers_never_reach_one(monkeypatch):
    words = torch.tensor([0, 0xFFFFFFFF])
    monkeypatch.setattr(ops.reference.random, "philox", lambda *_: [words] * 4)
    x = torch.empty(8)
    ops.reference.philox_uniform_(x, 1, 2, 3)
    assert 0 < x.min() < x.max() < 1
    assert x.min() == 1 - x.max(), "midpoints of equal cells"


# -- exact bases -------------------------------------------------------------------------------------------------------


def exact(seed=0, dtype=torch.float32, **options):
    model = net(dtype, seed=seed)
    return model, ReLoRA(model, merge_every=2, base="nf4", exact_base=True, **OPTIONS, **options)


def test_an_exact_base_is_exact_whatever_the_dtype_of_the_model():
    model, _ = exact(dtype=torch.bfloat16)
    layer, start = model.up, model.up.exact.clone()
    for count in range(1, 201):
        layer.A.data.fill_(1e-3)
        layer.B.data.fill_(1e-3)
        layer.merge_(count)
    moved = 200 * layer.scale * 4 * float(layer.A.new_tensor(1e-3)) ** 2
    torch.testing.assert_close(layer.exact - start, torch.full_like(start, moved), rtol=1e-3, atol=0)


def test_an_exact_base_is_loaded_strictly():
    model, optimizer = exact()
    train(model, optimizer, 3)
    other, _ = exact(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.up.exact, model.up.exact)
    assert other.first.exact is other.second.exact
    plain = net()
    ReLoRA(plain, base="nf4", **OPTIONS)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up\.exact"):
        plain.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.exact"):
        other.load_state_dict(plain.state_dict())
    other.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(other.up.exact, plain.up.base.unpack()), "a merge would bring another model's weight back"


# -- LoQT: which gradients count ---------------------------------------------------------------------------------------


def loqt(model=None, **options):
    model = net() if model is None else model
    return model, LoQT(model, **{**OPTIONS, "update_proj_gap": 3, "gap_growth": 1, "stagger": False, **options})


@pytest.mark.parametrize("base", ["nf4", "int8", "dense"])
def test_a_weight_that_is_read_and_not_called_still_takes_subspaces(base):
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    model, optimizer = loqt(nn.ModuleDict({"attention": attention, "embed": nn.Embedding(11, 32)}), base=base)
    for _ in range(2):
        x = model["embed"](torch.arange(10).view(2, 5))
        attention(x, x, x)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert attention.out_proj.B.abs().max() > 0
    assert optimizer.stats()["restarts"] == 1


def test_raise_leaves_nothing_half_updated():
    for step in (0, 1):
        model, optimizer = loqt(nonfinite="raise")
        train(model, optimizer, step)
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        bad = model.square.base if step == 0 else model.norm.weight
        bad.grad.view(-1)[0] = math.inf
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        with pytest.raises(FloatingPointError):
            optimizer.step()
        after = model.state_dict(), optimizer.state_dict()["state"]
        assert all(torch.equal(x, after[0][name]) for name, x in before[0].items())
        for key, state in before[1].items():
            assert all(torch.equal(x, after[1][key][name]) for name, x in state.items())
        train(model, optimizer, 1, first=step)


def test_whole_gradients_do_not_outlive_their_step():
    model, optimizer = loqt()
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch(step)).backward()
        assert (model.up.base.grad is not None) == (step in (0, 3))
        optimizer.step()
        assert model.up.base.grad is None


@pytest.mark.parametrize("backward", [False, True])
def test_unfreezing_the_model_gives_no_layer_a_subspace_out_of_turn(backward):
    (model, ours), (twin, theirs) = loqt(base="dense"), loqt(base="dense")
    if backward:
        lowrank_optim.step_in_backward(model, ours)
    for step in range(5):
        frozen = model.frozen.requires_grad_(False)
        model.requires_grad_(True)
        frozen.requires_grad_(False)
        train(model, ours, 1, first=step)
        train(twin, theirs, 1, first=step)
        assert torch.equal(model.up.P, twin.up.P), step
        assert torch.equal(model.up.B, twin.up.B), step


def test_a_frozen_layer_takes_no_subspace_and_resumes_when_it_is_trained_again():
    model, optimizer = loqt(base="dense")
    model.up.requires_grad_(False)
    optimizer._aim()
    train(model, optimizer, 4)
    assert model.up.base.grad is None
    assert not model.up.P.any()
    model.up.B.requires_grad_(True)
    train(model, optimizer, 3, first=4)
    assert model.up.P.any()
    assert model.up.B.any()


def test_accumulation_in_backward_takes_the_subspace_of_the_window():
    (model, ours), (twin, theirs) = loqt(net(torch.float64)), loqt(net(torch.float64))
    lowrank_optim.step_in_backward(model, ours, accumulation_steps=2)
    for step in range(7):
        theirs.zero_grad()
        for part in batch(step).chunk(2):
            (loss_of(model, part) / 2).backward()
            (loss_of(twin, part) / 2).backward()
        ours.step(), theirs.step()
    for (name, x), (_, y) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def test_clipping_sees_whole_gradients():
    model, optimizer = loqt()
    loss_of(model, batch(0)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > model.up.base.grad.norm() * 1e2 > 0
    optimizer.step()
    assert optimizer.stats()["restarts"] == 4


# -- any method --------------------------------------------------------------------------------------------------------


@every_case
def test_lr_zero_still_restarts_and_keeps_the_function(case):
    model = net(torch.float64)
    optimizer = case.build(model, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    tokens = batch(0)
    before = model(tokens)
    train(model, optimizer, case.period + 1)
    assert optimizer.stats()["restarts"] > 0
    assert torch.allclose(model(tokens), before, atol=1e-12)


@every_case
def test_lr_as_a_tensor(case):
    model, twin = net(torch.float64), net(torch.float64)
    ours, theirs = case.build(model, lr=torch.tensor(0.013, dtype=torch.float64)), case.build(twin)
    train(model, ours, 2 * case.period)
    train(twin, theirs, 2 * case.period)
    assert all(torch.allclose(x, y, atol=1e-9) for x, y in zip(model.parameters(), twin.parameters(), strict=True))


@every_case
def test_new_parameters_get_adamw(case):
    model = net()
    optimizer = case.build(model)
    extra = nn.Parameter(torch.ones(20, 20))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5, "weight_decay": 0.0})
    for _ in range(case.period + 1):
        extra.grad = torch.ones_like(extra)
        loss_of(model, batch(0)).backward()
        optimizer.step()
    torch.testing.assert_close(extra, torch.full_like(extra, 1 - 0.5 * (case.period + 1)), rtol=0, atol=1e-4)


@every_case
def test_empty_batches_change_nothing_but_the_clock(case):
    model = net()
    optimizer = case.build(model, weight_decay=0.0)
    before = model.up.weight.clone()
    model(torch.zeros(0, 5, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert torch.equal(model.up.weight, before)
    train(model, optimizer, 2)
    assert not torch.equal(model.up.weight, before)


@every_case
@pytest.mark.parametrize("restart", [1, 2])
def test_rank_one_and_a_restart_at_every_update(case, restart):
    periods = ("merge_every", "refactor_every", "reset_every", "update_proj_gap", "iteration_steps")
    keys = [key for key in periods if key in case.kwargs]
    model = net(torch.float64)
    optimizer = case.build(model, rank=1, **dict.fromkeys(keys, restart))
    losses = train(model, optimizer, 12)
    assert optimizer.stats()["restarts"] == 4 * (12 // restart)
    assert losses[-1] < losses[0]


@pytest.mark.few(case=("relora", "loqt"))
@every_case
def test_stacked_layers_with_clocks_of_their_own(case):
    models = [net(torch.float64), net(torch.float64)]
    optimizers = [case.build(model, foreach=foreach) for model, foreach in zip(models, (False, True), strict=True)]
    for step in range(2 * case.period + 2):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step % 3 == 1:
                optimizer.reset(model.square)  # `first` has the same shape and keeps its clock
            train(model, optimizer, 1, first=step)
    ages = {int(optimizers[1].state[layer.leader]["refreshed_at"]) for layer in (models[1].square, models[1].first)}
    assert len(ages) == 2
    for (name, x), (_, y) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-9), name


@pytest.mark.few(case=("relora", "loqt"))
@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_converted_model_may_be_cast_in_the_middle_of_training(case, dtype):
    base = {"base": "nf4"} if any("base" in options for options in case.variants) else {}
    model = net()
    optimizer = case.build(model, eps=1e-4, bf16_update="none", **base)
    train(model, optimizer, 2)
    model.to(dtype)
    train(model, optimizer, 2 * case.period)
    assert model.up.leader.dtype == model.up.weight.dtype == dtype
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.few(case=("relora", "loqt"))
@every_case
def test_eval_mode_and_averages_leave_training_alone(case):
    model, twin = net(), net()
    ours, theirs = case.build(model), case.build(twin)
    average = AveragedModel(model)
    for step in range(2 * case.period):
        model.eval()
        with torch.no_grad():
            model(batch(step))
        model.train()
        train(model, ours, 1, first=step)
        average.update_parameters(model)
        train(twin, theirs, 1, first=step)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin.parameters(), strict=True))
    assert average(batch(0)).isfinite().all()


@pytest.mark.few(case=("relora", "loqt"))
@every_case
def test_encoder_layers_train_and_evaluate(case):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    )
    optimizer, x = case.build(encoder), torch.randn(2, 5, 32)
    for _ in range(case.period + 2):
        optimizer.zero_grad()
        (encoder(x) - 1).square().mean().backward()
        optimizer.step()
    if case.splits:
        encoder.eval()  # in training a sample sees its own head
    trained = encoder(x)
    with torch.no_grad():
        assert torch.allclose(encoder.eval()(x), trained, atol=1e-5)
    lowrank_optim.merge(encoder)
    with torch.no_grad():
        assert torch.allclose(encoder(x), trained, atol=1e-5)


@pytest.mark.slow
@every_case
def test_a_compiled_model_trains_the_same(case):
    model, twin = net(), net()
    ours, theirs = case.build(model), case.build(twin)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(2 * case.period + 1):
        ours.zero_grad()
        loss_of(compiled, batch(step)).backward()
        ours.step()
        train(twin, theirs, 1, first=step)
    for (name, x), (_, y) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-6), name


@pytest.mark.few(case=("relora", "loqt"))
@every_case
def test_activation_checkpointing_trains_the_same(case):
    model, twin = net(), net()
    ours, theirs = case.build(model), case.build(twin)
    for step in range(2 * case.period + 1):
        ours.zero_grad()
        torch.utils.checkpoint.checkpoint(loss_of, model, batch(step), use_reentrant=False).backward()
        ours.step()
        train(twin, theirs, 1, first=step)
    for (name, x), (_, y) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("restart", [1, 3])
def test_llama_trains_merges_and_is_saved_as_it_was(restart, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model, tokens = transformers.LlamaForCausalLM(config), torch.arange(24).view(2, 12)
    optimizer = ReLoRA(model, rank=4, lr=0.01, merge_every=restart, base="nf4", exact_base=True)
    model.train()
    model.gradient_checkpointing_enable()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sum(row.method == "ReLoRA" for row in optimizer.report()) == 14
    model.eval()
    before = model(input_ids=tokens).logits
    lowrank_optim.merge(model)
    assert torch.allclose(model(input_ids=tokens).logits, before, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_an_average_of_quantized_weights_is_refused_with_the_way_out():
    model = net()
    optimizer = ReLoRA(model, base="nf4", **OPTIONS)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    train(model, optimizer, 1)
    average.update_parameters(model)  # the first is a copy
    with pytest.raises(RuntimeError, match="average plain weights"):
        average.update_parameters(model)


def test_merge_lets_go_of_layers_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(4)))
    lowrank_optim.convert(model, rank=4)
    factors = [weakref.ref(layer.B) for layer in model]
    alive, to_linear = [], lowrank_optim.LowRankLinear.to_linear

    def watched(layer):
        alive.append(sum(ref() is not None for ref in factors))
        return to_linear(layer)

    monkeypatch.setattr(lowrank_optim.LowRankLinear, "to_linear", watched)
    lowrank_optim.merge(model)
    assert alive == [4, 3, 2, 1]
