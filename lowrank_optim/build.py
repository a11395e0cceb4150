"""Compile the native kernels now, instead of with the first optimizer, by `python -m lowrank_optim.build`."""

import sys

from . import backend_info
from .ops import native


def main() -> None:
    """Build the native kernels, and print which backend is in use and why; exit with a message if it fails."""
    try:
        native.build_now()
    except (RuntimeError, OSError) as error:
        sys.exit(f"native kernels could not be built: {error}")
    print(backend_info())


if __name__ == "__main__":
    main()
