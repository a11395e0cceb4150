"""Linear layers whose weight is a product of thin factors, with or without a frozen weight below it."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import hyperparameters, ops
from ..distributed.dtensors import local, part, whole
from ..distributed.spans import span
from ..ops.factor import balance, split
from ..recipe.plan import bare_name, resolve_rank
from ..recipe.weights import unpacked, working_dtype
from . import checks as layer_checks
from .base import add_to_base_
from .quantized import Int8Weight, NF4Weight
from .rows import KINDS, ByteRows


def _as_it_is(w: Tensor) -> Tensor:
    return w


BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": _as_it_is,
    "int8": Int8Weight.quantize,
    "nf4": NF4Weight.quantize,
}


class ReparameterizedLinear(nn.Module, abc.ABC):
    """`y = x W^T + b` for a weight W (m, n) that is kept in another form. Takes the place of an `nn.Linear`.

    Reading `weight` composes W and is differentiable, so modules that use a layer's weight and not the layer (torch's
    attention, fast paths) still work, at the price of a dense W. There is no parameter of that name.

    Args:
        plain: gives shapes, dtype, device, the bias (the same parameter) and the weight to start from.
        rank: a number below min(m, n), or a fraction of it.
        name: in its model, which with `seed` decides its random numbers, equal on all ranks and devices.
    """

    factors: ClassVar[tuple[str, ...]]  # names of the parameters that are trained in place of W; the first one leads
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Linear, rank: int | float, *, name: str = "", seed: int = 0) -> None:
        super().__init__()
        hyperparameters.check({"rank": rank, "seed": seed}, {})
        self.out_features, self.in_features = plain.weight.shape
        self.rank = resolve_rank(rank, self.out_features, self.in_features)
        layer_checks.thin(name, self.rank, tuple(plain.weight.shape))
        self.key = ops.key_of(seed, bare_name(name))
        self.register_parameter("bias", plain.bias)
        self.train(plain.training)

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """W (m, n) in the working dtype (float32, or float64 for float64 layers), as a function of the factors."""

    @property
    def weight(self) -> Tensor:
        """W (m, n) in the dtype of the factors."""
        return self.dense().to(self.leader.dtype)

    @property
    def leader(self) -> nn.Parameter:
        """The first factor. Layers that share their weight have it in common."""
        return cast(nn.Parameter, getattr(self, self.factors[0]))

    @abc.abstractmethod
    def refuse_shards(self) -> None:
        """Raises a NotImplementedError where this layer is sharded in a way in which it cannot be restarted."""

    def made_with(self) -> dict[str, Any]:
        """The options that this layer was made with, as far as it still has them."""
        return {"rank": self.rank}

    def check_complete(self) -> None:
        """Raises a RuntimeError where the layer does not hold all that it has learned."""

    def to_linear(self) -> nn.Linear:
        """A plain layer of the same function, up to one rounding of W to the dtype of the factors."""
        self.check_complete()
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.no_grad():
            plain.weight = nn.Parameter(self.weight.detach())
        plain.bias = self.bias  # type: ignore[assignment]
        return plain.train(self.training)

    def restart_workspace(self) -> int:
        """Elements that a restart of this layer holds at once; for `estimate_memory`."""
        return 0

    def describe(self) -> str:
        """What `report()` remarks on the layer."""
        return ""

    def extra_repr(self) -> str:
        """As of nn.Linear, and what is special."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, rank={self.rank}" + (f", {self.describe()}" if self.describe() else "")

    def _drawn(self, shape: tuple[int, ...], fan_in: int, purpose: str, count: int, device: Any) -> Tensor:
        """What torch draws for linear layers, uniform in +-1/sqrt(fan_in); number `count` of its purpose."""
        if torch.device(device).type == "meta":
            return torch.empty(shape, device="meta")
        unit = ops.uniform(shape, self.key, ops.stream_of(purpose, count), device)
        return unit.mul_(2).sub_(1).mul_(1 / math.sqrt(fan_in))


class ProductLinear(ReparameterizedLinear):
    """What layers share that have a product `s B A`, `A (r, n)`, `B (m, r)`, `s = alpha / r`, in their weight."""

    B: nn.Parameter
    A: nn.Parameter
    scale: float

    def made_with(self) -> dict[str, Any]:
        return {**super().made_with(), "alpha": round(self.scale * self.rank, 9)}

    @torch.no_grad()
    def balance_(self) -> None:
        """Shares the singular values of the product out evenly between the factors; the function stays.

        Of a sharded layer, all ranks call it, and both factors are gathered.
        """
        working, (b, a) = working_dtype(self.B), (whole(self.B), whole(self.A))
        if bool(a.isfinite().all() and b.isfinite().all()):  # else there is nothing to save
            b, a = balance(b.to(working), a.to(working))
            local(self.B).copy_(part(b, self.B))
            local(self.A).copy_(part(a, self.A))

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        shapes = (self.out_features, self.rank), (self.rank, self.in_features)
        if w.is_meta:
            return w.new_empty(shapes[0]), w.new_empty(shapes[1])
        b, a = split(w.to(working_dtype(w)), self.rank)
        return b * self.scale**-0.5, a * self.scale**-0.5


class LowRankLinear(ProductLinear):
    r"""`W = base + s B A` with `A (r, n)`, `B (m, r)` trained, `s = alpha / r` and a frozen base, or none.

    With a base: A uniform in +-1/sqrt(n), B zero, so that the function is the one of `plain`. Without, `init` says how
    W becomes a product: "spectral" takes its best approximation of rank r, balanced (`B^T B = A A^T`); "random" draws
    both factors and forgets W, as published for training from scratch.

    Args:
        plain, rank, name, seed: see `ReparameterizedLinear`.
        alpha: s times the rank.
        base: "dense" (in the dtype of `plain`), "int8" (1.03 bytes per element), "nf4" (0.56), or "none".
        exact_base: with a quantized base, also keep an exact copy on the CPU, in float32, where merges add up without
            being rounded away. It is saved with the layer and never moves to the device.
        by_rows: with a quantized base, keep it as a matrix of bytes (uint8), which `fully_shard` can share out: blocks
            end with their row. Layers of which n is not a multiple of the block take a little more.
        init: without a base.
    """

    factors = ("B", "A")

    def __init__(
        self,
        plain: nn.Linear,
        rank: int | float,
        *,
        alpha: float = 32.0,
        base: str = "dense",
        exact_base: bool = False,
        by_rows: bool = False,
        init: str = "spectral",
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(plain, rank, name=name, seed=seed)
        hyperparameters.check({"alpha": alpha, "base": base, "init": init, "exact_base": exact_base}, {})
        layer_checks.for_quantized(base, base in KINDS, {"exact_base": exact_base, "by_rows": by_rows})
        self.scale = float(hyperparameters.single("alpha", alpha)) / self.rank
        w, (m, n, r) = plain.weight.detach(), (self.out_features, self.in_features, self.rank)
        self.kind, self.rows = base, ByteRows(KINDS[base], n) if by_rows else None
        exact = w.to("meta" if w.is_meta else "cpu", working_dtype(w), copy=True) if exact_base else None
        self.exact = exact
        if base == "none":
            self.register_parameter("base", None)
            b, a = self._split(w) if init == "spectral" else self._random(w)
        else:
            self.base = nn.Parameter(
                BASES[base](w) if self.rows is None else self.rows.bytes_of(w), requires_grad=False
            )
            b, a = w.new_zeros(m, r), self._drawn((r, n), n, "A", 0, w.device)
        self.B, self.A = (nn.Parameter(x.to(w.dtype).contiguous()) for x in (b, a))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        thin = linear(x, self.A) * self.scale
        if self.base is None:
            return linear(thin, self.B, self.bias)
        return linear(x, self._below(self.base), self.bias) + linear(thin, self.B)

    def dense(self) -> Tensor:
        product = self._product()
        return product if self.base is None else unpacked(self._below(self.base), product.dtype) + product

    def _below(self, base: Tensor) -> Tensor:
        """The base, or some rows of it, as a weight."""
        return base if self.rows is None else self.rows.weight(base, self.B.dtype)

    def _product(self) -> Tensor:
        working = working_dtype(self.B)
        return self.scale * (self.B.to(working) @ self.A.to(working))

    @torch.no_grad()
    def merge_(self, count: int, stochastic: bool = True) -> None:
        """Moves the product into the base and starts the factors anew: the function stays, up to one rounding.

        Args:
            count: number of this merge, from 1; decides the new A. Of a sharded layer, all ranks call it: A (r, n) is
                gathered, and the base never.
            stochastic: round to bfloat16 or to int8 so that small products survive on average; else to nearest.
        """
        if self.base is None:
            raise RuntimeError("a layer without a base has nothing to merge into")
        working = working_dtype(self.B)
        here, stream = span(self.base, self.in_features), ops.stream_of("merge", count)
        product = here.of_product(local(self.B).to(working), whole(self.A).to(working)).mul_(self.scale)
        below = self._below(here.x)
        add_to_base_(below, product, self.key, stream, stochastic=stochastic, exact=self.exact, start=here.start)
        drawn = self._drawn((self.rank, self.in_features), self.in_features, "A", count, self.A.device)
        local(self.A).copy_(part(drawn, self.A))
        local(self.B).zero_()

    def made_with(self) -> dict[str, Any]:
        return {**super().made_with(), "base": self.kind, "exact_base": self.exact is not None}

    def refuse_shards(self) -> None:
        codes = self.kind in KINDS and self.rows is None
        cut = [] if self.base is None else [self.B, self.base]
        layer_checks.shards_of_rows(LowRankLinear.__name__, self.kind if codes else "", self.exact is not None, cut)

    def restart_workspace(self) -> int:
        if self.base is None:  # two orthonormal bases and what replaces the factors
            return 3 * self.rank * (self.out_features + self.in_features)
        return (2 + (self.B.dtype == torch.bfloat16)) * self.out_features * self.in_features

    def describe(self) -> str:
        if self.base is None:
            return "no base"
        return f"{self.kind} base" + (", exact copy on the CPU" if self.exact is not None else "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """With the exact base, where there is one: no buffer, because it stays on the CPU in its own dtype."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.exact is not None:
            destination[prefix + "exact"] = self.exact

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        saved = None if self.exact is None else state_dict.pop(prefix + "exact", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.exact is not None and self.base is not None:
            if saved is None:
                _, _, missing, _, _ = rest
                missing.append(prefix + "exact")
                below = self._below(self.base)
                saved = unpacked(below, self.exact.dtype)  # not strict: never merge into another model's weight
            self.exact.copy_(saved)

    def _random(self, w: Tensor) -> tuple[Tensor, Tensor]:
        (m, n), r = w.shape, self.rank
        return self._drawn((m, r), r, "B", 0, w.device), self._drawn((r, n), n, "A", 0, w.device)
