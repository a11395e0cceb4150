"""Every method, and torch's own, for measurements at the shapes of the paper's models."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import lowrank_optim
from benchmarks import nano

_optimizers = nano.example("optimizers")  # torch's Adafactor and Muon, made fit for a whole model

Entry = tuple[type[torch.optim.Optimizer], dict[str, Any]]  # and the options that are not defaults

TORCH: dict[str, Entry] = {
    "torch AdamW": (torch.optim.AdamW, {}),
    "torch SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "torch Adafactor": (_optimizers.Adafactor, {}),
    "torch Muon, AdamW": (_optimizers.Muon, {}),
}
OURS: dict[str, Entry] = {
    "GaLoreAdamW": (lowrank_optim.GaLoreAdamW, {}),
    "GaLoreAdamW8bit": (lowrank_optim.GaLoreAdamW8bit, {}),
    "GaLoreAdafactor": (lowrank_optim.GaLoreAdafactor, {}),
    "GaLorePlusAdamW": (lowrank_optim.GaLorePlusAdamW, {}),
    "QGaLoreAdamW": (lowrank_optim.QGaLoreAdamW, {}),
    "FiraAdamW": (lowrank_optim.FiraAdamW, {}),
    "APOLLO": (lowrank_optim.APOLLO, {}),
    "APOLLOMini": (lowrank_optim.APOLLOMini, {}),
    "LDAdamW": (lowrank_optim.LDAdamW, {}),
    "FRUGAL": (lowrank_optim.FRUGAL, {}),
    "GoLoreAdamW": (lowrank_optim.GoLoreAdamW, {"random_after": 10**9}),
    "DCTAdamW": (lowrank_optim.DCTAdamW, {}),
    "Flora": (lowrank_optim.Flora, {}),
    "SubsetNormAdamW": (lowrank_optim.SubsetNormAdamW, {}),
    "SubspaceMomentum": (lowrank_optim.SubspaceMomentum, {}),
    "SNSMAdamW": (lowrank_optim.SNSMAdamW, {}),
}


def default(optimizer: type[torch.optim.Optimizer], option: str) -> Any:
    """Of its signature; None where it has no such option."""
    parameter = inspect.signature(optimizer).parameters.get(option)
    return None if parameter is None else parameter.default


def ranked(optimizer: type[torch.optim.Optimizer]) -> bool:
    """Does its rank follow the model's? APOLLO-Mini's is 1, and Subset-Norm has none."""
    return default(optimizer, "rank") is not None and optimizer is not lowrank_optim.APOLLOMini
