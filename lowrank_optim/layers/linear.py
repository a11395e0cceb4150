"""Provide linear layers whose weight is a product of thin factors, with or without a frozen base under it."""

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
    """Return w itself, the dense base."""
    return w


# How a base is made of a weight (m, n), by the name that users give.
BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": _as_it_is,
    "int8": Int8Weight.quantize,
    "nf4": NF4Weight.quantize,
}


class ReparameterizedLinear(nn.Module, abc.ABC):
    """A layer `y = x W^T + b` whose weight W (m, n) is stored in another form. It takes the place of an `nn.Linear`.

    Reading `weight` composes W and is differentiable. Modules that read a layer's weight instead of calling the layer
    (torch's attention, fast paths) therefore still work, at the price of a dense W. There is no parameter `weight`.

    Args:
        plain: the layer to replace. It gives shapes, dtype, device, the weight to start from, and the bias, which stays
            the same parameter.
        rank: an int below min(m, n), or a fraction of it.
        name: the name of the layer in its model. It decides the random numbers together with `seed`; they are equal on
            all ranks and devices.
        seed: of the random numbers.
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
        """Return W (m, n) in the working dtype (float32, or float64 for float64 layers), differentiable."""

    @property
    def weight(self) -> Tensor:
        """W (m, n) in the dtype of the factors."""
        return self.dense().to(self.leader.dtype)

    @property
    def leader(self) -> nn.Parameter:
        """The first factor, by which layers that share their weight are recognized."""
        return cast(nn.Parameter, getattr(self, self.factors[0]))

    @abc.abstractmethod
    def refuse_shards(self) -> None:
        """Raise a NotImplementedError if the layer is sharded in such a way that it cannot be restarted."""

    def made_with(self) -> dict[str, Any]:
        """Return the options that the layer was made with, as far as it still stores them."""
        return {"rank": self.rank}

    def check_complete(self) -> None:
        """Raise a RuntimeError if other ranks hold updates of W that this layer does not have yet."""

    def to_linear(self) -> nn.Linear:
        """Return a plain layer of the same function, up to one rounding of W to the dtype of the factors."""
        self.check_complete()
        # On the meta device, so that no memory is taken before W is there.
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.no_grad():
            plain.weight = nn.Parameter(self.weight.detach())
        plain.bias = self.bias  # type: ignore[assignment]
        return plain.train(self.training)

    def restart_workspace(self) -> int:
        """Return the number of elements that a restart of the layer holds at once; for `estimate_memory`."""
        return 0

    def describe(self) -> str:
        """Return the remark on the layer in `report()`, or ""."""
        return ""

    def extra_repr(self) -> str:
        """Return the text of `nn.Linear`, followed by rank and remark."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, rank={self.rank}" + (f", {self.describe()}" if self.describe() else "")

    def _drawn(self, shape: tuple[int, ...], fan_in: int, purpose: str, count: int, device: Any) -> Tensor:
        """Return random numbers as torch draws them for linear layers, uniform in +-1/sqrt(fan_in).

        They are a function of the layer's key, of the purpose (such as "A") and of `count`, the index of the draw.
        """
        if torch.device(device).type == "meta":
            return torch.empty(shape, device="meta")
        unit = ops.uniform(shape, self.key, ops.stream_of(purpose, count), device)
        return unit.mul_(2).sub_(1).mul_(1 / math.sqrt(fan_in))


class ProductLinear(ReparameterizedLinear):
    """The common part of layers with a product `s B A`, `A (r, n)`, `B (m, r)`, `s = alpha / r`, in their weight."""

    B: nn.Parameter
    A: nn.Parameter
    scale: float

    def made_with(self) -> dict[str, Any]:
        return {**super().made_with(), "alpha": round(self.scale * self.rank, 9)}

    @torch.no_grad()
    def balance_(self) -> None:
        """Divide the singular values of the product evenly between the factors; the function stays the same.

        All ranks call it for a sharded layer, and both factors are gathered.
        """
        working, (b, a) = working_dtype(self.B), (whole(self.B), whole(self.A))
        # Factors that are not finite have no decomposition, and are left as they are.
        if bool(a.isfinite().all() and b.isfinite().all()):
            b, a = balance(b.to(working), a.to(working))
            local(self.B).copy_(part(b, self.B))
            local(self.A).copy_(part(a, self.A))

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return balanced factors B (m, r), A (r, n) for which `s B A` is the best approximation of w of rank r."""
        shapes = (self.out_features, self.rank), (self.rank, self.in_features)
        if w.is_meta:
            return w.new_empty(shapes[0]), w.new_empty(shapes[1])
        b, a = split(w.to(working_dtype(w)), self.rank)
        return b * self.scale**-0.5, a * self.scale**-0.5


class LowRankLinear(ProductLinear):
    r"""A layer `W = base + s B A` with trained `A (r, n)`, `B (m, r)`, `s = alpha / r`, and a frozen base or none.

    With a base, A is uniform in +-1/sqrt(n) and B is zero, so the function is that of `plain`. Without a base, `init`
    says how W becomes a product. "spectral" takes the best approximation of rank r, balanced (`B^T B = A A^T`).
    "random" draws both factors and discards W, as published for training from scratch.

    Args:
        plain, rank, name, seed: see `ReparameterizedLinear`.
        alpha: s times the rank.
        base: "dense" (in the dtype of `plain`), "int8" (1.03 bytes per element), "nf4" (0.56), or "none".
        exact_base: with a quantized base, also keep an exact copy on the CPU, in float32. Merges add up there without
            being rounded away. The copy is saved with the layer and never moves to the device.
        by_rows: with a quantized base, keep it as a matrix of bytes (uint8) whose blocks end with their row, so that
            `fully_shard` can shard it. It takes a little more memory if n is not a multiple of the block.
        init: "spectral" or "random", used without a base only.
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
        """Return y (..., m) for x (..., n)."""
        thin = linear(x, self.A) * self.scale
        if self.base is None:
            return linear(thin, self.B, self.bias)
        return linear(x, self._below(self.base), self.bias) + linear(thin, self.B)

    def dense(self) -> Tensor:
        product = self._product()
        return product if self.base is None else unpacked(self._below(self.base), product.dtype) + product

    def _below(self, base: Tensor) -> Tensor:
        """Return the base, or local rows of it, as a weight: rows of bytes become a quantized weight."""
        return base if self.rows is None else self.rows.weight(base, self.B.dtype)

    def _product(self) -> Tensor:
        """Return `s B A` (m, n) in the working dtype."""
        working = working_dtype(self.B)
        return self.scale * (self.B.to(working) @ self.A.to(working))

    @torch.no_grad()
    def merge_(self, count: int, stochastic: bool = True) -> None:
        """Add the product to the base and restart the factors; the function stays the same up to one rounding.

        All ranks call it for a sharded layer: A (r, n) is gathered, and the base never is.

        Args:
            count: index of this merge, from 1. It decides the new A and the noise of rounding.
            stochastic: round to bfloat16 or to packed codes so that small products survive on average; else to nearest.
        """
        if self.base is None:
            raise RuntimeError("a layer without a base has nothing to merge into")
        # The local elements of the product are added to those of the base, under FSDP2 and ZeRO-3 as well.
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
        if self.base is None:  # `balance_`: two orthonormal bases and the new factors
            return 3 * self.rank * (self.out_features + self.in_features)
        # `merge_`: the product and the sum (m, n), and the rounded weight where factors are in bfloat16.
        return (2 + (self.B.dtype == torch.bfloat16)) * self.out_features * self.in_features

    def describe(self) -> str:
        if self.base is None:
            return "no base"
        return f"{self.kind} base" + (", exact copy on the CPU" if self.exact is not None else "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the layer, including the exact base if there is one.

        The exact base is no buffer, because `model.to(...)` would move and cast it.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.exact is not None:
            destination[prefix + "exact"] = self.exact

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load the layer, including the exact base; its key may be missing if `strict` is False."""
        saved = None if self.exact is None else state_dict.pop(prefix + "exact", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.exact is not None and self.base is not None:
            if saved is None:
                _, _, missing, _, _ = rest
                missing.append(prefix + "exact")
                # Without strict, take the loaded base. Else the next merge would add to the weight of another model.
                below = self._below(self.base)
                saved = unpacked(below, self.exact.dtype)
            self.exact.copy_(saved)

    def _random(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return random factors B (m, r), A (r, n), both drawn as torch draws linear layers."""
        (m, n), r = w.shape, self.rank
        return self._drawn((m, r), r, "B", 0, w.device), self._drawn((r, n), n, "A", 0, w.device)
