"""All optimizers share the order, the defaults and the annotations of the arguments that GaLoreAdamW has as well.

To change one optimizer for another, a user changes its name only. Each exception is listed with its reason.
"""

from __future__ import annotations

import inspect

import pytest
import torch

import lowrank_optim

COMMON = inspect.signature(lowrank_optim.GaLoreAdamW).parameters
BASES = (lowrank_optim.LowRankOptimizer, lowrank_optim.WeightSpaceOptimizer)  # their subclasses are public optimizers
PUBLIC = [getattr(lowrank_optim, name) for name in lowrank_optim.__all__]
CLASSES = [x for x in PUBLIC if isinstance(x, type) and issubclass(x, torch.optim.Optimizer) and x not in BASES]
every_class = pytest.mark.parametrize("make", CLASSES, ids=lambda make: make.__name__)

PAPER = "the paper's value"
FACTORS = "weight decay pulls factors to zero, which the papers do not do"
SHARE = "a share of each layer; there is no layer that is left out, as with 'auto'"
ADAFACTOR = "torch.optim.Adafactor's"
RESET = "coordinates of the new subspace start at zero, as published"
TURNED = "moments follow the subspace, as published"
# (class, argument): (default, reason); the default is of the class, where COMMON has another one
DEFAULTS = {
    ("APOLLOMini", "scale"): (128.0, PAPER),
    ("DCTAdamW", "update_proj_gap"): (1, PAPER),
    ("DCTAdamW", "moments"): ("rotate", TURNED),
    ("FRUGAL", "basis"): ("rows", "rows of the identity are the method"),
    ("FRUGAL", "moments"): ("reset", RESET),
    ("Flora", "eps"): (None, ADAFACTOR),
    ("Flora", "weight_decay"): (0.0, ADAFACTOR),
    ("Flora", "update_proj_gap"): (1000, PAPER),
    ("Flora", "moments"): ("rotate", TURNED),
    ("GaLoreAdafactor", "lr"): (1e-2, ADAFACTOR),
    ("GaLoreAdafactor", "eps"): ((None, 1e-3), ADAFACTOR),
    ("GaLoreAdafactor", "weight_decay"): (0.0, ADAFACTOR),
    ("GaLoreAdamW8bit", "state_dtype"): ("int8", "its name"),
    ("GoLoreAdamW", "moments"): ("rotate", TURNED),
    ("LDAdamW", "betas"): ((0.908, 0.99), PAPER),
    ("LDAdamW", "update_proj_gap"): (1, "a basis for each step is the method"),
    ("LDAdamW", "moments"): ("rotate", TURNED),
    ("QGaLoreAdamW", "state_dtype"): ("int8", PAPER),
    ("SNSMAdamW", "moments"): ("reset", RESET),
    ("SubspaceMomentum", "lr"): (1e-2, "steps of SGD with momentum are not normalized"),
    ("SubspaceMomentum", "weight_decay"): (0.0, "torch.optim.SGD's"),
    ("SubspaceMomentum", "moments"): ("reset", RESET),
    ("LoQT", "update_proj_gap"): (100, PAPER),
    ("LoQT", "scale"): (0.5, PAPER),
    ("LoQT", "moments"): ("reset", RESET),
    ("LTE", "rank"): (0.25, SHARE),
    ("LoQT", "rank"): (0.25, SHARE),
    ("LowRankAdamW", "rank"): (0.25, SHARE),
    ("ReLoRA", "rank"): (0.25, SHARE),
    ("SLTrain", "rank"): (0.25, SHARE),
    ("SST", "rank"): (0.0625, SHARE),
    **{(name, "weight_decay"): (0.0, FACTORS) for name in ("LTE", "LoQT", "LowRankAdamW", "ReLoRA", "SLTrain", "SST")},
}
ANNOTATIONS = {
    ("Flora", "eps"): "two numbers as in torch.optim.Adafactor, or one for the AdamW base",
    ("GaLoreAdafactor", "eps"): "two numbers as in torch.optim.Adafactor",
    **{(name, "rank"): SHARE for name in ("LTE", "LoQT", "LowRankAdamW", "ReLoRA", "SLTrain", "SST")},
}


def common_of(make):
    own = inspect.signature(make).parameters
    return {name: parameter for name, parameter in own.items() if name in COMMON}


def test_the_classes_are_found():
    assert {"GaLoreAdamW", "APOLLO", "Flora", "SubspaceMomentum", "ReLoRA", "Composed"} <= {x.__name__ for x in CLASSES}
    assert {name for name, _ in {**DEFAULTS, **ANNOTATIONS}} <= {x.__name__ for x in CLASSES}


@every_class
def test_common_arguments_are_those_of_galore_adamw(make):
    names, own = list(inspect.signature(make).parameters), common_of(make)
    assert names[0] in ("params", "model")
    assert [x for x in ("maximize", "foreach", "capturable", "differentiable", "fused") if x not in names] == []
    assert list(own) == [name for name in COMMON if name in own], "the same order"
    assert all(parameter.kind == COMMON[name].kind for name, parameter in own.items())
    defaults = {name: x.default for name, x in own.items() if x.default != COMMON[name].default}
    assert defaults == {name: value for (owner, name), (value, _) in DEFAULTS.items() if owner == make.__name__}
    annotations = {name for name, x in own.items() if x.annotation != COMMON[name].annotation}
    assert annotations == {name for owner, name in ANNOTATIONS if owner == make.__name__}
