"""Published packages to compare with, imported without the heavy requirements that the comparison does not touch.

`PEERS` has one maker for each method that has a package of its own. They are only run, through what their descriptions
document: several have licences that forbid more.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

NEVER = 10**9  # steps between refreshes, which are made due one by one
Params = dict[str, nn.Parameter]


class Peer(NamedTuple):
    """The package of a method, and its optimizer for named parameters at a rank."""

    package: str
    make: Callable[[Params, int], torch.optim.Optimizer]


def galore_torch() -> Any:
    """The module `galore_torch`, or ImportError where it is not installed.

    It imports bitsandbytes for its 8-bit class and transformers for a version check; empty stand-ins do for both.
    """
    _stand_in("bitsandbytes.optim.optimizer", Optimizer2State=object)
    _stand_in("transformers.utils.versions", require_version=lambda *_: None)
    return importlib.import_module("galore_torch")


def split(params: Params, **low: Any) -> list[dict[str, Any]]:
    """Two groups: what is not projected, and the matrices with their options."""
    matrices = [p for key, p in params.items() if "_proj" in key]
    return [{"params": [p for key, p in params.items() if "_proj" not in key]}, {"params": matrices, **low}]


def _galore(params: Params, rank: int) -> torch.optim.Optimizer:
    groups = split(params, rank=rank, update_proj_gap=NEVER, scale=0.25, proj_type="std")
    return galore_torch().GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)


def _apollo(params: Params, rank: int, scale: float = 1.0, kind: str = "channel") -> torch.optim.Optimizer:
    low = {"rank": rank, "update_proj_gap": NEVER, "scale": scale, "proj": "random", "proj_type": "std"}
    groups = split(params, scale_type=kind, **low)
    return importlib.import_module("apollo_torch").APOLLOAdamW(groups, lr=1e-3)


def _apollo_mini(params: Params, rank: int) -> torch.optim.Optimizer:
    return _apollo(params, 1, 128.0, "tensor")


def _fira(params: Params, rank: int) -> torch.optim.Optimizer:
    groups = split(params, rank=rank, update_proj_gap=NEVER, alpha=1.0, proj_type="std")
    return importlib.import_module("fira").FiraAdamW(groups, lr=1e-3, no_deprecation_warning=True)


def _flora(params: Params, rank: int) -> torch.optim.Optimizer:
    rest, matrices = split(params, rank=rank)
    groups = [{**rest, "rank": None}, matrices]
    return importlib.import_module("flora_opt").Flora(groups, lr=1e-3, beta1=0.9, kappa=NEVER)


def _snsm(params: Params, rank: int) -> torch.optim.Optimizer:
    path = os.environ.get("SN_SM")
    if path is None:
        raise ImportError("set SN_SM to a checkout of it")
    if path not in sys.path:
        sys.path.append(path)
    groups = split(params, rank=rank, update_proj_gap=NEVER, proj_type="svd", subset_size="heuristics")
    kinds = {"momentum_type": "sm", "second_moment_type": "sn"}
    return importlib.import_module("GenericOptim").GenericOptim(groups, lr=1e-3, **kinds)


def _dct(params: Params, rank: int) -> torch.optim.Optimizer:
    """Of its package only the modules that it needs. It knows one width, so narrower embeddings are left out."""
    spec = importlib.util.find_spec("ista_daslab_optimizers")
    if spec is None:
        raise ImportError("ista_daslab_optimizers is not installed")
    package = types.ModuleType("ista_daslab_optimizers")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules.setdefault(package.__name__, package)
    kind = importlib.import_module("ista_daslab_optimizers.fft_low_rank.dct_adamw").DCTAdamW
    matrices = [p for key, p in params.items() if "_proj" in key]
    width, widest = min(min(p.shape) for p in matrices), max(max(p.shape) for p in matrices)
    known = [p for p in params.values() if p.dim() == 1 or min(p.shape) == width]
    return kind(known, lr=1e-3, weight_decay=0.0, rank=rank, proj="dct", max_shape=widest + 1)


def _stand_in(path: str, **names: Any) -> None:
    parts = path.split(".")
    if parts[0] in sys.modules or importlib.util.find_spec(parts[0]) is not None:
        return
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        sys.modules[module.__name__] = module
    vars(module).update(names)


PEERS: dict[str, Peer] = {  # by the name of our method
    "GaLoreAdamW": Peer("galore-torch 1.0", _galore),
    "FiraAdamW": Peer("fira 1.0.2", _fira),
    "APOLLO": Peer("apollo-torch 1.0.3", _apollo),
    "APOLLOMini": Peer("apollo-torch 1.0.3, Mini", _apollo_mini),
    "Flora": Peer("flora-opt 0.0.3", _flora),
    "SNSMAdamW": Peer("sn-sm a4c1a4a", _snsm),
    "DCTAdamW": Peer("ista-daslab-optimizers 1.1.15", _dct),
}
