"""Provide linear layers stored as a singular value decomposition, of which a few singular vectors train at a time.

Reference: Zhao et al., "Sparse spectral training and inference on Euclidean and hyperbolic neural networks",
https://arxiv.org/abs/2405.15481.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .. import ops
from ..distributed.dtensors import joined, local, part, picked, place_, whole
from ..ops.factor import singular
from ..recipe.weights import working_dtype
from . import checks as layer_checks
from .linear import ReparameterizedLinear

SEGMENT = ("U_active", "V_active")


class SpectralLinear(ReparameterizedLinear):
    r"""A layer `W = sum_i sigma_i u_i v_i^T` over all k = min(m, n) directions; sigma and r pairs of vectors train.

        y = ((x V^T) * sigma) U                        U (k, m), V (k, n): the vectors are rows
        sigma:          g_i = u_i^T G v_i              G = dL/dW, which is never formed
        U_active[j]:    G v_i,  i = index[j]           the gradient of u_i without its factor sigma_i, which would
        V_active[j]:    G^T u_i                        starve small directions

    U and V are frozen, and contain the active vectors as well. Training changes the parameters `U_active (r, m)` and
    `V_active (r, n)`. `retract_` restores their unit length and writes them to U and V; until then the function does
    not change. `SST` calls it after each update. sigma is float32, whatever the dtype of U and V.

    Args:
        plain, rank, name, seed: see `ReparameterizedLinear`; the rank is the number r of active directions.
    """

    factors = (*SEGMENT, "sigma")

    def __init__(self, plain: nn.Linear, rank: int | float, *, name: str = "", seed: int = 0) -> None:
        super().__init__(plain, rank, name=name, seed=seed)
        w, (m, n, r) = plain.weight.detach(), (self.out_features, self.in_features, self.rank)
        wide = w.to(working_dtype(w))
        k = min(m, n)
        u, s, v = (wide.new_empty(x) for x in ((k, m), k, (k, n))) if w.is_meta else singular(wide)
        self.U, self.V = (nn.Parameter(x.to(w.dtype), requires_grad=False) for x in (u, v))
        self.sigma = nn.Parameter(s)
        self.U_active, self.V_active = nn.Parameter(w.new_empty(r, m)), nn.Parameter(w.new_empty(r, n))
        # The index is a parameter, because layers that share their weight must share it too, through casts and moves.
        self.index = nn.Parameter(torch.empty(r, dtype=torch.int64, device=w.device), requires_grad=False)
        if not w.is_meta:
            self.activate_(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., m) for x (..., n)."""
        # The autograd function computes in `dtype`; under autocast it is that of autocast, except for float64 inputs.
        device, dtype = x.device.type, self.U.dtype
        if is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype)
        y: Tensor = _Spectral.apply(  # type: ignore[no-untyped-call]
            x, self.sigma, self.U_active, self.V_active, self.U, self.V, self.index, dtype
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self) -> Tensor:
        w = self._composed(self.U, self.sigma, self.V)
        # Add zeros (m, n) whose gradients are those of the active vectors, as the class states them.
        if torch.is_grad_enabled():
            u, v = self.U_active.to(w.dtype), self.V_active.to(w.dtype)
            w = w + (u - u.detach()).mT @ v.detach() + u.detach().mT @ (v - v.detach())
        return w

    def odds(self) -> Tensor:
        """Return the odds `1/2 (1/k + sigma_i / sum sigma)` of each direction, (k,) in float64 on the CPU.

        They are half uniform, and half proportional to sigma. All ranks call it for a sharded layer.
        """
        s = joined(self.sigma.detach()).double().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        even, total = torch.full_like(s, 1 / len(s)), s.sum()
        return 0.5 * (even + s / total) if float(total) > 0 else even

    @torch.no_grad()
    def activate_(self, count: int) -> None:
        """Draw r directions by their odds, without replacement, and make their vectors the active ones.

        All ranks call it for a sharded layer: sigma and the active vectors are sent.

        Args:
            count: index of this draw, from 0. The draw is a function of it and of the layer's key.
        """
        # Each direction has an exponential clock with its odds as the rate. The first r clocks to ring are r successive
        # draws without replacement (Efraimidis and Spirakis, 2006).
        odds = self.odds()
        clocks = -ops.uniform(tuple(odds.shape), self.key, ops.stream_of("segment", count)).double().log()
        chosen = (clocks / odds).topk(self.rank, largest=False).indices.sort().values.to(self.index.device)
        local(self.index).copy_(part(chosen, self.index))
        for active, stored in self._pairs():
            local(active).copy_(part(picked(stored, chosen), active))

    @torch.no_grad()
    def retract_(self) -> None:
        """Clamp sigma to >= 0 and scale the active vectors to unit length, in float32 and rounded once.

        A vector without a direction (zero, or not finite) is restored from U or V. All ranks call it for a sharded
        layer: the active vectors are sent to the ranks that have them in their part of U or V.
        """
        local(self.sigma).clamp_(min=0)
        index = joined(self.index)
        for active, stored in self._pairs():
            x = local(active).to(working_dtype(active))
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            good = length.isfinite() & (length > 0)
            local(active).copy_(torch.where(good, x / length, 0.0))
            # Vectors without a direction are zero here. Only for them the stored vectors are needed, so a sharded layer
            # sends those only then.
            vectors = joined(active)
            lost = ~vectors.any(1, keepdim=True)
            if local(stored) is stored or bool(lost.any()):
                vectors = torch.where(lost, picked(stored, index), vectors)
                local(active).copy_(part(vectors, active))
            place_(stored, index, vectors)

    @torch.no_grad()
    def orthogonalize_(self) -> bool:
        """Decompose W again: the same function with orthonormal vectors, and the directions in a new order.

        All ranks call it for a sharded layer: its vectors are gathered, as they are for its forward pass.

        Returns:
            False if W is not finite or the decomposition fails; then nothing has changed.
        """
        w = self._composed(*map(whole, (self.U, self.sigma, self.V)))
        if not bool(w.isfinite().all()):
            return False
        try:
            fresh = singular(w)
        except torch.linalg.LinAlgError:
            return False
        for kept, new in zip((self.U, self.sigma, self.V), fresh, strict=True):
            local(kept).copy_(part(new, kept))
        index = joined(self.index)
        for active, stored in self._pairs():
            local(active).copy_(part(picked(stored, index), active))
        return True

    def restart_workspace(self) -> int:
        m, n = self.out_features, self.in_features
        k = min(m, n)
        # W and the copy of it that LAPACK overwrites, the vectors, and LAPACK's workspace.
        return 2 * m * n + k * (m + n) + 4 * k * k

    def describe(self) -> str:
        return f"{self.rank} of {min(self.out_features, self.in_features)} directions at a time"

    def refuse_shards(self) -> None:
        layer_checks.one_dtype("SST", self.U.dtype, self.sigma.dtype)
        cut = [self.U, self.V, self.U_active, self.V_active, self.sigma, self.index]
        layer_checks.shards_of_rows(SpectralLinear.__name__, "", False, cut)

    def _composed(self, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        """Return W (m, n), the sum over all k directions, in the working dtype."""
        working = working_dtype(u)
        return (u.to(working).mT * sigma.to(working)) @ v.to(working)

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return (active vectors, all vectors) of either side: (r, m) with (k, m), and (r, n) with (k, n)."""
        return (self.U_active, self.U), (self.V_active, self.V)


class _Spectral(torch.autograd.Function):
    """The product `y = ((x V^T) * sigma) U` with the gradients that `SpectralLinear` states.

    The active vectors are arguments so that they get gradients; their values are not read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sigma: Tensor,
        u_active: Tensor,
        v_active: Tensor,
        u: Tensor,
        v: Tensor,
        index: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        # h (..., k): x in the coordinates of V. It is saved for the gradients of sigma and U, x for that of V.
        h = linear(x, v.to(dtype))
        _, by_sigma, by_u, by_v, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if by_v else None, h if by_sigma or by_u else None, sigma, u, v, index)
        ctx.dtypes = u_active.dtype, v_active.dtype
        return (h * sigma).to(dtype) @ u.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, sigma, u, v, index = ctx.saved_tensors
        by_x, by_sigma, by_u, by_v, *_ = ctx.needs_input_grad
        # q (..., k): the gradient in the coordinates of U. All leading dimensions count as rows below.
        q = linear(grad, u.to(grad.dtype))
        rows, q_rows = grad.reshape(-1, grad.shape[-1]), q.reshape(-1, q.shape[-1])
        grad_x = grad_sigma = grad_u = grad_v = None
        if by_x:
            grad_x = (q * sigma).to(grad.dtype) @ v.to(grad.dtype)
        if by_sigma or by_u:
            h_rows = h.reshape(-1, h.shape[-1])
        if by_sigma:
            grad_sigma = (h_rows * q_rows).sum(0, dtype=sigma.dtype)
        if by_u:
            grad_u = (h_rows[:, index].mT @ rows).to(ctx.dtypes[0])
        if by_v:
            grad_v = (q_rows[:, index].mT @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[1])
        return grad_x, grad_sigma, grad_u, grad_v, None, None, None, None
