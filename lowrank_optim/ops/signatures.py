"""Schemas of operators, derived from the signatures of their plain versions.

Annotations are read as text, because all files here postpone their evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Mutated = Tensor  # annotates a tensor that the operator writes into

# How torch's schema language spells an annotation; `{}` is the letter of a tensor that is written into.
# `torch.library.infer_schema` is not used: its integers are symbolic, and native kernels take plain ones.
_SPELLINGS = {
    "Mutated": "Tensor({}!)",
    "Mutated | None": "Tensor({}!)?",
    "list[Mutated]": "Tensor({}!)[]",
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[int]": "int[]",
    "bool": "bool",
    "float": "float",
    "int": "int",
}


def arguments_of(plain: Callable[..., None]) -> dict[str, str]:
    """Return the annotation of each argument, by name and in order."""
    return {name: text for name, text in plain.__annotations__.items() if name != "return"}


def defaults_of(plain: Any) -> dict[str, Any]:
    """Return the defaults of the last arguments, by name."""
    values = plain.__defaults__ or ()
    return dict(zip(list(arguments_of(plain))[-len(values) :], values, strict=True)) if values else {}


def schema_of(plain: Callable[..., None]) -> str:
    """Return the arguments in torch's schema language, such as "Tensor(a!) out, Tensor y, bool across=False"."""
    letters, defaults = iter("abcdefgh"), defaults_of(plain)
    arguments = []
    for name, annotation in arguments_of(plain).items():
        spelling = _SPELLINGS[annotation]
        if "{}" in spelling:
            spelling = spelling.format(next(letters))
        default = f"={defaults[name]}" if name in defaults else ""
        arguments.append(f"{spelling} {name}{default}")
    return ", ".join(arguments)
