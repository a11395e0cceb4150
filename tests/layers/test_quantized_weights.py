"""Weights in 8 or 4 bits: to torch a tensor like any other, in memory a fraction, written by stochastic rounding."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import lowrank_optim
from lowrank_optim import LowRankLinear, ops
from lowrank_optim.layers.quantized import Int8Weight, NF4Weight, QuantizedWeight, quantize_weights
from lowrank_optim.layers.rows import KINDS, ByteRows
from lowrank_optim.ops.quantize import nf4_map

KEY = ops.key_of(3, "layer.weight")

both = pytest.mark.parametrize("kind", [Int8Weight, NF4Weight])


def quantize(model: nn.Module, kind: type[QuantizedWeight]) -> nn.Module:
    """All its linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(kind.quantize(module.weight))
    return model


def steps(w: QuantizedWeight) -> torch.Tensor:
    """The widest gap between two values of the block of each element."""
    widest = w.scale if isinstance(w, Int8Weight) else w.absmax * nf4_map().diff().max()
    k = w[0].numel() if w.dim() == 3 else w.numel()
    return widest.repeat_interleave(256 if isinstance(w, Int8Weight) else 64, dim=-1)[..., :k].reshape(w.shape)


def mlp(**options) -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 30, **options), nn.Tanh(), nn.Linear(30, 20, **options))


def plain_twin(model: nn.Module) -> nn.Module:
    """The same model with the values of its quantized weights as plain ones."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(getattr(module, "weight", None), QuantizedWeight):
            module.weight = nn.Parameter(module.weight.unpack())
    return twin


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return type(a) is type(b) and all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.per)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (30, 40), (64, 48), (5461, 3), (7, 9), (3, 20, 17), (3, 7, 5), (300,), (0, 4), ()]
)
def test_round_trip(shape, dtype, kind):
    x = torch.randn(shape).to(dtype)
    w = kind.quantize(x)
    assert (w.shape, w.dtype, w.codes.dtype) == (shape, dtype, torch.uint8)
    assert type(w.unpack()) is torch.Tensor
    assert w.unpack().dtype == dtype
    matrix = x.numel() // (shape[0] if len(shape) == 3 else 1)
    for name, per in w.per.items():
        assert getattr(w, name).shape == (*shape[:-2], -(-matrix // per))
    assert ((w.unpack(torch.float32) - x.float()).abs() <= steps(w) * 0.5 + 1e-6).all()
    assert torch.equal(kind.quantize(x.mT.contiguous().mT if x.dim() > 1 else x).unpack(), w.unpack()), "any strides"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(30, 40), (5461, 3), (3, 7, 5)])
def test_nf4_values_survive_another_quantization(shape, dtype):
    w = NF4Weight.quantize((0.02 * torch.randn(shape)).to(dtype))
    assert same(NF4Weight.quantize(w.unpack()), w)
    again = w.clone()
    again.pack_(w.unpack(torch.float32), KEY, (1, 1))
    assert same(again, w), "what is on the map stays there under any noise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 64), (7, 9), (33, 5461)])
def test_nf4_is_that_of_bitsandbytes(shape, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    if not hasattr(bnb, "functional"):
        pytest.skip("bitsandbytes is not installed: another test has put an empty stand-in in its place")
    x = (0.02 * torch.randn(shape)).to(dtype)
    w, (packed, state) = NF4Weight.quantize(x), bnb.functional.quantize_4bit(x, quant_type="nf4", blocksize=64)
    assert torch.equal(w.absmax, state.absmax)
    assert torch.equal(w.unpack(), bnb.functional.dequantize_4bit(packed, state))
    halves = w.codes[: x.numel() // 2]  # the unused half of a last byte is anything
    assert torch.equal(halves << 4 | halves >> 4, packed.flatten()[: len(halves)]), "two codes the other way round"


@both
def test_a_matrix_of_a_stack_has_blocks_of_its_own(kind):
    x = torch.randn(3, 7, 17)
    stack = kind.quantize(x)
    for i in range(3):
        alone = kind.quantize(x[i])
        assert torch.equal(stack.unpack()[i], alone.unpack())
        assert all(torch.equal(getattr(stack, name)[i], getattr(alone, name)) for name in kind.per)
    stack.pack_(x + 1, KEY, (1, 1))
    assert ((stack.unpack() - x - 1).abs() <= steps(stack) + 1e-6).all()


def test_memory():
    model = quantize_weights(nn.Sequential(nn.Linear(100, 64), nn.Linear(64, 33, bias=False)))
    for weight, (m, n) in ((model[0].weight, (64, 100)), (model[1].weight, (33, 64))):
        assert weight.stored_bytes() == m * n + 8 * -(-m * n // 256)
        assert weight.stored_bytes() < weight.nbytes * 0.27
    assert NF4Weight.quantize(torch.randn(64, 100)).stored_bytes() == 0.5625 * 6400
    assert NF4Weight.quantize(torch.randn(2, 7, 9)).stored_bytes() == 2 * (32 + 4)
    for kind, per_element in ((Int8Weight, 1.03125), (NF4Weight, 0.5625)):
        model = quantize(nn.Linear(512, 512, bias=False), kind)
        assert len(saved(model.state_dict()).getvalue()) < 1.05 * per_element * 512 * 512, "a checkpoint is as small"


@both
def test_no_plain_weight_is_kept_for_backward(kind):
    model, saved = quantize(mlp(), kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        model(torch.randn(4, 40))
    assert sum(isinstance(x, kind) for x in saved) == 2
    assert not any(x.numel() in (1200, 600) for x in saved if not isinstance(x, kind))


@both
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradients_are_those_of_the_plain_weight(dtype, bias, batch, kind):
    model = quantize(mlp(bias=bias).to(dtype), kind)
    twin = plain_twin(model)
    x = torch.randn(*batch, 40, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = model(ours), twin(theirs)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    close = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert type(p.grad) is torch.Tensor
        assert (p.grad.dtype, p.grad.shape) == (p.dtype, p.shape)
        torch.testing.assert_close(p.grad, q.grad, **close)


@both
def test_autocast_as_for_the_plain_weight(kind):
    model = quantize(mlp(), kind)
    twin, x = plain_twin(model), torch.randn(6, 40)
    for m in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        model(x.bfloat16())


@both
def test_other_ways_to_use_a_weight(kind):
    """Through ops that know nothing of it, checkpointing, offloaded activations, frozen, or in an attention module."""
    model = quantize(mlp(), kind)
    twin, x = plain_twin(model), torch.randn(6, 40)

    def gradient(m, run):
        m.zero_grad()
        run(m).square().sum().backward()
        return m[0].weight.grad

    def offloaded(m):
        with torch.autograd.graph.save_on_cpu():
            return m(x)

    ways = [
        lambda m: x @ m[0].weight.mT, lambda m: torch.einsum("bi,oi->bo", x, m[0].weight), lambda m: m[0].weight.norm(),
        lambda m: m[0].weight[3], lambda m: m[0].weight.to(torch.float64) + 1, lambda m: m[0].weight.clone(), offloaded,
        lambda m: checkpoint(m, x, use_reentrant=False), lambda m: F.linear(x, 2 * m[0].weight),
        lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
    ]  # fmt: skip
    for way in ways:
        torch.testing.assert_close(gradient(model, way), gradient(twin, way), rtol=1e-5, atol=1e-5)
    w = model[0].weight.requires_grad_(False)
    assert model(x).requires_grad, "by its bias"
    model(x).sum().backward()
    assert torch.equal(w + 0, w.unpack())
    assert w.tolist() == w.unpack().tolist() == torch.tensor(w.numpy()).tolist() == torch.from_dlpack(w).tolist()
    assert f"{kind.__name__}(tensor(" in repr(w)
    attention = quantize(nn.MultiheadAttention(40, 4), kind)
    assert isinstance(attention.out_proj.weight, kind)
    attention(x, x, x)[0].sum().backward()
    assert attention.out_proj.weight.grad.shape == (40, 40)


@pytest.mark.slow
@both
@pytest.mark.parametrize("trained", [True, False])
def test_a_compiled_layer_is_the_layer(kind, trained):
    """In one graph, which reads no tensor made outside of it, and leaves none of its own where others would read it."""
    layer, x = quantize(nn.Linear(65, 33), kind).requires_grad_(trained), torch.randn(4, 65)
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        layer.zero_grad()
        ours = x.clone().requires_grad_()
        y = run(ours)
        y.square().sum().backward()
        results.append([y, ours.grad] + ([layer.weight.grad] if trained else []))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both
def test_second_derivatives_are_refused(kind):
    model, x = quantize(mlp(), kind), torch.randn(4, 40, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@both
def test_casts_and_moves_keep_the_codes(kind):
    model = quantize(mlp(), kind)
    weight, before = model[0].weight, copy.deepcopy(model[0].weight)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        assert model[0].weight is weight, "an optimizer holds it"
        assert (weight.dtype, *(t.dtype for _, t in weight._inner())) == (dtype, *(t.dtype for _, t in before._inner()))
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        assert same(weight, before)
    meta = copy.deepcopy(model).to("meta")[0].weight
    assert isinstance(meta, kind)
    assert meta.codes.is_meta
    assert weight.to(torch.int32).dtype == torch.int32
    assert isinstance(weight.detach(), kind)
    assert weight.detach().codes is weight.codes
    assert weight.clone().codes is not weight.codes


@both
@pytest.mark.parametrize("make", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), lambda w: w.clone()])
def test_copies_share_nothing(make, kind):
    model = quantize(mlp(), kind)
    model(torch.randn(3, 40)).sum().backward()
    weight = model[0].weight
    other = make(weight)
    assert isinstance(other, kind)
    assert same(other, weight)
    before = weight.unpack()
    with torch.no_grad():
        other.copy_(before + 1)
    assert torch.equal(weight.unpack(), before)
    assert not torch.equal(other.unpack(), before)


@both
def test_a_deepcopy_is_a_parameter_with_its_gradient(kind):
    model = quantize(mlp(), kind)
    model(torch.randn(3, 40)).sum().backward()
    twin = copy.deepcopy(model)[0].weight
    assert isinstance(twin, nn.Parameter)
    assert twin.requires_grad
    assert torch.equal(twin.grad, model[0].weight.grad)
    assert twin.grad is not model[0].weight.grad


def saved(thing) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


@both
def test_save_and_load(kind):
    model, other = quantize(mlp(), kind), quantize(mlp(), kind)
    state = torch.load(saved(model.state_dict()), weights_only=True)
    assert isinstance(state["0.weight"], kind)
    keep = other[0].weight
    other.load_state_dict(state)
    assert other[0].weight is keep
    assert all(same(a.weight, b.weight) for a, b in ((model[0], other[0]), (model[2], other[2]))), "bit for bit"
    assert other[0].weight.codes.data_ptr() != state["0.weight"].codes.data_ptr()
    whole = torch.load(saved(model), weights_only=False)
    assert same(whole[0].weight, model[0].weight)
    assert isinstance(whole[0].weight, nn.Parameter)


@both
@pytest.mark.parametrize("other", [None, Int8Weight, NF4Weight])
def test_load_between_kinds(kind, other):
    """From plain, from another kind and back to plain: what is loaded keeps the kind that it has."""
    model, source = quantize(mlp(), kind), mlp() if other is None else quantize(mlp(), other)
    model.load_state_dict(source.state_dict())
    assert same(model[0].weight, kind.quantize(source[0].weight + 0)), "to nearest"
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    assert type(plain[0].weight) is nn.Parameter
    assert torch.equal(plain[0].weight, model[0].weight.unpack())


@both
def test_pack_is_deterministic_and_touches_no_generator(kind):
    x, w = torch.randn(50, 70), kind.quantize(torch.randn(50, 70))
    other, state = copy.deepcopy(w), torch.get_rng_state()
    w.pack_(x, KEY, ops.stream_of("weight", 3))
    other.pack_(x.mT.contiguous().mT, KEY, ops.stream_of("weight", 3))
    assert same(w, other)
    for key, step in ((KEY + 1, 3), (KEY, 4)):
        other.pack_(x, key, ops.stream_of("weight", step))
        assert not torch.equal(w.codes, other.codes)
        assert all(torch.equal(getattr(w, name), getattr(other, name)) for name in kind.per if name != "codes")
    assert torch.equal(torch.get_rng_state(), state)


@both
def test_pack_is_unbiased(kind):
    x, draws = 0.1 * torch.randn(20, 30), 4000
    w, total, square = kind.quantize(x), torch.zeros(20, 30, dtype=torch.float64), 0.0
    for step in range(draws):
        w.pack_(x, KEY, ops.stream_of("weight", step))
        error = w.unpack(torch.float64) - x
        total, square = total + error, square + error.square()
    assert (square > 0).float().mean() > 0.95, "nearly all elements are between grid points"
    mean = total / draws / steps(w).double() * draws**0.5  # in units that have standard deviation at most 1/2
    assert mean.abs().max() < 0.5 * 5
    assert abs(float(mean.mean())) < 0.5 * 5 / 600**0.5


@both
@pytest.mark.parametrize("shape", [(700, 300), (2, 300, 301), (1, 1), (257, 1)])
def test_pack_in_pieces_is_pack_at_once(shape, kind):
    """Noise is numbered by element, whatever the pieces that the work is cut into."""
    x = torch.randn(shape)
    w = kind.quantize(torch.zeros(shape))
    w.pack_(x, KEY, (5, 6))
    flat = x.flatten(-2)
    noise = ops.quantize.uniform_noise(flat.shape, KEY, (5, 6))
    assert same(w, kind(*kind.encode(flat, noise), shape=x.shape, dtype=torch.float32))


def test_entries_without_updates_do_not_drift():
    w = Int8Weight.quantize(torch.randn(64, 64))
    start = w.unpack()
    for step in range(50):
        w.pack_(w.unpack(torch.float32), KEY, ops.stream_of("weight", step))
    assert (w.unpack() - start).abs().max() <= 1.01 * w.scale.max()
    assert (w.unpack() - start).abs().mean() < 0.02 * w.scale.mean()


@both
def test_updates_far_below_one_step_survive_on_average(kind):
    """SGD by hand with updates of 1/50 of a quantization step: rounding to nearest would not move at all."""
    x = torch.randn(64, 64)
    w, nearest = kind.quantize(x), kind.quantize(x)
    lines = w.unpack().view(-1, max(kind.per.values()))
    inside = (lines > lines.amin(1, True)) & (lines < lines.amax(1, True))  # the ends of a grid stay where they are
    inner = inside.view(64, 64).float()
    smallest = steps(w) if kind is Int8Weight else steps(w) * (nf4_map().diff().min() / nf4_map().diff().max())
    update, start = inner * smallest / 50, w.unpack()
    for step in range(200):
        w.pack_(w.unpack(torch.float32) + update, KEY, ops.stream_of("weight", step))
        with torch.no_grad():
            nearest.copy_(nearest.unpack() + update)
    moved = (w.unpack() - start) / (update * 200).clamp(min=1e-12)
    assert float(moved[inner > 0].mean()) == pytest.approx(1, abs=0.05)
    assert (nearest.unpack() - start).abs().max() < 0.01 * update.max()


@both
def test_writing_other_than_copy_and_pack_is_refused(kind):
    model = quantize(mlp(), kind)
    weight, before = model[0].weight, model[0].weight.unpack()
    model(torch.randn(3, 40)).sum().backward()

    def item(w):
        w[0] = 0

    def data(w):
        w.data = torch.randn(30, 40)

    writes = [
        lambda w: w.add_(1), lambda w: w.zero_(), lambda w: torch._foreach_mul_([w], 2), nn.init.zeros_, item, data,
        lambda w: torch.add(before, 1, out=w), lambda w: torch.optim.AdamW([w]).step(),
    ]  # fmt: skip
    for write in writes:
        with torch.no_grad(), pytest.raises(RuntimeError, match=rf"would write to an {kind.__name__}.* copy_ .* pack_"):
            write(weight)
        assert torch.equal(weight.unpack(), before)
    with pytest.raises(ValueError, match=r"shape \(30, 40\), got \(40, 30\)"):
        weight.pack_(before.mT, KEY, (1, 1))
    plain = torch.zeros(30, 40)
    assert torch.equal(plain.copy_(weight.detach()), before), "it may be read into a plain one"


@both
@pytest.mark.parametrize("write", [lambda w: w.pack_(w.unpack() + 1, KEY, (1, 1)), lambda w: w.copy_(w.unpack() + 1)])
def test_backward_through_a_value_that_is_gone_is_an_error(write, kind):
    model = quantize(mlp(), kind)
    y = model(torch.randn(3, 40))
    with torch.no_grad():
        write(model[0].weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Language(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tie:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return self.lm_head(self.norm(self.down(self.up(self.embed_tokens(tokens)).relu())))


def quantized(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, Int8Weight)}


@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_and_head_stay(tie):
    model = Language(tie)
    names = [name for name, _ in model.named_parameters()]
    assert quantize_weights(model) is model
    assert quantized(model) == {"up.weight", "down.weight"}
    assert [name for name, _ in model.named_parameters()] == names, "in the old order"
    model(torch.randint(0, 50, (2, 7))).sum().backward()
    assert (model.lm_head.weight is model.embed_tokens.weight) == tie


def test_include_and_exclude():
    assert quantized(quantize_weights(Language(), include=["lm_head"])) == {
        "up.weight",
        "down.weight",
        "lm_head.weight",
    }
    assert quantized(quantize_weights(Language(), exclude=["up", "embed"])) == {"down.weight"}
    frozen = Language()
    frozen.up.weight.requires_grad_(False)
    assert not quantize_weights(frozen).up.weight.requires_grad
    twice = quantize_weights(Language(), exclude=["up"])
    keep = twice.down.weight
    assert quantized(quantize_weights(twice)) == {"up.weight", "down.weight"}
    assert twice.down.weight is keep, "what is in 8 bits already stays"


def test_tied_linear_layers_stay_tied():
    model = mlp()
    model.append(nn.Linear(40, 30))
    model[3].weight = model[0].weight
    quantize_weights(model)
    assert model[3].weight is model[0].weight
    assert quantized(model) == {"0.weight", "2.weight", "3.weight"}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: Language(tie=True),
            {"include": ["embed"]},
            r"embed_tokens.weight is shared by Embedding, Linear; to quantize it, only linear layers",
        ),
        (lambda: nn.Conv2d(3, 4, 3), {}, "Conv2d has no linear layers"),
        (lambda: quantize_weights(mlp()), {}, "Sequential has no linear layers with float weights"),
        (Language, {"exclude": ["weight"]}, "every nn.Linear is excluded"),
        (Language, {"include": ["norm"]}, "include pattern 'norm' matches no parameter"),
        (Language, {"exclude": ["nothing"]}, "exclude pattern 'nothing' matches no parameter"),
        (Language, {"include": "up"}, "must be a list of regular expressions"),
    ],
)
def test_errors_leave_the_model_as_it_was(make, options, message):
    model = make()
    before = quantized(model)
    with pytest.raises(ValueError, match=message):
        quantize_weights(model, **options)
    assert quantized(model) == before


def test_weights_that_are_not_finite_are_refused():
    model = Language()
    with torch.no_grad():
        model.down.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"down.weight has entries that are not finite"):
        quantize_weights(model)
    assert not quantized(model)


def test_meta_models_can_be_planned():
    with torch.device("meta"):
        model = quantize_weights(Language())
    assert model.up.weight.stored_bytes() == 640 + 8 * 3
    assert model.up.weight.codes.is_meta


def test_nf4_on_meta_says_what_it_will_take():
    w = NF4Weight.quantize(torch.empty(3, 7, 9, device="meta"))
    assert (w.shape, w.is_meta, w.stored_bytes()) == ((3, 7, 9), True, 3 * (32 + 4))


def test_processes_share_the_memory():
    w = NF4Weight.quantize(torch.randn(7, 9))
    assert w.share_memory_() is w
    assert w.codes.is_shared()
    assert w.absmax.is_shared()


def test_an_optimizer_writes_to_nf4_as_to_int8():
    """Nothing asks which kind a weight is: one step is the step of the plain weight, rounded by `pack_`."""
    x, model = torch.randn(16, 40), quantize(mlp(), NF4Weight)
    twin = plain_twin(model)
    optimizers = [lowrank_optim.GaLoreAdamW(m.named_parameters(), lr=1e-2, rank=4) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        m(x).square().sum().backward()
        optimizer.step()
    for ours, theirs in ((model[0], twin[0]), (model[2], twin[2])):
        assert isinstance(ours.weight, NF4Weight)
        assert ((ours.weight.unpack() - theirs.weight).abs() <= steps(ours.weight) + 1e-6).all()
        assert torch.equal(ours.bias, theirs.bias)


def test_an_optimizer_writes_to_a_stack_in_nf4():
    stack = nn.Parameter(NF4Weight.quantize(torch.randn(3, 7, 17)))
    twin = nn.Parameter(stack.detach().unpack())
    stack.grad = torch.randn(3, 7, 17)
    twin.grad = stack.grad.clone()
    for p in (stack, twin):
        lowrank_optim.GaLoreAdamW([{"params": [("experts", p)], "as_matrix": "batch", "rank": 2}], lr=1e-2).step()
    assert not torch.equal(stack.detach().unpack(), twin)
    assert ((stack.detach().unpack() - twin).abs() <= steps(stack) + 1e-6).all()


def test_merges_into_nf4_average_out():
    """What `pack_` is for: low-rank updates far below a step. Nearest loses them all, however many there are;
    stochastic rounding keeps their sum, with noise that a product averages out."""
    x, merges = 0.02 * torch.randn(256, 256), 20
    w, nearest = NF4Weight.quantize(x), NF4Weight.quantize(x)
    start, one = w.unpack(), torch.randn(256).sign()
    merge = 0.03 * steps(w).mean() * torch.outer(one, one)
    for i in range(merges):
        w.pack_(w.unpack() + merge, KEY, (i, 1))
        with torch.no_grad():
            nearest.copy_(nearest.unpack() + merge)
    whole = float(one @ (merges * merge) @ one)
    assert float(one @ (w.unpack() - start) @ one) == pytest.approx(whole, rel=0.05)
    assert abs(float(one @ (nearest.unpack() - start) @ one)) < 0.2 * whole


# -- rows of bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 37, 64, 256, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_bytes_are_weights_of_one_row_each(kind, n):
    w, rows, stream = (
        torch.randn(7, n, generator=torch.Generator().manual_seed(n)),
        ByteRows(KINDS[kind], n),
        ops.stream_of("merge", 3),
    )
    kept = rows.bytes_of(w)
    alone = torch.cat([KINDS[kind].quantize(row[None]).unpack() for row in w])
    assert torch.equal(rows.weight(kept, w.dtype).unpack(), alone)
    assert kept.dtype == torch.uint8
    codes = {"int8": n + 8 * -(-n // 256), "nf4": -(-n // 2) + 4 * -(-n // 64)}[kind]
    assert kept.shape == (7, -(-codes // 4) * 4)
    parts = kept.clone()
    rows.weight(kept, w.dtype).pack_(3 * w, 5, stream)
    for first, last in ((0, 4), (4, 4), (4, 7)):  # those of three ranks, one of which has none
        rows.weight(parts[first:last], w.dtype).pack_(3 * w[first:last], 5, stream, first * n)
    assert torch.equal(parts, kept)
    assert torch.equal(rows.weight(kept.to(torch.bfloat16), w.dtype).unpack(), rows.weight(kept, w.dtype).unpack())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_blocks_by_rows_are_the_blocks_as_they_are(kind, exact):
    torch.manual_seed(0)
    plain, x = nn.Linear(256, 37), torch.randn(3, 256)
    made = [LowRankLinear(plain, 4, base=kind, exact_base=exact, by_rows=by_rows, seed=3) for by_rows in (False, True)]
    for count in (1, 2):
        for layer in made:
            with torch.no_grad():
                layer.B.fill_(0.25)
            layer.merge_(count)
        assert torch.equal(made[0].weight, made[1].weight)
    grads = [torch.autograd.grad(layer(x).square().sum(), layer.B)[0] for layer in made]
    assert torch.equal(*grads)
    twin = LowRankLinear(nn.Linear(256, 37), 4, base=kind, exact_base=exact, by_rows=True)
    twin.load_state_dict(made[1].state_dict())
    assert torch.equal(twin.weight, made[0].weight)


def test_rows_are_for_quantized_bases():
    with pytest.raises(ValueError, match="by_rows=True is for quantized bases, and base='dense' is not quantized"):
        LowRankLinear(nn.Linear(24, 37), 4, by_rows=True)
