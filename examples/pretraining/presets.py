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


def _paper(rank: int, update_proj_gap: int = 200) -> dict[str, dict[str, Any]]:
    """The GaLore paper's values, not swept here."""
    low = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": 0.25}
    return {"AdamW": {"lr": 1e-3}, "GaLoreAdamW": {"lr": 1e-2, **low}, "GaLoreAdafactor": {"lr": 1e-2, **low}}


# What `python -m benchmarks.quality sweep` starts from, and ends in: `scale` and `matrix_lr_scale` make the lr of the
# matrices another one than that of the rest, which is the best that AdamW found. With one lr for everything AdamW's
# best loss is a fifth higher, so torch's optimizers get such a factor as well.
_RANK: dict[str, Any] = {"rank": 0.25}
_LOW: dict[str, Any] = {**_RANK, "update_proj_gap": 50}
_FACTORED: dict[str, Any] = {"relative_step": False, "scale_parameter": False}
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
    "60m": Preset(512, 1376, 8, 8, 10_000, optimizers=_paper(128)),
    "130m": Preset(768, 2048, 12, 12, 20_000, optimizers=_paper(256)),
    "350m": Preset(1024, 2736, 24, 16, 60_000, micro_batch=32, optimizers=_paper(256)),
    "1b": Preset(2048, 5461, 24, 32, 100_000, micro_batch=16, optimizers=_paper(512)),
    "7b": Preset(4096, 11008, 32, 32, 150_000, micro_batch=8, optimizers=_paper(1024)),
}
