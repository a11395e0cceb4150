"""Published packages to compare with, imported without the heavy requirements that the comparison does not touch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


def galore_torch() -> Any:
    """The module `galore_torch`, or ImportError where it is not installed.

    It imports bitsandbytes for its 8-bit class and transformers for a version check; empty stand-ins do for both.
    """
    _stand_in("bitsandbytes.optim.optimizer", Optimizer2State=object)
    _stand_in("transformers.utils.versions", require_version=lambda *_: None)
    return importlib.import_module("galore_torch")


def _stand_in(path: str, **names: Any) -> None:
    parts = path.split(".")
    if parts[0] in sys.modules or importlib.util.find_spec(parts[0]) is not None:
        return
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        sys.modules[module.__name__] = module
    vars(module).update(names)
