"""Every message: what is wrong, what was got, the way out. And nothing is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.cases import CASES, Net, every_case, ranked
from tests.support.selection import FEW


def matrix():
    return nn.Parameter(torch.randn(12, 20))


@every_case
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", -1.0, r"lr must be a number >= 0, got -1.0"),
        ("lr", float("nan"), r"lr must be a number >= 0, got nan"),
        ("lr", "0.1", r"lr must be a number >= 0, got '0.1'"),
        ("weight_decay", -0.1, r"weight_decay must be a number >= 0, got -0.1"),
        ("rank", 0, r"rank must be an int >= 1, a fraction in \(0, 1\].*, got 0"),
        ("rank", 1.5, r"rank must be .*, got 1.5"),
        ("rank", True, r"rank must be .*, got True"),
        ("rank", "128", r"rank must be .*, got '128'"),
        ("update_proj_gap", 0, r"update_proj_gap must be an int >= 1, got 0"),
        ("update_proj_gap", 2.5, r"update_proj_gap must be an int >= 1, got 2.5"),
        ("scale", 0.0, r"scale must be a number > 0, got 0.0"),
        ("proj_type", "standard", r"proj_type must be one of 'std', .*, got 'standard'; did you mean 'std'"),
        ("basis", "SVD ", r"basis must be one of '.*', got 'SVD '"),
        ("moments", "resett", r"moments must be one of .*, got 'resett'; did you mean 'reset'\?"),
        (
            "state_dtype",
            torch.bfloat16,
            r"state_dtype must be one of 'float32', 'bfloat16', 'int8', 'int4', got torch.bfloat16",
        ),
        ("bf16_update", "sr", r"bf16_update must be one of 'stochastic', 'kahan', 'none', got 'sr'"),
        ("nonfinite", None, r"nonfinite must be one of 'skip', 'raise', got None"),
        ("seed", -1, r"seed must be an int >= 0, got -1"),
        ("maximize", 1, r"maximize must be True or False, got 1"),
        ("stagger", "no", r"stagger must be True or False, got 'no'"),
        ("as_matrix", "conv", r"as_matrix must be one of 'auto', 'flatten', 'batch', got 'conv'"),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "group", "later group"])
def test_values_out_of_range(case, option, value, message, where):
    if not case.has(option) and option != "as_matrix":
        return  # not an option of this method
    if where == "constructor":
        if option == "as_matrix":
            return  # groups only
        with pytest.raises(ValueError, match=message):
            case.build([matrix()], **{option: value})
    elif where == "group":
        with pytest.raises(ValueError, match=message):
            case.build([{"params": [matrix()], option: value}])
    else:
        optimizer = case.build([matrix()])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [matrix()], option: value})
        assert len(optimizer.param_groups) == len(optimizer.report()) == len(optimizer.state) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, r"betas must be a pair of numbers, got 0.9; for example"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a number >= 0 and < 1, got 1.0"),
        ({"eps": -1e-8}, r"eps must be a number >= 0, got -1e-08"),
    ],
)
def test_values_of_adamw(options, message):
    with pytest.raises(ValueError, match=message):
        lowrank_optim.GaLoreAdamW([matrix()], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2_decay": 0.8}, r"beta2_decay must be a number in \[-1, 0\), got 0.8"),
        ({"eps": (None, -1)}, r"eps\[1\] must be a number >= 0, got -1"),
        ({"eps": (1, 2, 3)}, r"eps must be a number or a pair, got \(1, 2, 3\)"),
        ({"beta1": 1.0}, r"beta1 must be a number >= 0 and < 1, got 1.0; None switches"),
        ({"d": 0}, r"d must be a number > 0, got 0"),
    ],
)
def test_values_of_adafactor(options, message):
    with pytest.raises(ValueError, match=message):
        lowrank_optim.GaLoreAdafactor([matrix()], **options)


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("proj_typ", r"unknown key 'proj_typ' in a param group; did you mean 'proj_type'\?"),
        ("weightdecay", r"unknown key 'weightdecay' in a param group; did you mean 'weight_decay'\?"),
        ("qqq", r"unknown key 'qqq' in a param group; valid keys: as_matrix, "),
    ],
)
def test_unknown_group_keys(case, key, message):
    with pytest.raises(ValueError, match=message):
        case.build([{"params": [matrix()], key: 1}])


@pytest.mark.few(case=FEW)
@ranked
def test_nothing_to_project(case):
    with pytest.raises(ValueError, match=r"(?s)found nothing to project.*param 0: a vector or scalar.*use DDP instead"):
        case.build([nn.Parameter(torch.randn(200))])
    with pytest.raises(ValueError, match=r"(?s)param 0: rank 30 >= min\(12, 20\)\nLower `rank`"):
        case.build([matrix()], rank=30)
    with pytest.raises(ValueError, match=r"head\.weight: head, by its name"):
        case.build([("head.weight", matrix())])
    with pytest.raises(ValueError, match=r"and 3 more"):
        case.build([nn.Parameter(torch.randn(3)) for _ in range(8)])


@pytest.mark.few(case=FEW)
@ranked
def test_strict_refuses_a_fallback(case):
    model = Net()
    assert case.build(model.named_parameters(), strict=True, rank=3), "vectors and embeddings are no fallback"
    with pytest.raises(ValueError, match=r"strict=True\): small cannot be projected \(rank 9 >= min\(9, 9\)\)"):
        case.build([("big", matrix()), ("small", nn.Parameter(torch.randn(9, 9)))], strict=True, rank=9)
    with pytest.raises(ValueError, match=r"b cannot be projected \(a vector or scalar\). Lower its rank, put it into"):
        case.build([{"params": [("a", matrix()), ("b", nn.Parameter(torch.randn(9)))], "rank": 3}], strict=True)


@pytest.mark.few(case=FEW)
@every_case
def test_tensors_that_cannot_be_parameters(case):
    with pytest.raises(ValueError, match=r"param 1 has dtype torch.complex64; parameters must be real"):
        case.build([matrix(), nn.Parameter(torch.randn(9, 9, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="empty parameter list"):
        case.build([])


@pytest.mark.few(case=FEW)
@every_case
def test_sparse_gradients(case):
    table, other = nn.Embedding(10, 12, sparse=True), matrix()
    optimizer = case.build([("table", table.weight), ("other", other)])
    table(torch.tensor([1, 2])).sum().backward()
    other.grad, before = torch.ones(12, 20), other.detach().clone()
    with pytest.raises(RuntimeError, match=r"the gradient of table is sparse .* sparse=False, or give it to"):
        optimizer.step()
    assert torch.equal(other, before)


def test_messages_name_the_class():
    for case in CASES:
        with pytest.raises(ValueError, match=case.make.__name__):
            case.build([nn.Parameter(torch.randn(3))])


@pytest.mark.few(case=FEW)
@ranked
def test_strict_also_covers_later_groups(case):
    optimizer = case.build([matrix()], rank=9, strict=True)
    with pytest.raises(ValueError, match=r"param 1 cannot be projected \(rank 9 >= min\(4, 32\)\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 32))]})
    assert len(optimizer.param_groups) == len(optimizer.report()) == 1


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize(
    "edit", [{"rank": 5}, {"proj_type": "left"}, {"state_dtype": "int8"}, {"seed": 3}, {"as_matrix": "batch"}]
)
def test_edits_that_could_not_take_effect(case, edit):
    p = matrix()
    optimizer = case.build([p], rank=3)
    p.grad = torch.randn(12, 20)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=r"fixed once it has state: .* became .*add_param_group"):
        optimizer.step()
    assert torch.equal(p, before)


def test_eps_of_the_other_kind():
    with pytest.raises(ValueError, match=r"eps must be one number here, got \(1e-08, 0.001\)"):
        lowrank_optim.GaLoreAdamW([matrix()], eps=(1e-8, 1e-3))
    with pytest.raises(ValueError, match=r"eps must be a pair here, got 1e-08; for example \(None, 0.001\)"):
        lowrank_optim.GaLoreAdafactor([matrix()], eps=1e-8)


@pytest.mark.few(case=FEW)
@every_case
def test_values_that_are_no_group_are_refused(case):
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        case.build(matrix())
    with pytest.raises(TypeError, match=r"a param group is a dict with the key 'params', got list"):
        case.build([matrix()]).add_param_group([matrix()])


def test_estimates_that_cannot_be_made():
    with pytest.raises(ValueError, match="Adafactor cannot be estimated: its step needs numbers"):
        lowrank_optim.estimate_memory([(8, 8)], torch.optim.Adafactor)


@pytest.mark.parametrize("call", [lowrank_optim.param_groups, lowrank_optim.merge, lowrank_optim.quantize_weights])
def test_values_that_are_no_module_are_refused(call):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got generator"):
        call(Net().parameters())
