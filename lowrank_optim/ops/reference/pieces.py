"""Work cut into pieces that stay in cache on CPU, with their temporaries; on other devices all work is one piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 16  # elements of a piece on CPU: 256 KiB in float32


def factored_lines(x: Tensor, rows: Tensor, columns: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Cut matrices between rows, together with the factors of their rows and columns.

    Args:
        x: (..., m, n).
        rows, columns: (..., m, 1) and (..., 1, n).
        others: like x.

    Yields:
        The number of the matrix (all matrices off the CPU), the factors of the rows of the piece, the factors of
        columns, and the same rows of x and of each of `others`.
    """
    by_column, *cut = (one.view(math.prod(one.shape[:-2]), *one.shape[-2:]) for one in (columns, rows, x, *others))
    if x.device.type != "cpu":
        yield slice(None), cut[0], by_column, *cut[1:]
        return
    some = max(1, PIECE // max(1, x.shape[-1]))
    for i, line in enumerate(by_column):
        for by_row, *pieces in zip(*(torch.split(one[i], some) for one in cut), strict=True):
            yield i, by_row, line, *pieces


def row_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut matrices (m, n) of one shape between rows: yield the same rows of each."""
    rows, run = tensors[0].shape
    some = max(1, PIECE // max(1, run)) if tensors[0].device.type == "cpu" else max(1, rows)
    return zip(*(torch.split(x, some) for x in tensors), strict=True)


def block_pieces(elements: list[Tensor], numbers: list[Tensor], block: int) -> Iterator[list[Tensor]]:
    """Cut tensors of blockwise codes between rows and between blocks.

    Args:
        elements: tensors (..., k).
        numbers: tensors (..., ceil(k / block)), with one number per block.

    Yields:
        Views (rows, blocks, width) of the elements, then views (rows, blocks, 1) of the numbers. The short blocks at
        the end of rows are pieces of their own, so that nothing has to be padded.
    """
    elements, numbers = (
        [x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0) for x in xs] for xs in (elements, numbers)
    )
    b, k = elements[0].shape
    limit = PIECE if elements[0].device.type == "cpu" else max(1, b * k)
    for start, stop, width in ((0, k - k % block, block), (k - k % block, k, k % block)):
        if start == stop:
            continue
        views = [x[:, start:stop].view(b, (stop - start) // width, width) for x in elements]
        views += [x[:, start // block : -(-stop // block)].unsqueeze(-1) for x in numbers]
        rows, columns = max(1, limit // (stop - start)), max(1, limit // width)
        for row in range(0, b, rows):
            for column in range(0, views[0].shape[1], columns):
                yield [x[row : row + rows, column : column + columns] for x in views]


def some_rows(x: Tensor) -> Iterator[slice]:
    """Cut matrices (..., m, n) between rows; a piece is smaller because squares in float64 are made of it."""
    m = x.shape[-2]
    size = max(1, PIECE // 4 // max(1, x.shape[-1])) if x.device.type == "cpu" else max(1, m)
    return (slice(first, min(first + size, m)) for first in range(0, m, size))
