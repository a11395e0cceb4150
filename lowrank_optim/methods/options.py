"""Describe the options that all methods share, and provide the helpers of their constructors and restarts."""

from __future__ import annotations

from typing import Any

OPTIONS = """
    Options that every method has:
        maximize: ascend instead of descend.
        foreach: stack equal matrices and update them together. None does so on accelerators and loops on CPU.
        state_dtype: how moments and bases are kept: "float32", "bfloat16" (rounded stochastically), "int8" or "int4"
            (in blocks; bases are then bfloat16; vectors and parameters below 4096 elements stay float32).
        bf16_update: how bfloat16 weights are rounded, after float32 arithmetic: "stochastic" (unbiased), "kahan" (keeps
            the rounding error, 2 bytes per weight; also for float16), "none" (to nearest, so small updates vanish).
        nonfinite: "skip" leaves a parameter with a NaN or infinite gradient out of the step, counts it and warns once;
            "raise" stops before anything is updated.
        strict: True refuses a parameter that its group wants to project but that cannot be projected; False reports it.
        seed: of all random numbers. They are functions of (seed, parameter name, count). Nothing touches torch's
            generators, and every rank and device draws the same numbers.

    Keys that only groups have:
        skip_embeddings: do not project matrices whose names look like an embedding or a head. Default True, but False
            in a group that sets its own `rank`.
        as_matrix: "flatten" reads a parameter of more than two dimensions as (first, all others), "batch" as a stack of
            matrices; "auto" stacks three dimensions unless the last is below 16, as in a 1-D convolution's kernel.

    Errors:
        ValueError: an option or group key that is out of range, misspelt or unknown; nothing to project.
        FloatingPointError: a non-finite gradient under `nonfinite="raise"`.
        RuntimeError: a sparse gradient.
"""

WEIGHT_OPTIONS = """
    Options that every weight-space method has:
        model: an nn.Module that is not wrapped yet (wrap it afterwards). Its linear layers are converted in place,
            those that `param_groups` would choose: not the head, no embedding, no layer that is frozen or too small for
            the rank. All other parameters get AdamW. For fully_shard, which replaces parameters: `convert` the model,
            shard it, and create the optimizer afterwards.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. Decay of factors is not decay of the weight: it shrinks
            the nuclear norm of their product, so the default is 0. Vectors never decay.
        include, exclude: regular expressions, searched in names of parameters, that decide before any other rule.
        rest_lr: lr of the parameters that are not converted; None: lr.
        state_dtype: how moments are kept: "float32", "bfloat16" (rounded stochastically), "int8" or "int4" (in blocks;
            vectors and parameters below 4096 elements stay float32).
        bf16_update: how bfloat16 parameters are rounded, after float32 arithmetic: "stochastic" (unbiased), "kahan"
            (keeps the rounding error, 2 bytes per element; also for float16), "none" (to nearest, so small updates
            vanish).
        nonfinite: "skip" leaves a parameter with a NaN or infinite gradient out of the step, counts it and warns once;
            "raise" stops before anything is updated.
        strict: True refuses a layer that is chosen but cannot be converted; False reports it.
        maximize, foreach, capturable, differentiable, fused: as for all methods. The last three are refused unless they
            keep their default.
        seed: of all random numbers. They are functions of (seed, layer name, count), equal on every rank and device.

    `lowrank_optim.merge(model)` turns the converted layers back into plain layers. To continue a run, build the model
    and this optimizer again, and load both state dicts.

    Errors:
        TypeError: `model` is no module.
        ValueError: an option is out of range; the model is wrapped, converted already or quantized; no layer can be
            converted. The model is then unchanged.
"""


ONE_SIDED = ("std", "reverse_std", "left", "right")  # proj_type of methods that cannot project both sides


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options among the `locals()` of a constructor, which become the defaults of its groups."""
    kept = arguments.keys() - {"self", "params", "model", "strict", "__class__"}
    return {key: x for key, x in arguments.items() if key in kept}


def restarts_due(count: int, group: dict[str, Any]) -> tuple[bool, bool]:
    """Return (refactorize, reset moments): which restarts are due after `count` updates."""
    periods = group["refactor_every"], group["reset_every"]
    refactor, reset = (period is not None and count % period == 0 for period in periods)
    return refactor, reset
