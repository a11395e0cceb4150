"""The report measures what is there, predicts the same, and names the reasons that apply, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import GaLoreAdafactor, GaLoreAdamW, memory_report, param_groups, step_in_backward
from lowrank_optim.memory.peak import Peak, measure
from lowrank_optim.reports.report import human
from tests.cases import Net, every_case, train
from tests.support.selection import FEW


class Layers(nn.Module):
    """An embedding and some square layers, wide enough that activations of one token are nothing."""

    def __init__(self, width=64, layers=4, vocabulary=16, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype)
        made = [nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)]
        self.layers = nn.ModuleList(made)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Run:
    """A model and its optimizer, two steps old, and a function for the next ones."""

    def __init__(self, make, model=None, params=None, backward=None, tokens=(1, 3), **options):
        self.model = Layers() if model is None else model
        params = param_groups(self.model, verbose=False) if params is None else params(self.model)
        self.optimizer = make(params, **options)
        self.handle = None if backward is None else step_in_backward(self.model, self.optimizer, **backward)
        self.tokens = torch.arange(tokens[0] * tokens[1]).view(tokens) % 16
        for _ in range(2):
            self.step()

    def step(self):
        for _ in range(1 if self.handle is None else self.handle.accumulation_steps):
            self.model(self.tokens).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def report(self, measured=True):
        return memory_report(self.model, self.optimizer, step=self.step if measured else None)


@pytest.mark.few(case=FEW)
@every_case
def test_measured_bytes_are_the_predicted_ones(case):
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"state_dtype": "int8", "bf16_update": "kahan"})):
        model = Net().to(dtype)
        optimizer = case.build(param_groups(model, min_dim=4, verbose=False), **options)
        train(model, optimizer, 3)
        found = memory_report(model, optimizer)
        for name in ("weights", "gradients", "optimizer", "kept"):
            assert found[name].measured == found[name].predicted > 0, name
        assert found["weights"].measured == found["gradients"].measured == sum(p.nbytes for p in model.parameters())
        assert all(one.measured == one.predicted > 0 for one in found.states.values()), found.states
        assert sum(one.measured for one in found.states.values()) == lowrank_optim.state_bytes(optimizer)
        assert found["optimizer"].adamw == 2 * found["weights"].measured + 4 * len(list(model.parameters()))
        assert ("compensation" in found.states) == (dtype == torch.bfloat16)


@pytest.mark.few(case=FEW)
@every_case
def test_the_update_is_within_what_was_predicted(case):
    run = Run(case.make, **{**case.kwargs, **case.fitting({"rank": 8, "stagger": False})})
    found = run.report()
    assert 0 < found["update"].measured <= found["update"].predicted + 4096
    assert found["whole step"].measured >= found["gradients"].measured == found["gradients"].predicted
    if "shared dictionaries" in found.figures:
        shared = found["shared dictionaries"]
        assert shared.measured == shared.predicted == 64 * 64 * 4


def test_kinds_of_state_by_name():
    found = Run(GaLoreAdamW, Layers(128), rank=8, state_dtype="int8").report(measured=False)
    per_matrix = 8 * 128 + 4 * 8 * 128 // 256  # a byte per element, a float32 per block of 256
    embedding = 128 * 16 * 4  # too small to be quantized
    assert list(found.states) == ["bases", "exp_avg", "exp_avg_sq", "counters"]
    assert found["exp_avg"].measured == 4 * per_matrix + embedding
    assert found["bases"].measured == 4 * 8 * 128 * 2
    assert found["counters"].measured == 5 * (4 + 8) + 4 * 16


def test_torchs_optimizers():
    model = Net()
    for make, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {})):
        optimizer = make(model.parameters(), lr=1e-3, **options)
        train(model, optimizer, 1)
        found = memory_report(model, optimizer)
        assert found["optimizer"].measured == found["optimizer"].predicted == lowrank_optim.state_bytes(optimizer)
        assert found["update"].predicted is None
    adafactor = torch.optim.Adafactor(model.parameters())
    train(model, adafactor, 1)
    found = memory_report(model, adafactor)
    assert found["optimizer"].measured > 0
    assert found["optimizer"].predicted is found["kept"].predicted is None, "its step needs numbers"


def test_frozen_weights_are_apart():
    model = Layers()
    model.layers[0].weight.requires_grad_(False)
    found = Run(GaLoreAdamW, model, rank=4).report(measured=False)
    assert found["frozen weights"].measured == 64 * 64 * 4
    assert found["weights"].measured == found["weights"].predicted == (3 * 64 * 64 + 16 * 64) * 4


def test_quantized_weights_are_measured_as_they_are_stored():
    model = lowrank_optim.quantize_weights(Layers())
    found = Run(lowrank_optim.QGaLoreAdamW, model, rank=4).report(measured=False)
    stored = 4 * (64 * 64 + 8 * 16) + 16 * 64 * 4
    assert found["weights"].measured == found["weights"].predicted == stored
    assert found["weights"].adamw == (4 * 64 * 64 + 16 * 64) * 4


def test_quantized_weights_have_no_compensation():
    model = lowrank_optim.quantize_weights(Layers(dtype=torch.bfloat16))
    run = Run(lowrank_optim.QGaLoreAdamW, model, rank=4, bf16_update="kahan")
    planned = lowrank_optim.estimate_memory(model, lowrank_optim.QGaLoreAdamW, rank=4, bf16_update="kahan")
    found = run.report(measured=False)
    assert planned.optimizer == found["optimizer"].measured == lowrank_optim.state_bytes(run.optimizer)
    assert found["compensation"].measured == 16 * 64 * 2, "of the embedding alone"
    assert planned.weights == found["weights"].measured


# -- step during backward ----------------------------------------------------------------------------------------------


def test_step_in_backward_holds_the_largest_gradient():
    plain, backward = Run(GaLoreAdamW, rank=4), Run(GaLoreAdamW, rank=4, backward={})
    assert plain.report()["gradients"].measured == (4 * 64 * 64 + 16 * 64) * 4
    found = backward.report()
    assert found["gradients"].measured == found["gradients"].predicted == 64 * 64 * 4
    assert found["update"].measured is None
    kept = backward.report(measured=False)["gradients"]
    assert (kept.measured, kept.predicted) == (0, 64 * 64 * 4)
    assert "during backward" in str(found)


@pytest.mark.parametrize(
    ("make", "accumulate", "basis_from", "thin"),
    [
        (GaLoreAdamW, "projected", "window", True),
        (GaLoreAdamW, "projected", "micro-batch", True),
        (GaLoreAdamW, "whole", "window", False),
        (lowrank_optim.FiraAdamW, "projected", "window", False),
        (lowrank_optim.FiraAdamW, "projected", "micro-batch", False),
    ],
)
def test_accumulation_keeps_what_was_predicted(make, accumulate, basis_from, thin):
    backward = {"accumulation_steps": 3, "accumulate": accumulate, "basis_from": basis_from}
    run = Run(make, rank=4, update_proj_gap=100, backward=backward)
    found = run.report()["gradients"]
    kept = 4 * (4 * 64 if thin else 64 * 64) * 4 + 16 * 64 * 4
    assert found.measured == found.predicted == kept + 64 * 64 * 4
    run.model(run.tokens).square().mean().backward()
    assert memory_report(run.model, run.optimizer)["gradients"].measured == kept


def test_a_window_with_a_refresh_holds_whole_gradients():
    for basis_from, whole in (("window", True), ("micro-batch", False)):
        backward = {"accumulation_steps": 3, "basis_from": basis_from}
        run = Run(GaLoreAdamW, rank=4, update_proj_gap=1, backward=backward)
        found = run.report()
        assert (found["gradients"].measured > found["gradients"].predicted) == whole
        assert "refitted 4 bases" in str(found)


# -- the meter ---------------------------------------------------------------------------------------------------------


def test_the_meter_sees_backward_and_frees():
    a, b = torch.randn(50, 100, requires_grad=True), torch.randn(100, 200)
    with Peak() as peak:
        y = a @ b
        assert peak.now == peak.most == y.nbytes
        y.sum().backward()  # the gradient of y is expanded from one number; that of a is new
        assert y.nbytes + a.nbytes <= peak.most < y.nbytes + a.nbytes + 64
        del y
        assert peak.now == a.grad.nbytes
        a.grad = None
        view = torch.zeros(30)[10:]
        assert peak.restart() == peak.most == 120, "a view keeps its whole storage"
        del view
        assert peak.now == 0
        a.data.mul_(2)
        assert peak.most == 120, "what is written in place is not new"


def test_the_peak_of_the_update_is_distinguished_from_that_of_the_step():
    p = nn.Parameter(torch.zeros(1000))

    class Wasteful(torch.optim.SGD):
        def step(self, closure=None):
            return float(torch.zeros(5000).sum())

    optimizer = Wasteful([p])

    def step():
        torch.ones(9000).sum()
        (p * 2).sum().backward()
        optimizer.step()
        torch.ones(7000).sum()

    peak = measure(step, optimizer, p.device)
    assert peak.gradients == 4000
    assert 20000 <= peak.update < 20100
    assert 36000 <= peak.whole < 36100
    assert not optimizer._optimizer_step_pre_hooks


# -- reasons -----------------------------------------------------------------------------------------------------------


class Matrices(nn.Module):
    """Parameters of some shapes."""

    def __init__(self, *shapes):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(shape, dtype=torch.bfloat16) for shape in shapes])

    def forward(self, tokens):
        return torch.stack([(weight * weight).sum() for weight in self.weights])


def matrices(*shapes):
    return lambda: Matrices(*shapes)


def bf16(**kwargs):
    return lambda: Layers(dtype=torch.bfloat16, **kwargs)


def frozen(count):
    def make():
        model = Layers()
        for layer in model.layers[:count]:
            layer.weight.requires_grad_(False)
        return model

    return make


# phrase of the reason: what has it, what has it not; model, options, and whether a step is measured
REASONS = {
    "rank is not below": (
        (matrices((40, 48), (48, 40), (56, 50)), dict(rank=40)),
        (matrices((40, 48), (48, 40), (56, 50)), dict(rank=39)),
    ),
    "rank is too large": ((bf16(), dict(rank=50)), (bf16(), dict(rank=16))),
    "other side": (  # m r + 2 n r elements
        (matrices((40, 400), (400, 40)), dict(rank=10)),
        (matrices((40, 400), (400, 40)), dict(rank=10, proj_type="reverse_std")),
    ),
    "whose bases outweigh their moments": (  # m r + r + n
        (matrices((40, 400), (400, 40)), dict(make=GaLoreAdafactor, rank=10, proj_type="reverse_std")),
        (matrices((40, 400), (400, 40)), dict(make=GaLoreAdafactor, rank=10)),
    ),
    "Embeddings and heads": ((bf16(vocabulary=60), dict(rank=4)), (bf16(vocabulary=16), dict(rank=16))),
    "Many parameters are not projected": (
        (bf16(), dict(rank=4, params=lambda m: param_groups(m, exclude=[r"layers\.[01]"], verbose=False))),
        (bf16(vocabulary=60), dict(rank=4)),
    ),
    "kept in float32, though weights": (
        (bf16(width=128), dict(rank=16)),
        (bf16(width=128), dict(rank=16, state_dtype="bfloat16")),
    ),
    "kept in float32:": (
        (lambda: Layers(128), dict(rank=16)),
        (lambda: Layers(128), dict(rank=16, state_dtype="int8")),
    ),
    "Error feedback": (
        (bf16(), dict(make=lowrank_optim.LDAdamW, rank=4)),
        (bf16(), dict(make=lowrank_optim.LDAdamW, rank=4, error_feedback="none")),
    ),
    "stacked": ((bf16(layers=16), dict(rank=4, foreach=True)), (bf16(layers=16), dict(rank=4))),
    "All gradients live at once": ((Layers, dict(rank=4)), (Layers, dict(rank=4, backward={}))),
    "gradients accumulate whole": (
        (Layers, dict(make=lowrank_optim.FiraAdamW, rank=4, backward={"accumulation_steps": 2})),
        (lambda: Layers(vocabulary=2), dict(rank=4, tokens=(1, 2), backward={"accumulation_steps": 2})),
    ),
    "Weights are float32": ((Layers, dict(rank=4)), (bf16(), dict(rank=4))),
    "weights are frozen": ((frozen(3), dict(rank=4)), (frozen(1), dict(rank=4))),
    "outweigh everything": ((Layers, dict(rank=4, tokens=(64, 20))), (Layers, dict(rank=4, tokens=(1, 3)))),
}


@pytest.mark.parametrize("phrase", REASONS)
def test_each_reason_is_given_where_it_applies(phrase):
    for (model, options), applies in zip(REASONS[phrase], (True, False), strict=True):
        options = dict(options)
        found = Run(options.pop("make", GaLoreAdamW), model(), **options).report()
        said = [reason for reason in found.reasons if phrase in reason]
        assert len(said) == applies, found.reasons
        assert all(reason in str(found) for reason in said)


def test_reasons_have_the_numbers():
    found = "\n".join(Run(GaLoreAdamW, rank=50).report(measured=False).reasons)
    plain = human(4 * (2 * 64 * 64 * 4 + 12))
    assert f"of the {plain} that the same rule keeps of them unprojected" in found
    assert f"rank=0.25 keeps {human(4 * (3 * 16 * 64 * 4 + 28))}" in found
    largest, all_of_them = (human(4 * n) for n in (64 * 64, 4 * 64 * 64 + 16 * 64))
    assert f"All gradients live at once: {all_of_them}." in found
    assert f"only the largest one does: {largest}" in found


@pytest.mark.parametrize(("frozen_side", "applies"), [(8, True), (1000, False)])
def test_a_small_saving_is_no_reason(frozen_side, applies):
    model = Layers(vocabulary=60)
    model.base = nn.Parameter(torch.zeros(frozen_side, frozen_side), requires_grad=False)
    said = "\n".join(Run(GaLoreAdamW, model, rank=4).report(measured=False).reasons)
    for phrase in ("Embeddings", "All gradients", "Weights are float32"):
        assert (phrase in said) == applies


def test_bad_input():
    model = Layers()
    optimizer = GaLoreAdamW(param_groups(model, verbose=False))
    with pytest.raises(ValueError, match="no step yet"):
        memory_report(model, optimizer)
    with pytest.raises(ValueError, match="no step yet"):
        memory_report(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="no step yet"):
        memory_report(model, optimizer, step=lambda: None)
    with pytest.raises(TypeError, match="got Layers"):
        memory_report(model, model)
    with pytest.raises(TypeError, match="got list"):
        memory_report(list(model.parameters()), optimizer)
    with pytest.raises(TypeError, match="got Tensor"):
        memory_report(model, optimizer, step=torch.zeros(1))
    with pytest.raises(ValueError, match="5 of the 5"):
        memory_report(Layers(), optimizer)


def test_a_step_that_fails_leaves_no_hooks():
    run = Run(GaLoreAdamW, rank=4)
    before = [dict(p._backward_hooks or {}) for p in run.model.parameters()]

    def fails():
        run.model(run.tokens).sum().backward()
        raise KeyError("data")

    with pytest.raises(KeyError):
        memory_report(run.model, run.optimizer, step=fails)
    assert [dict(p._backward_hooks or {}) for p in run.model.parameters()] == before
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
