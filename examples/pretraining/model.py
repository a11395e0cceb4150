"""LLaMA from a job, the same weights for every optimizer."""

from __future__ import annotations

import hashlib

import torch
from torch.distributed.tensor import DTensor

from .job import Job

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(job: Job) -> torch.nn.Module:
    """Drawn on the CPU in float32 from the seed alone, then moved: the device does not change the initial weights."""
    return drawn(job).to(job.device)


def drawn(job: Job) -> torch.nn.Module:
    """On the CPU still."""
    torch.manual_seed(job.seed)
    return torch.nn.Module.to(_llama(job), dtype=DTYPES[job.dtype])


def skeleton(job: Job) -> torch.nn.Module:
    """The same model without memory."""
    with torch.device("meta"):
        return torch.nn.Module.to(_llama(job), dtype=DTYPES[job.dtype])


def _llama(job: Job) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=job.hidden,
        intermediate_size=job.mlp,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        num_key_value_heads=job.heads,
        vocab_size=job.vocab,
        max_position_embeddings=job.sequence,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the first values of every parameter: enough to see that two runs began alike."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        total.update(whole.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]
