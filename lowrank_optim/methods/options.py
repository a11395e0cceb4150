"""What methods share: the options that all have, described once, and the slots of those that project like GaLore."""

from __future__ import annotations

from typing import Any

OPTIONS = """
    Options that every method has:
        maximize: ascend instead.
        foreach: stack equal matrices and update them together; None does so on accelerators and loops on CPU.
        state_dtype: "float32", "bfloat16" (rounded stochastically), "int8" or "int4" (blockwise; then bases in
            bfloat16; vectors and parameters below 4096 elements stay float32): of moments and bases.
        bf16_update: how bfloat16 weights are rounded, after float32 arithmetic: "stochastic" (unbiased), "kahan" (keeps
            what was lost, 2 bytes per weight; also for float16), "none" (to nearest: small updates vanish).
        nonfinite: "skip" leaves a parameter with a NaN or infinite gradient out of the step, counts it and warns once;
            "raise" stops before anything is updated.
        strict: True refuses parameters that were to be projected and cannot be, instead of reporting them.
        seed: of all random numbers. They are functions of (seed, parameter name, count): nothing touches torch's
            generators, and every rank and device draws the same.

    Keys that only groups have:
        skip_embeddings: leave matrices alone whose names look like an embedding or a head. Default True, but False in
            a group that sets its own `rank`.
        as_matrix: "flatten" reads a parameter of more than two dimensions as (first, rest), "batch" as a stack of
            matrices; "auto" stacks three dimensions unless the last is below 16, a 1-D convolution's kernel.

    Errors:
        ValueError: an option or group key that is out of range, misspelt or unknown; nothing to project.
        FloatingPointError: a non-finite gradient under `nonfinite="raise"`.
        RuntimeError: a sparse gradient.
"""

WEIGHT_OPTIONS = """
    Options that every weight-space method has:
        model: a bare nn.Module (wrap it after), whose linear layers are converted in place as `param_groups` would
            choose them: not the head, no embedding, nothing frozen or too small for the rank. The rest gets AdamW. For
            fully_shard, which replaces parameters: `convert` it, shard it, and make the optimizer then.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. Decay of factors is not decay of the weight: it shrinks
            the nuclear norm of their product; hence 0. Vectors never decay.
        include, exclude: regular expressions, searched in names of parameters, that decide before anything else.
        rest_lr: lr of all that is not converted; None: lr.
        state_dtype: "float32", "bfloat16" (rounded stochastically), "int8" or "int4" (blockwise; vectors and parameters
            below 4096 elements stay float32): of moments.
        bf16_update: how bfloat16 parameters are rounded, after float32 arithmetic: "stochastic" (unbiased), "kahan"
            (keeps what was lost, 2 bytes per element; also for float16), "none" (to nearest: small updates vanish).
        nonfinite: "skip" leaves a parameter with a NaN or infinite gradient out of the step, counts it and warns once;
            "raise" stops before anything is updated.
        strict: True refuses layers that were to be converted and cannot be, instead of reporting them.
        maximize, foreach, capturable, differentiable, fused: as for all methods; capturable and those after it are
            refused unless left at their default.
        seed: of all random numbers: functions of (seed, layer name, count), equal on every rank and device.

    `lowrank_optim.merge(model)` gives plain layers back. To continue a run build the model and this optimizer anew, and
    load both state dicts.

    Errors:
        TypeError: no module.
        ValueError: an option that is out of range; a model that is wrapped, converted already or quantized; nothing to
            convert. The model is then as it was.
"""


ONE_SIDED = ("std", "reverse_std", "left", "right")  # proj_type of methods that cannot project both sides


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among the `locals()` of a constructor: what becomes the defaults of its groups."""
    kept = arguments.keys() - {"self", "params", "model", "strict", "__class__"}
    return {key: x for key, x in arguments.items() if key in kept}


def restarts_due(count: int, group: dict[str, Any]) -> tuple[bool, bool]:
    """(refactorise, reset moments) after `count` updates."""
    periods = group["refactor_every"], group["reset_every"]
    refactor, reset = (period is not None and count % period == 0 for period in periods)
    return refactor, reset
