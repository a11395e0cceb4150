"""Model sizes and recipes: `nano` for a laptop or a test machine, the others of the GaLore paper (2403.03507)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One LLaMA size with its training recipe; `optimizers` maps a class name to its default lr and keywords."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    steps: int
    vocab: int = 32000
    sequence: int = 256
    batch: int = 512  # sequences per update
    micro_batch: int = 64  # sequences per forward pass; more of them are accumulated
    eval_every: int = 1000
    save_every: int = 1000
    val_tokens: int = 2**20
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)


def _paper(
    rank: int, alpha: float, loqt: float, spectral: int, density: float = 0.03, update_proj_gap: int = 200
) -> dict[str, dict[str, Any]]:
    """The values of the papers, not swept here: GaLore's, then each method's own; LTE's has none for language models.

    Args:
        rank: of most methods.
        alpha, density: of SLTrain.
        loqt: LoQT's scale.
        spectral: rank of SST, whose lr is a guess.
    """
    low = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": 0.25}
    return {
        "AdamW": {"lr": 1e-3},
        "GaLoreAdamW": {"lr": 1e-2, **low},
        "GaLoreAdafactor": {"lr": 1e-2, **low},
        "ReLoRA": {"lr": 1e-3, "rank": 128, "alpha": 32.0, "merge_every": 5000},
        "SLTrain": {"lr": 3e-3, "rank": rank, "alpha": alpha, "density": density},
        "LoQT": {"lr": 1e-2, "eps": 1e-6, "rank": rank, "scale": loqt, "update_proj_gap": 100, "gap_growth": 1.2},
        "LowRankAdamW": {"lr": 1.5e-3, "rank": rank, "alpha": 32.0, "init": "random", **_restarts(200)},
        "SST": {"lr": 1e-3, "rank": spectral, "iteration_steps": 200},
    }


def _restarts(period: int) -> dict[str, Any]:
    return {"refactor_every": period, "reset_every": period}


# What `python -m benchmarks.quality sweep` starts from, and ends in: `scale` and `matrix_lr_scale` make the lr of the
# matrices another one than that of the rest, which is the best that AdamW found. With one lr for everything AdamW's
# best loss is a fifth higher, so torch's optimizers get such a factor as well.
_RANK: dict[str, Any] = {"rank": 0.25}
_LOW: dict[str, Any] = {**_RANK, "update_proj_gap": 50}
_FACTORED: dict[str, Any] = {"relative_step": False, "scale_parameter": False}
_SPLIT: dict[str, Any] = {"rest_lr": 0.032, **_RANK}
_NANO: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.032, "matrix_lr_scale": 0.03125},
    "Adafactor": {"lr": 0.032, "matrix_lr_scale": 1.0},
    "Muon": {"lr": 0.032, "matrix_lr_scale": 0.125},
    "GaLoreAdamW": {"lr": 0.032, "scale": 0.0625, **_LOW},
    "GaLoreAdamW8bit": {"lr": 0.032, "scale": 0.0625, **_LOW},
    "GaLoreAdafactor": {"lr": 0.016, "scale": 0.125, **_LOW, "beta1": 0.9, **_FACTORED},
    "GaLorePlusAdamW": {"lr": 0.032, "scale": 0.125, **_LOW},
    "QGaLoreAdamW": {"lr": 0.032, "scale": 0.0625, **_LOW},
    "FiraAdamW": {"lr": 0.032, "scale": 0.0625, **_LOW},
    "APOLLO": {"lr": 0.032, "scale": 1 / 64, **_LOW},
    "APOLLOMini": {"lr": 0.032, "scale": 0.25, "update_proj_gap": 50},
    "LDAdamW": {"lr": 0.032, "scale": 0.125, **_RANK},
    "FRUGAL": {"lr": 0.032, "scale": 0.03125, **_LOW},
    "GoLoreAdamW": {"lr": 0.032, "scale": 0.0625, **_LOW},
    "DCTAdamW": {"lr": 0.032, "scale": 0.03125, **_RANK},
    "Flora": {"lr": 0.016, "scale": 0.03125, **_RANK, "update_proj_gap": 100, "scale_parameter": False},
    "SubsetNormAdamW": {"lr": 0.032, "scale": 0.015625, "reduce": "mean"},
    "SubspaceMomentum": {"lr": 1.0, "scale": 1.0, **_LOW},
    "SNSMAdamW": {"lr": 0.032, "scale": 0.03125, **_LOW, "reduce": "mean"},
    "Composed": {"lr": 0.032, "scale": 0.0625, **_LOW},
    "ReLoRA": {**_SPLIT, "lr": 0.004, "merge_every": 50},
    "LTE": {**_SPLIT, "lr": 0.001, "merge_every": 10},
    "SLTrain": {**_SPLIT, "lr": 0.002, **_restarts(50)},
    "LoQT": {**_SPLIT, "lr": 0.004, "update_proj_gap": 50},
    "SST": {**_SPLIT, "lr": 0.004, "iteration_steps": 50},
    "LowRankAdamW": {**_SPLIT, "lr": 0.002, **_restarts(50)},
}

PRESETS = {
    "nano": Preset(
        hidden=192,
        mlp=512,
        layers=4,
        heads=4,
        steps=400,
        vocab=2048,
        sequence=128,
        batch=8,
        micro_batch=8,
        eval_every=100,
        save_every=100,
        val_tokens=2**15,
        optimizers=_NANO,
    ),
    "60m": Preset(512, 1376, 8, 8, 10_000, optimizers=_paper(128, 32.0, 0.4, 64)),
    "130m": Preset(768, 2048, 12, 12, 20_000, optimizers=_paper(256, 16.0, 0.5, 64)),
    "350m": Preset(1024, 2736, 24, 16, 60_000, micro_batch=32, optimizers=_paper(256, 16.0, 0.5, 64)),
    "1b": Preset(2048, 5461, 24, 32, 100_000, micro_batch=16, optimizers=_paper(512, 8.0, 0.25, 128)),
    "7b": Preset(4096, 11008, 32, 32, 150_000, micro_batch=8, optimizers=_paper(1024, 8.0, 0.25, 256, density=0.05)),
}
