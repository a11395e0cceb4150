"""Low-rank, memory-efficient training methods as drop-in torch.optim classes."""

from .accumulate import CompressedAccumulation
from .full_state import full_state, load_full_state
from .groups import param_groups
from .layers.convert import convert, merge
from .layers.linear import LowRankLinear, ReparameterizedLinear
from .layers.multihead import MultiHeadLinear
from .layers.quantized import Int8Weight, NF4Weight, quantize_weights
from .layers.quantized_linear import QuantizedLinear
from .layers.sparse import SparseLowRankLinear
from .layers.spectral import SpectralLinear
from .memory.estimate import MemoryEstimate, estimate_memory
from .memory.report import MemoryReport, memory_report
from .methods.apollo import APOLLO
from .methods.apollo_mini import APOLLOMini
from .methods.composed import Composed, compose
from .methods.dct import DCTAdamW
from .methods.fira import FiraAdamW
from .methods.flora import Flora
from .methods.frugal import FRUGAL
from .methods.galore import GaLoreAdamW, GaLoreAdamW8bit
from .methods.galore_adafactor import GaLoreAdafactor
from .methods.galore_plus import GaLorePlusAdamW
from .methods.golore import GoLoreAdamW
from .methods.ldadam import LDAdamW
from .methods.loqt import LoQT
from .methods.low_rank import LowRankAdamW
from .methods.lte import LTE
from .methods.q_galore import QGaLoreAdamW
from .methods.relora import ReLoRA
from .methods.sltrain import SLTrain
from .methods.snsm import SNSMAdamW
from .methods.sst import SST
from .methods.subset_norm import SubsetNormAdamW
from .methods.subspace_momentum import SubspaceMomentum
from .modes.backward import StepInBackward, step_in_backward
from .modes.ddp_project import DDPProject, ddp_project
from .ops.native import BackendInfo, backend_info
from .optimizer import LowRankOptimizer
from .reports.report import Report, state_bytes
from .schedules import JaggedCosine, jagged_cosine
from .weight_space import WeightSpaceOptimizer

__version__ = "0.1.0"

__all__ = [
    "APOLLO",
    "FRUGAL",
    "LTE",
    "SST",
    "APOLLOMini",
    "BackendInfo",
    "Composed",
    "CompressedAccumulation",
    "DCTAdamW",
    "DDPProject",
    "FiraAdamW",
    "Flora",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLorePlusAdamW",
    "GoLoreAdamW",
    "Int8Weight",
    "JaggedCosine",
    "LDAdamW",
    "LoQT",
    "LowRankAdamW",
    "LowRankLinear",
    "LowRankOptimizer",
    "MemoryEstimate",
    "MemoryReport",
    "MultiHeadLinear",
    "NF4Weight",
    "QGaLoreAdamW",
    "QuantizedLinear",
    "ReLoRA",
    "ReparameterizedLinear",
    "Report",
    "SLTrain",
    "SNSMAdamW",
    "SparseLowRankLinear",
    "SpectralLinear",
    "StepInBackward",
    "SubsetNormAdamW",
    "SubspaceMomentum",
    "WeightSpaceOptimizer",
    "backend_info",
    "compose",
    "convert",
    "ddp_project",
    "estimate_memory",
    "full_state",
    "jagged_cosine",
    "load_full_state",
    "memory_report",
    "merge",
    "param_groups",
    "quantize_weights",
    "state_bytes",
    "step_in_backward",
]
