"""Mixed precision: products in 16 bits beside float32 weights."""

from __future__ import annotations

import torch

from .job import Job

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, AMP[amp], enabled=AMP[amp] is not None)


def scaler(job: Job) -> torch.amp.GradScaler:
    """float16 loses small gradients unless the loss is scaled up; without it the scaler only passes calls on."""
    return torch.amp.GradScaler(torch.device(job.device).type, enabled=job.amp == "fp16")
