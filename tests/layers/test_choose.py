"""Which linear layers are chosen; what `quantize_weights` says of it is in test_quantized_weights.py."""

from __future__ import annotations

import pytest
from torch import nn

from lowrank_optim.layers.choose import linears
from lowrank_optim.layers.quantized import Int8Weight


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False))
    layers[3].weight = layers[0].weight
    return layers


def test_layers_that_share_a_weight_come_together():
    m = model()
    assert linears(m, to="convert") == {"0.weight": [m[0], m[3]], "1.weight": [m[1]]}
    assert linears(m, ["0"], ["1"], to="convert") == {"0.weight": [m[0], m[3]]}


def test_quantized_weights_are_not_chosen_again():
    m = model()
    m[1].weight = nn.Parameter(Int8Weight.quantize(m[1].weight))
    assert linears(m, to="convert") == {"0.weight": [m[0], m[3]]}


def test_messages_name_the_operation():
    with pytest.raises(ValueError, match="LayerNorm has no linear layers with float weights; nothing to convert"):
        linears(nn.LayerNorm(4), to="convert")
    m = model()
    m.append(nn.Module())
    m[4].register_parameter("table", m[1].weight)
    with pytest.raises(ValueError, match=r"1.weight is shared by Linear, Module; to convert it, only linear layers"):
        linears(m, to="convert")
    assert list(linears(m, exclude=["1"], to="convert")) == ["0.weight"], "what is not chosen may be shared"
