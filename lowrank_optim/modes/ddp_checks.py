"""The refusals of `ddp_project` and their messages. All options are checked before the hook is registered."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from .. import checks, hyperparameters
from ..optimizer import LowRankOptimizer
from ..recipe.recipe import Recipe

_WHOLE = "Leave ddp_project out: under DistributedDataParallel this optimizer then gets whole gradients, as usual"


def everything(model: object, optimizer: object, options: dict[str, object]) -> None:
    """Refuse what cannot train with `ddp_project`."""
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(f"ddp_project needs an optimizer of lowrank_optim, got {type(optimizer).__name__}")
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"ddp_project needs the model that DistributedDataParallel returned, got {type(model).__name__}. Sharded "
            "models (fully_shard) already send only r x n numbers per matrix for low-rank methods"
        )
    hyperparameters.check(options, {"clip": ("global", "tensor")})
    if options["clip"] != "global" and options["clip_norm"] is None:
        raise ValueError(f"clip={options['clip']!r} without clip_norm clips nothing. Pass clip_norm, or leave clip out")
    _one_way(optimizer)
    _plain_wrapper(model)
    checks.of_model(model, optimizer.table.plans)
    something_thin(optimizer)


def _one_way(optimizer: LowRankOptimizer) -> None:
    """Refuse an optimizer that takes its steps in another way."""
    if optimizer.mode is not None and optimizer.mode.name == "step_in_backward":
        raise ValueError(
            "this optimizer steps during backward, before ranks have averaged gradients; remove() that handle"
        )
    if optimizer.mode is not None:
        raise ValueError("this optimizer has projected gradients already; call ddp_project once")
    if any(group["capturable"] for group in optimizer.param_groups):
        raise NotImplementedError(f"ddp_project with capturable=True: the graph reads whole gradients. {_WHOLE}")


def _plain_wrapper(model: DistributedDataParallel) -> None:
    """Refuse ways of DDP in which parameters have no gradient, or hooks are called at other times."""
    ways = {
        "find_unused_parameters=True": model.find_unused_parameters,
        "static_graph=True": model.static_graph,
        "mixed_precision": getattr(model, "mixed_precision", None) is not None,
        "another communication hook": bool(getattr(model, "_comm_hooks", ())),
    }
    for way in (way for way, taken in ways.items() if taken):
        raise NotImplementedError(f"ddp_project does not work for a model with {way}. {_WHOLE}")


def not_joined(model: DistributedDataParallel) -> None:
    """Refuse `model.join()`: ranks without data send zeros and take no steps, so they cannot know what is due."""
    if model._join_config.enable:
        raise NotImplementedError(f"ddp_project does not work within model.join(). {_WHOLE}")


def something_thin(optimizer: LowRankOptimizer) -> None:
    """Refuse an optimizer that needs the whole gradient of every matrix, so that no coordinates could be sent."""
    method, reason = type(optimizer).__name__, "nothing is projected"
    for p, group in optimizer.table.members():
        plan = optimizer.table.plans[p]
        if plan.projected:
            reason = why_whole(optimizer.table.recipe(plan, group))
            if not reason:
                return
    raise ValueError(f"{method} needs whole gradients: {reason}. {_WHOLE}")


def why_whole(recipe: Recipe) -> str:
    """Return why a step without a refresh reads more of a gradient than its coordinates; "" if it does not."""
    if recipe.thin:
        return ""
    if recipe.basis.elementwise:
        return "nothing is projected"
    if recipe.scaling_in == "full":
        return "its second moments are of the whole gradient"
    return "it also uses the part of the gradient outside the subspace"


def no_grad_scaler(optimizer: LowRankOptimizer) -> None:
    """Refuse a step that a GradScaler has called."""
    if hasattr(optimizer, "grad_scale"):
        del optimizer.grad_scale  # the scaler sets it for the step; a later step must not find it
        raise RuntimeError(
            "scaler.step(optimizer) under ddp_project: a GradScaler unscales p.grad, and does not know of projected "
            "gradients. Train in bfloat16, which needs no scaler, or leave ddp_project out"
        )


def no_second_gradient(names: list[str]) -> None:
    """Refuse parameters that have a whole gradient in addition to the sum of their coordinates."""
    if names:
        raise RuntimeError(
            f"{checks.few(names)} has a gradient in p.grad in addition to its projected one; nothing was updated. Was "
            "there a backward pass within no_sync() after the last one outside of it, or a gradient set by hand? Drop "
            "both with optimizer.zero_grad()"
        )
