"""A file of options: what one would type, by name."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml

from .errors import PretrainError

# What is typed takes the place of more than itself.
REPLACED = {
    "--optimizer": {"set", "compare"},
    "--compare": {"set", "optimizer"},
    "--text": {"dataset"},
    "--dataset": {"text"},
}


def words(path: Path, parser: argparse.ArgumentParser, typed: list[str]) -> list[str]:
    """The file as words to stand before those that were typed, so that the same checks apply, and typed ones win.

    Names may be written with - or _; `set` is a mapping; `true` stands for a switch.
    """
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PretrainError(f"cannot read --config {path}: {error}") from error
    if not isinstance(values, dict):
        raise PretrainError(f"--config {path} must have lines such as `preset: 60m`, got {values!r:.60}")
    known = {option: action for action in parser._actions for option in action.option_strings if option != "--config"}
    replaced = set().union(*(REPLACED.get(word.partition("=")[0], ()) for word in typed))
    return [word for name, value in values.items() if name not in replaced for word in _words(path, name, value, known)]


def _words(path: Path, name: Any, value: Any, known: dict[str, argparse.Action]) -> list[str]:
    option = f"--{str(name).replace('_', '-')}"
    if option not in known:
        near = difflib.get_close_matches(option, known, 1)
        hint = f"did you mean {near[0][2:]}? " if near else ""
        raise PretrainError(f"--config {path} has {name!r}, which is no option; {hint}see --help")
    switch = known[option].nargs == 0
    if switch != isinstance(value, bool):
        raise PretrainError(
            f"--config {path}: {name} must be {'true or false' if switch else 'a value'}, got {value!r}"
        )
    if switch:
        return [option] if value else []
    if isinstance(value, dict):
        return [option, *(f"{key}={item}" for key, item in value.items())]
    return [f"{option}={value}"]
