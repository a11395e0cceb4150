"""Low-rank, memory-efficient training methods as drop-in torch.optim classes."""

from .groups import param_groups
from .memory import MemoryEstimate, estimate_memory
from .methods.galore import GaLoreAdamW
from .methods.galore_adafactor import GaLoreAdafactor
from .optimizer import LowRankOptimizer
from .report import Report, state_bytes

__version__ = "0.1.0"

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "LowRankOptimizer",
    "MemoryEstimate",
    "Report",
    "estimate_memory",
    "param_groups",
    "state_bytes",
]
