"""What `ddp_project` refuses, and its messages; everything before a hook is registered."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import checks, hyperparameters
from ..optimizer import LowRankOptimizer
from ..recipe.recipe import Recipe

_WHOLE = "Leave ddp_project out: under DistributedDataParallel this optimizer then gets whole gradients, as ever"


def everything(model: object, optimizer: object, options: dict[str, object]) -> None:
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(f"ddp_project needs an optimizer of lowrank_optim, got {type(optimizer).__name__}")
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"ddp_project needs the model that DistributedDataParallel returned, got {type(model).__name__}. Sharded "
            "models (fully_shard) send only thin numbers for low-rank methods by themselves"
        )
    hyperparameters.check(options, {"clip": ("global", "tensor")})
    if options["clip"] != "global" and options["clip_norm"] is None:
        raise ValueError(f"clip={options['clip']!r} without clip_norm clips nothing. Pass clip_norm, or leave clip out")
    _one_way(optimizer)
    _plain_wrapper(model)
    _own_parameters(model, optimizer)
    something_thin(optimizer)


def _one_way(optimizer: LowRankOptimizer) -> None:
    if optimizer.mode is not None and optimizer.mode.name == "step_in_backward":
        raise ValueError("this optimizer steps during backward, before ranks have averaged gradients; remove() that")
    if optimizer.mode is not None:
        raise ValueError("this optimizer has projected gradients already; call ddp_project once")
    if any(group["capturable"] for group in optimizer.param_groups):
        raise NotImplementedError(f"ddp_project with capturable=True: the graph reads whole gradients. {_WHOLE}")


def _plain_wrapper(model: DistributedDataParallel) -> None:
    """Ways of DDP in which parameters have no gradient, or hooks come at other times."""
    ways = {
        "find_unused_parameters=True": model.find_unused_parameters,
        "static_graph=True": model.static_graph,
        "mixed_precision": getattr(model, "mixed_precision", None) is not None,
        "another communication hook": bool(getattr(model, "_comm_hooks", ())),
    }
    for way in (way for way, taken in ways.items() if taken):
        raise NotImplementedError(f"ddp_project does not work for a model with {way}. {_WHOLE}")


def not_joined(model: DistributedDataParallel) -> None:
    """Ranks that are out of data send zeros and make no steps, so they cannot know what is due."""
    if model._join_config.enable:
        raise NotImplementedError(f"ddp_project does not work within model.join(). {_WHOLE}")


def _own_parameters(model: nn.Module, optimizer: LowRankOptimizer) -> None:
    inside = set(model.parameters())
    outside = [plan.name for p, plan in optimizer.table.plans.items() if p not in inside]
    if outside:
        raise ValueError(f"{checks.few(outside)} of the optimizer is no parameter of this model. Was the model copied?")


def something_thin(optimizer: LowRankOptimizer) -> None:
    """A method that reads all of a gradient cannot do with its coordinates."""
    method, reason = type(optimizer).__name__, "nothing is projected"
    for p, group in optimizer.table.members():
        plan = optimizer.table.plans[p]
        if plan.projected:
            reason = why_whole(optimizer.table.recipe(plan, group))
            if not reason:
                return
    raise ValueError(f"{method} needs whole gradients: {reason}. {_WHOLE}")


def why_whole(recipe: Recipe) -> str:
    """What a step without a refresh reads of a gradient beside its coordinates; "" for nothing."""
    if recipe.thin:
        return ""
    if recipe.basis.elementwise:
        return "nothing is projected"
    if recipe.scaling_in == "full":
        return "its second moments are of the whole gradient"
    return "it uses what of the gradient lies outside the subspace as well"


def no_grad_scaler(optimizer: LowRankOptimizer) -> None:
    if hasattr(optimizer, "grad_scale"):
        del optimizer.grad_scale  # what a GradScaler leaves for the step it calls
        raise RuntimeError(
            "scaler.step(optimizer) under ddp_project: a GradScaler unscales p.grad, and does not know of projected "
            "gradients. Train in bfloat16, which needs no scaler, or leave ddp_project out"
        )


def no_second_gradient(names: list[str]) -> None:
    if names:
        raise RuntimeError(
            f"{checks.few(names)} has a gradient in p.grad beside its projected one; nothing was updated. Was there a "
            "backward pass within no_sync() after the last one outside of it, or a gradient set by hand? Drop both "
            "with optimizer.zero_grad()"
        )
