"""Rules for the arguments of operators: the rows of the table in `schema.py`, and the function that applies them.

A rule raises `RuntimeError`, as native kernels do. The message names the argument, the expected property, and the
property that it has. No rule reads the values of tensors, because rules also run on tensors without memory (fakes).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .signatures import arguments_of, defaults_of

Check = Callable[..., None]
Arguments = dict[str, Any]  # by name; a list is replaced by the entry that is being checked
FIRST = "its first tensor"  # the name under which rules for lists find the first entry of `r`
_DIMENSIONS = {
    "one dimension": (1, 1),
    "one dimension or more": (1, None),
    "two dimensions": (2, 2),
    "two dimensions or more": (2, None),
}


class Dense(NamedTuple):
    """A contiguous tensor; an optional one may be None.

    Args:
        argument: its name.
        dtype: the dtypes that it may have, or the argument whose dtype it must have.
        on: the argument whose device it must be on. Empty for the tensor that all others are compared with.
        shape: the argument whose shape it must have. Empty where a `Condition` limits the shape, or nothing does.
        dims: the number of dimensions in words, a key of `_DIMENSIONS`. Empty where any number is allowed.
    """

    argument: str
    dtype: tuple[torch.dtype, ...] | str
    on: str = ""
    shape: str = ""
    dims: str = ""

    def check(self, arguments: Arguments) -> None:
        """Raise where the argument breaks the rule. Messages are formatted in that case only, to save host time."""
        name, x = self.argument, arguments[self.argument]
        if x is None:
            return
        if isinstance(self.dtype, tuple):
            _check_dtype(name, x, self.dtype)
        elif x.dtype != arguments[self.dtype].dtype:
            _refuse(f"{name} must have the dtype of {self.dtype}, got {x.dtype}")
        if self.dims:
            least, most = _DIMENSIONS[self.dims]
            if x.dim() < least or (most and x.dim() > most):
                _refuse(f"{name} must have {self.dims}, got {tuple(x.shape)}")
        if self.shape and x.shape != (shape := arguments[self.shape].shape):
            _refuse(f"{name} must have the shape of {self.shape} {tuple(shape)}, got {tuple(x.shape)}")
        if self.on:
            _check_device(name, x, self.on, arguments)
        if not x.is_contiguous():
            _refuse(f"{name} must be contiguous; use .contiguous()")


class OneNumber(NamedTuple):
    """A tensor of one element, which a kernel reads on the device in place of a number; an optional one may be None."""

    argument: str
    dtype: tuple[torch.dtype, ...]
    on: str

    def check(self, arguments: Arguments) -> None:
        name, x = self.argument, arguments[self.argument]
        if x is None:
            return
        _check_dtype(name, x, self.dtype)
        if x.numel() != 1:
            _refuse(f"{name} must be one number, got {tuple(x.shape)}")
        _check_device(name, x, self.on, arguments)


class Condition:
    """Any other demand on an argument.

    Args:
        argument: its name.
        words: the demand, for the message "`name` must `words`, got `got`". A name in braces stands for the shape of
            that tensor, or for that number.
        holds: a predicate of the argument. Its further parameters have the names of the other arguments it needs.
        name, got: replace the name of the argument, and its shape or number, in the message.
    """

    def __init__(self, argument: str, words: str, holds: Callable[..., bool], name: str = "", got: str = "") -> None:
        self.argument, self.holds, self.others = argument, holds, _others(holds)
        self.message = f"{name or argument} must {words}, got {got or '{' + argument + '}'}"

    def check(self, arguments: Arguments) -> None:
        if not self.holds(arguments[self.argument], *[arguments[name] for name in self.others]):
            shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in arguments.items()}
            _refuse(self.message.format(**shapes))


class Let:
    """A number derived from an argument, which the conditions after it may use like an argument.

    Args:
        number: its name.
        argument: the name of the argument.
        derive: a function of the argument. Its further parameters have the names of the other arguments it needs.
    """

    def __init__(self, number: str, argument: str, derive: Callable[..., int]) -> None:
        self.number, self.argument, self.derive, self.others = number, argument, derive, _others(derive)

    def check(self, arguments: Arguments) -> None:
        arguments[self.number] = self.derive(arguments[self.argument], *[arguments[name] for name in self.others])


Rule = Dense | OneNumber | Condition | Let


def like(argument: str, other: str, dtype: tuple[torch.dtype, ...] | None = None) -> Dense:
    """Return the rule for a tensor with the shape and the device of another, and with its dtype unless one is given."""
    return Dense(argument, dtype or other, on=other, shape=other)


def checker(plain: Callable[..., None], rules: Sequence[Rule]) -> Check:
    """Return a function of the arguments of `plain` that raises where they break a rule.

    Args:
        plain: the operator in plain torch. Its annotations say which arguments are lists. One list is `r`, and all
            others must be as long as `r`.
        rules: are applied in this order, except for lists, see `_check_lists`.
    """
    names, defaults = tuple(arguments_of(plain)), defaults_of(plain)
    lists = [name for name, annotation in arguments_of(plain).items() if annotation.startswith("list")]
    checks = [functools.partial(_check_lists, lists, rules)] if lists else [rule.check for rule in rules]

    @functools.wraps(plain)
    def check(*args: Any, **kwargs: Any) -> None:
        arguments = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        for run in checks:
            run(arguments)

    return check


def _check_lists(lists: list[str], rules: Sequence[Rule], arguments: Arguments) -> None:
    """Apply the rules for lists to each entry, then the remaining rules with the first tensor of `r` in its place.

    Rules in front of all rules for lists are applied first, also where the lists are empty.
    """
    r = arguments["r"]
    for name in lists:
        if len(arguments[name]) != len(r):
            _refuse(f"{name} must have one entry for each of r, {len(r)}, got {len(arguments[name])}")
    begin = next(i for i, rule in enumerate(rules) if rule.argument in lists)
    for rule in rules[:begin]:
        rule.check(arguments)
    for entries in zip(*(arguments[name] for name in lists), strict=True):
        entry = {**arguments, **dict(zip(lists, entries, strict=True)), FIRST: r[0]}
        for rule in rules[begin:]:
            if rule.argument in lists:
                rule.check(entry)
    if len(r):
        whole = {**arguments, "r": r[0]}
        for rule in rules[begin:]:
            if rule.argument not in lists:
                rule.check(whole)


def _refuse(message: str) -> None:
    raise RuntimeError(message)


def _others(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parameters after the first."""
    code = function.__code__
    return code.co_varnames[1 : code.co_argcount]


def _check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in allowed:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        _refuse(f"{name} must be {words}, got {x.dtype}")


def _check_device(name: str, x: Tensor, other: str, arguments: Arguments) -> None:
    if x.device != arguments[other].device:
        _refuse(f"{name} must be on the device of {other}")
