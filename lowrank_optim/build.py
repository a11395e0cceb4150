"""`python -m lowrank_optim.build`: compiles the native kernels for this machine now, not with the first optimizer."""

import sys

from . import backend_info
from .ops import compile, native  # noqa: A004


def main() -> None:
    try:
        native.build_now()
    except compile.BuildError as error:
        sys.exit(f"native kernels could not be built: {error}")
    print(backend_info())


if __name__ == "__main__":
    main()
