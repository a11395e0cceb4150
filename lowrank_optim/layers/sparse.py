"""Provide linear layers whose weight is the sum of a product of thin factors and a sparse matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .. import hyperparameters, ops
from ..engine.autograd import full_precision
from ..recipe.weights import working_dtype
from . import checks as layer_checks
from .linear import ProductLinear

_SPARSE = 1 / 8  # density at which computing single elements costs as much as the whole product
_PIECE = 1 << 22  # number of elements of the dense gradient that exist at once


class SparseLowRankLinear(ProductLinear):
    r"""A layer `W = s B A + S` with `A (r, n)`, `B (m, r)`, `s = alpha / r`, and S zero except for `values`.

    W is composed in forward, again in backward, and never kept: for backward, the input and the trained parameters are
    saved. The gradient of W never exists as a whole.

    The positions of the values are drawn once, uniformly, and never change. They are the buffer `support (nnz,)`:
    sorted row-major indices in int32, or in int64 if W has 2^31 elements or more. A state dict contains the
    support, and loading it replaces the support of the layer.

    Memory: `(m + n) r + nnz` elements, 4 bytes for each of the nnz positions, and temporarily W.
    DistributedDataParallel would send the positions in every forward; give it `broadcast_buffers=False`, because they
    are the same on all ranks.

    Args:
        plain, rank, name, seed: see `ReparameterizedLinear`.
        density: nnz is the integer part of `density * m * n`.
        alpha: s times the rank.
        init: "spectral" takes the best approximation of rank r of the weight of `plain`, balanced (`B^T B = A A^T`),
            and the error of that at the support. "random" draws A and the values uniform in +-1/sqrt(n), starts with B
            zero, and discards the weight, as published.
    """

    factors = ("B", "A", "values")
    support: Tensor

    def __init__(
        self,
        plain: nn.Linear,
        rank: int | float,
        *,
        density: float = 0.03,
        alpha: float = 32.0,
        init: str = "spectral",
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(plain, rank, name=name, seed=seed)
        hyperparameters.check({"density": density, "alpha": alpha, "init": init}, {})
        w, (m, n, r) = plain.weight.detach(), (self.out_features, self.in_features, self.rank)
        count = int(density * m * n)
        layer_checks.sparse(name, count, density, (m, n))
        self.scale, self.density = alpha / r, density
        self.register_buffer("support", self._places(count, w.device))
        if init == "spectral":
            b, a = (x.to(w.dtype) for x in self._split(w))
            values = w.flatten() if w.is_meta else (w - self.scale * (b.to(w) @ a.to(w))).flatten()
            values = values[: len(self.support)] if w.is_meta else values.index_select(0, self.support)
        else:
            b, a = w.new_zeros(m, r), self._drawn((r, n), n, "A", 0, w.device)
            values = self._drawn((count,), n, "values", 0, w.device)
        self.B, self.A, self.values = (nn.Parameter(x.to(w.dtype).contiguous()) for x in (b, a, values))
        self._cuts: tuple[Tensor, int, int, list[int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., m) for x (..., n)."""
        # Under autocast, W is composed in the dtype that `F.linear` would compute in.
        dtype, kind = self.B.dtype, x.device.type
        bias: Tensor | None = self.bias
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        y = _Linear.apply(x, self.B, self.A, self.values, bias, self.support, self.scale, dtype, self._pieces)  # type: ignore[no-untyped-call]
        return y  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        working = working_dtype(self.B)
        product = self.scale * (self.B.to(working) @ self.A.to(working))
        return product.flatten().index_add(0, self.support, self.values.to(working)).view_as(product)

    def made_with(self) -> dict[str, Any]:
        return {**super().made_with(), "density": self.density}

    def restart_workspace(self) -> int:
        return 3 * self.rank * (self.out_features + self.in_features)  # two orthonormal bases and the new factors

    def describe(self) -> str:
        return f"{100 * self.support.numel() / (self.out_features * self.in_features):.1f} % sparse"

    def refuse_shards(self) -> None:
        """Refuse nothing: a restart gathers the factors, and leaves the sparse entries where they are."""

    def _places(self, count: int, device: torch.device) -> Tensor:
        """Return `count` sorted positions in W, drawn without replacement: the support."""
        total = self.out_features * self.in_features
        dtype = torch.int32 if total < 1 << 31 else torch.int64
        if device.type == "meta":
            return torch.empty(count, dtype=dtype, device=device)
        return ops.sample(total, count, self.key, ops.stream_of("support", 0)).to(device, dtype)

    def _pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first row, last row + 1, first entry, last entry + 1) of consecutive blocks of rows of W.

        Entries are counted in `values` and `support`.
        """
        # Finding the entries of each block is a search in the support and, on accelerators, a host wait. The result is
        # kept until the support is replaced or written to, as its version tells.
        rows = max(1, _PIECE // self.in_features)
        firsts = [*range(0, self.out_features, rows), self.out_features]
        support, version, cuts = self.support, self.support._version, self._cuts
        if cuts is None or cuts[0] is not support or cuts[1:3] != (version, rows):
            edges = torch.tensor(firsts, device=support.device) * self.in_features
            self._cuts = cuts = support, version, rows, torch.searchsorted(support, edges.to(support)).tolist()
        return ((*row, *entry) for row, entry in zip(pairwise(firsts), pairwise(cuts[3]), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies, without the kept blocks: the version of a tensor is not copied with it."""
        return {**self.__dict__, "_cuts": None}


Pieces = Callable[[], Iterator[tuple[int, int, int, int]]]


class _Linear(torch.autograd.Function):
    """The product y = x W^T + b, which saves x and the trained parameters, and composes W again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor, a: Tensor, values: Tensor, bias: Tensor | None, support: Tensor, scale: float,
        dtype: torch.dtype, pieces: Pieces,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, b, a, values, support)
        ctx.scale, ctx.pieces = scale, pieces
        with full_precision([x]):
            return linear(x, _composed(b, a, values, support, scale, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b, a, values, support = ctx.saved_tensors  # x is None if no gradient needs it
        of_x, of_b, of_a, of_values, of_bias = ctx.needs_input_grad[:5]
        grad_x = grad_b = grad_a = grad_values = grad_bias = None
        with full_precision([grad]):
            g = grad.reshape(-1, grad.shape[-1])
            if of_x:
                grad_x = grad @ _composed(b, a, values, support, ctx.scale, grad.dtype)
            # With G = g^T x the gradient of W (m, n), g (tokens, m) and x (tokens, n), the gradients are s G A^T of B,
            # s B^T G of A, and G at the support. They come either from G, block by block, or without it.
            rows = x.reshape(-1, x.shape[-1]) if of_b or of_a or of_values else x
            if of_b and of_a and of_values and _whole_is_less(g, rows, b, support):
                grad_b, grad_a, grad_values = _from_whole(g, rows, b, a, support, ctx.scale, ctx.pieces())
            else:
                if of_b:
                    grad_b = (g.mT @ linear(rows, a.to(grad.dtype))).mul_(ctx.scale)
                if of_a:
                    grad_a = ((g @ b.to(grad.dtype)).mT @ rows).mul_(ctx.scale)
                if of_values:
                    grad_values = _at_support(g, rows, support, ctx.pieces())
            if of_bias:
                grad_bias = g.sum(0)
        of_trained = (None if x is None else x.to(b.dtype) for x in (grad_b, grad_a, grad_values))
        return grad_x, *of_trained, grad_bias, None, None, None, None


def _composed(b: Tensor, a: Tensor, values: Tensor, support: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return W (m, n) in `dtype`, rounded once."""
    flat = torch.zeros(b.shape[0] * a.shape[1], dtype=dtype, device=b.device)
    ops.add_at_(flat, support, values.to(dtype))
    return flat.view(b.shape[0], a.shape[1]).addmm_(b.to(dtype), a.to(dtype), alpha=scale)


def _whole_is_less(g: Tensor, x: Tensor, b: Tensor, support: Tensor) -> bool:
    """Whether it is less work to compute `G = g^T x` and all gradients from it than to compute each one by itself.

    The second way takes thin products with g (tokens, m) and x (tokens, n), and G at the support.
    """
    # Counted in multiplications. Without sampling, G at the support costs the whole product as well.
    (tokens, m), n, r = g.shape, x.shape[-1], b.shape[-1]
    product = tokens * m * n
    entries = tokens * len(support) / _SPARSE if _sampled(g, x, support) else product
    return product + 2 * m * n * r < 2 * tokens * (m + n) * r + entries


def _from_whole(
    g: Tensor,
    x: Tensor,
    b: Tensor,
    a: Tensor,
    support: Tensor,
    scale: float,
    pieces: Iterator[tuple[int, int, int, int]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of B (m, r), of A (r, n) and of the values (nnz,), from blocks of rows of `G = g^T x`.

    Args:
        g, x: (tokens, m) and (tokens, n).
        pieces: the blocks, see `SparseLowRankLinear._pieces`.
    """
    b, a = b.to(g.dtype), a.to(g.dtype)
    of_b, of_a, of_values = torch.empty_like(b), torch.zeros_like(a, dtype=working_dtype(a)), g.new_empty(support.shape)
    for top, bottom, start, stop in pieces:
        dense = g[:, top:bottom].mT @ x
        of_b[top:bottom] = dense @ a.mT
        of_a += b[top:bottom].mT @ dense
        of_values[start:stop] = ops.gather_at(dense, support[start:stop], top * x.shape[-1])
    return of_b.mul_(scale), of_a.mul_(scale), of_values


def _at_support(g: Tensor, x: Tensor, support: Tensor, pieces: Iterator[tuple[int, int, int, int]]) -> Tensor:
    """Return the elements of `g^T x` at the support, (nnz,)."""
    if _sampled(g, x, support):
        return ops.sampled_product(g, x, support)
    out = g.new_empty(support.shape)
    for top, bottom, start, stop in pieces:
        if start < stop:
            out[start:stop] = ops.gather_at(g[:, top:bottom].mT @ x, support[start:stop], top * x.shape[-1])
    return out


def _sampled(g: Tensor, x: Tensor, support: Tensor) -> bool:
    """Whether to compute elements of `g^T x` at the support one by one, without the whole product."""
    # Only on CPUs, and not in 16 bits: otherwise whole products are faster than any choice of elements.
    whole = g.device.type == "cpu" and g.dtype in (torch.float32, torch.float64)
    return whole and len(support) < _SPARSE * g.shape[-1] * x.shape[-1]
