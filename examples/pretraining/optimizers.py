"""From a name and keywords on the command line to an optimizer of a model.

Most take the groups of `lowrank_optim.param_groups`; methods that convert the weights take the model itself.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import lowrank_optim
from lowrank_optim.recipe.plan import names_say

from . import model as models
from . import update
from .errors import PretrainError
from .job import Job
from .presets import Preset

OURS = "lr", "matrix_lr_scale"  # keywords of this program; all others go to the optimizer
UNSUITED = {"LBFGS": "it needs a closure", "SparseAdam": "it needs sparse gradients"}
RANDOM_AFTER = 0.8  # GoLore's bases become random after this share of the steps, as in its paper


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for matrices that are neither embedding nor head, AdamW for the rest, in one optimizer.

    Both keep their state here, and see their own groups for as long as a step takes: schedules, checkpoints and hooks
    work as with any optimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        muon |= {"adjust_lr_fn": adjust_lr_fn}
        self.parts: list[torch.optim.Optimizer] = []
        matrices, rest = _by_kind(list(params))
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, **common, **muon))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, **common, betas=betas, eps=eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
            part.step()
        return loss


def _by_kind(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups' matrices and everything else, each parameter in a group with the keys of its old one."""
    kinds: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        for kind, wanted in zip(kinds, (True, False), strict=True):
            params = [(name, p) for name, p in group["params"] if (p.dim() == 2 and not names_say(name)) == wanted]
            kind.extend([{**group, "params": params}] if params else [])
    return kinds


class Adafactor(torch.optim.Adafactor):
    """torch's; on the meta device, where its step would need numbers, it only makes its state, to be estimated."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if not all(p.is_meta for group in self.param_groups for p in group["params"]):
            return super().step(closure)  # type: ignore[no-any-return,no-untyped-call]
        for group in self.param_groups:
            self._init_group(group, *([] for _ in range(6)))
        return None


class GoLoreAdamW(lowrank_optim.GoLoreAdamW):
    """Ours, with a value for `random_after`: `build` makes it RANDOM_AFTER of the job's steps, unless it is given."""

    __init__ = functools.partialmethod(lowrank_optim.GoLoreAdamW.__init__, random_after=0)


_STAND_INS: dict[str, type[torch.optim.Optimizer]] = {
    "Muon": Muon, "Adafactor": Adafactor, "GoLoreAdamW": GoLoreAdamW,
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One optimizer of the command line, `text` as it was typed."""

    text: str
    optimizer: type[torch.optim.Optimizer]
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        _, *settings = split(self.text, ":")
        return " ".join([self.optimizer.__name__, *settings])


def parse_choice(text: str, settings: list[str] | None = None) -> Choice:
    """`galore:rank=0.5:scale=1`, or a name alone with `settings` from --set."""
    name, *rest = split(text, ":")
    settings = [*rest, *(settings or [])]
    optimizer = find(name)
    keywords = dict(_parse_setting(setting) for setting in settings)
    _check_keywords(optimizer, keywords)
    return Choice(":".join([name, *settings]), optimizer, keywords)


def split(text: str, mark: str) -> list[str]:
    """Parts between marks that stand outside brackets, so that `betas=(0.9,0.95)` stays whole."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _parse_setting(setting: str) -> tuple[str, Any]:
    key, equals, value = setting.partition("=")
    if not equals or not key.isidentifier():
        raise PretrainError(f"an optimizer keyword is written key=value, got {setting!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _classes(module: Any) -> dict[str, type[torch.optim.Optimizer]]:
    found = {name: getattr(module, name) for name in getattr(module, "__all__", None) or dir(module)}
    bases = {"Optimizer", "LowRankOptimizer", "WeightSpaceOptimizer"}
    return {
        name: _STAND_INS.get(name, value)
        for name, value in found.items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in bases
    }


def find(name: str) -> type[torch.optim.Optimizer]:
    """The class called `name`, or `name` + AdamW, or the only one that starts with it; ours before torch's."""
    wanted = _plain(name)
    if not wanted:
        raise PretrainError("an optimizer needs a name, such as galore or adamw; got an empty one")
    families = [_classes(lowrank_optim), _classes(torch.optim)]
    tests: list[Callable[[str], bool]] = [
        lambda known: known == wanted,
        lambda known: known == wanted + "adamw",
        lambda known: bool(wanted) and known.startswith(wanted),
    ]
    for matches in tests:
        for family in families:
            hits = [value for known, value in family.items() if matches(_plain(known))]
            if len(hits) == 1:
                return _suited(hits[0])
    everything = {_plain(known): known for family in reversed(families) for known in family}
    near = [everything[n] for n in everything if wanted and n.startswith(wanted)]
    near = near or [everything[n] for n in difflib.get_close_matches(wanted, everything, n=4, cutoff=0.4)]
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(everything.values()))}"
    raise PretrainError(f"unknown optimizer {name!r}; {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _suited(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    name = optimizer.__name__
    if not is_low_rank(optimizer) and name in UNSUITED:
        raise PretrainError(f"torch.optim.{name} cannot train a whole model here: {UNSUITED[name]}; choose another")
    return optimizer


def is_low_rank(optimizer: type[torch.optim.Optimizer]) -> bool:
    return issubclass(optimizer, lowrank_optim.LowRankOptimizer)


def is_weight_space(optimizer: type[torch.optim.Optimizer]) -> bool:
    """Does it convert the model in place?"""
    return issubclass(optimizer, lowrank_optim.WeightSpaceOptimizer)


def accepted(optimizer: type[torch.optim.Optimizer]) -> list[str]:
    return [name for name in inspect.signature(optimizer).parameters if name not in ("params", "model", "lr")]


def _check_keywords(optimizer: type[torch.optim.Optimizer], keywords: dict[str, Any]) -> None:
    valid = [*OURS, *accepted(optimizer)]
    for key in keywords:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PretrainError(f"{optimizer.__name__} has no keyword {key!r}; {hint}valid are {', '.join(valid)}")
    if "matrix_lr_scale" in keywords and is_low_rank(optimizer):
        instead = "lr and rest_lr" if is_weight_space(optimizer) else "scale"
        raise PretrainError(
            f"matrix_lr_scale is for torch optimizers, got it for {optimizer.__name__}; use its {instead} instead"
        )


def settings(choice: Choice, preset: Preset, lr: float | None, dtype: str) -> dict[str, Any]:
    """The job's `lr`, `matrix_lr_scale` and `keywords`: typed ones over --lr over the preset's over the class's own."""
    name, valid = choice.optimizer.__name__, accepted(choice.optimizer)
    keywords: dict[str, Any] = {"weight_decay": 0.0} if "weight_decay" in valid else {}
    if dtype == "bf16" and is_low_rank(choice.optimizer):
        keywords["bf16_update"] = "stochastic"  # else small updates are rounded away
        parameters = inspect.signature(choice.optimizer).parameters
        # State as torch's AdamW keeps its own, in the dtype of the weights; but int8 stays int8.
        keywords |= {key: "bfloat16" for key in valid if parameters[key].default == "float32"}
    keywords["lr"] = inspect.signature(choice.optimizer).parameters["lr"].default
    keywords |= preset.optimizers.get(name, {})
    keywords |= {"lr": lr} if lr is not None else {}
    keywords |= choice.keywords
    rate, scale = keywords.pop("lr"), keywords.pop("matrix_lr_scale", 1.0)
    for key, value in (("lr", rate), ("matrix_lr_scale", scale)):
        if not isinstance(value, int | float) or value <= 0:
            raise PretrainError(f"{key} of {name} must be a number above 0, got {value!r}; set it with {key}=...")
    return {"lr": float(rate), "matrix_lr_scale": float(scale), "keywords": keywords}


def build(model: torch.nn.Module, job: Job) -> torch.optim.Optimizer:
    optimizer = find(job.optimizer)
    if is_weight_space(optimizer):
        return _make(optimizer, model, job)
    # GaLore+ shares a subspace between the heads of an attention layer.
    groups = lowrank_optim.param_groups(model, verbose=False, heads="heads" in accepted(optimizer))
    if not is_low_rank(optimizer):
        groups = [_plain_group(group, job, accepted(optimizer)) for group in groups]
    return _make(optimizer, groups, job)


def check(job: Job) -> None:
    """Refuse values that the optimizer does not take, on one matrix without memory, before anything is written."""
    wanted = find(job.optimizer)
    linear = torch.nn.Linear(job.hidden, job.mlp, bias=False, device="meta")
    model: torch.nn.Module = torch.nn.Sequential(linear)
    if is_weight_space(wanted):
        if {"include", "exclude"} & job.keywords.keys():  # names of layers
            model = models.skeleton(job)
        optimizer = _make(wanted, model, job)
        _check_heads(job)
    else:
        optimizer = _make(wanted, [{"params": list(model.named_parameters())}], job)
    if job.step_in_backward:
        update.attach(model, optimizer, job)


def _check_heads(job: Job) -> None:
    """LTE's heads take equal parts of each micro-batch."""
    parameter = inspect.signature(find(job.optimizer)).parameters.get("heads")
    heads = job.keywords.get("heads", parameter.default) if parameter else 1
    sizes = sorted({min(job.micro_batch, job.share), job.share % job.micro_batch} - {0})
    if isinstance(heads, int) and any(size % heads for size in sizes):
        raise PretrainError(
            f"{heads} heads of {job.label} must divide micro-batches, which are of {' and '.join(map(str, sizes))} "
            "sequences; change heads, --batch or --micro-batch"
        )


def _make(optimizer: Any, trained: Any, job: Job) -> torch.optim.Optimizer:
    """`trained`: groups, or the model."""
    keywords = {"lr": job.lr, **job.keywords}
    if "random_after" in accepted(optimizer):
        keywords.setdefault("random_after", int(RANDOM_AFTER * job.steps))
    try:
        made: torch.optim.Optimizer = optimizer(trained, **keywords)
        return made
    except (TypeError, ValueError, RuntimeError) as error:
        raise PretrainError(f"{job.label} does not accept its arguments: {error}") from error


def _plain_group(group: dict[str, Any], job: Job, valid: list[str]) -> dict[str, Any]:
    """The same parameters with the same weight decay, without the keys that only low-rank optimizers know."""
    kept = {key: value for key, value in group.items() if key == "params" or key in valid}
    # Low-rank updates of matrices are scaled by `scale`; a fair AdamW gets its own lr for the same matrices.
    return {**kept, "lr": job.lr * (job.matrix_lr_scale if is_matrix_group(group) else 1.0)}


def is_matrix_group(group: dict[str, Any]) -> bool:
    return group.get("rank", 1) is not None
