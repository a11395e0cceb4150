"""Weights kept in 8 bits while they train: every update rounds stochastically, so that small ones survive on average.

Reference: Zhang et al., "Q-GaLore: quantized GaLore with INT4 projection and layer-adaptive low-rank gradients",
arXiv 2407.08296. Differences from it: a block's grid starts at a float32 number and not at a clamped integer, the grid
is made anew at each update, and the noise is a function of parameter, step and element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from ..ops.philox import Stream
from ..ops.quantize import PIECE, dequantize_affine, quantize_affine, uniform_noise
from .choose import linears

BLOCK = 256  # elements that share a grid
_BITS = 8
_aten = torch.ops.aten


class Int8Weight(Tensor):
    """A weight `(..., m, n)` in one byte per element, and 8 bytes per block of 256 of a flattened matrix.

    To torch it is a tensor of its `dtype` (its gradient is a plain one), and any operation reads its values. Writing is
    `copy_`, which rounds to nearest, or `pack_`; every other in-place operation is refused, because rounded to nearest
    the updates of a usual optimizer would vanish. Views are copies: what is written to them is lost.

    `F.linear` keeps the codes for backward, not the values.

    Args:
        codes: uint8, in the weight's shape.
        scale, low: float32 `(..., ceil(m n / 256))`: the value is `low + scale * code`.
        dtype: what it is to torch.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Int8Weight:
        self = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        self.codes, self.scale, self.low = codes, scale, low
        return self

    @classmethod
    def quantize(cls, x: Tensor) -> Int8Weight:
        """The nearest 8-bit weight to a plain one, of its dtype."""
        x = x.detach()
        codes, scale, low = quantize_affine(_flat(x), _BITS, BLOCK)
        return cls(codes.view(x.shape), scale, low, x.dtype)

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values as a plain tensor, by default of its own dtype; outside autograd."""
        flat = dequantize_affine(_flat(self.codes), self.scale, self.low, BLOCK, dtype or self.dtype)
        return flat.view(self.codes.shape)

    def pack_(self, x: Tensor, key: int, stream: Stream) -> None:
        """Overwrites it by `x`, each element rounded up or down so that `E[result] = x`.

        Args:
            x: any floating-point dtype, finite, in the weight's shape.
            key, stream: what the noise is a function of, besides the element's number in row-major order.
        """
        if x.shape != self.shape:
            raise ValueError(f"pack_ needs a tensor of shape {tuple(self.shape)}, got {tuple(x.shape)}")
        torch.autograd.graph.increment_version(self)  # backward through an older value is an error, as for any tensor
        k = _flat(self.codes).shape[-1]
        new, codes = x.detach().reshape(-1, k), self.codes.view(-1, k)
        scale, low = (numbers.view(-1, numbers.shape[-1]) for numbers in (self.scale, self.low))
        size = PIECE if x.device.type == "cpu" else max(k, 1)  # whole blocks, whose noise stays in cache
        for i in range(len(new)):
            for start in range(0, k, size):
                piece, blocks = slice(start, start + size), slice(start // BLOCK, -(-(start + size) // BLOCK))
                values = new[i, piece]
                noise = uniform_noise((len(values),), key, stream, i * k + start, x.device)
                codes[i, piece], scale[i, blocks], low[i, blocks] = quantize_affine(values, _BITS, BLOCK, noise)

    def stored_bytes(self) -> int:
        """Bytes of the codes and of their grids."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scale, self.low))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight({self.unpack()!r}, requires_grad={self.requires_grad})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "scale", "low"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, size: object, stride: object) -> Int8Weight:
        return Int8Weight(inner["codes"], inner["scale"], inner["low"], dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READERS:
            return func(args[0].detach().unpack(), *args[1:], **(kwargs or {}))
        if func in _WRITERS and isinstance(args[0], Int8Weight):
            raise _refusal(_WRITERS[func])
        with torch._C.DisableTorchFunctionSubclass():
            if func is linear:
                return _linear(*args, **(kwargs or {}))
            if func is Tensor.share_memory_:
                args[0]._map(Tensor.share_memory_)
                return args[0]
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _SPECIAL and isinstance(args[0], Int8Weight):
            return _SPECIAL[func](*args, **kwargs)
        if func._schema.is_mutable:
            _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(Int8Weight, Int8Weight.unpack, (args, kwargs))
        return func(*args, **kwargs)

    def _map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Int8Weight:
        return Int8Weight(change(self.codes), change(self.scale), change(self.low), dtype or self.dtype)


def quantize_weights(model: nn.Module, *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> nn.Module:
    """Replaces the weights of linear layers by `Int8Weight`, in place; make the optimizer after it.

    The output head stays as it is, and so does a weight that is also an embedding. Weights that linear layers share
    stay shared.

    Args:
        model: any module.
        include, exclude: regular expressions, searched in names of parameters, that decide before anything else.

    Returns:
        The same model.

    Raises:
        ValueError: a pattern that matches nothing, an included weight that something other than linear layers uses, a
            weight that is not finite, or nothing to quantize. The model is then unchanged.

    Example::

        model = lowrank_optim.quantize_weights(model)
    """
    chosen = linears(model, include, exclude, to="quantize")
    for name, layers in chosen.items():
        weight = layers[0].weight
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite; its blocks could not be quantized")
    for layers in chosen.values():
        weight = layers[0].weight
        packed = nn.Parameter(Int8Weight.quantize(weight), requires_grad=weight.requires_grad)
        for layer in layers:
            layer.weight = packed
    return model


class _Linear(torch.autograd.Function):
    """y = x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear(x, weight.unpack(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # hooks on saved tensors, such as those that offload them, may hand back a plain copy
            plain = weight.unpack(grad.dtype) if isinstance(weight, Int8Weight) else weight.to(grad.dtype)
            grad_x = grad @ plain
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name)
    """`F.linear`, also under autocast, with any of its arguments in 8 bits."""
    if not isinstance(weight, Int8Weight):
        return linear(input, weight, bias)
    device, dtype = input.device.type, weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)  # noqa: A001
    return _Linear.apply(input, weight, bias, dtype)  # type: ignore[no-any-return,no-untyped-call]


def _flat(x: Tensor) -> Tensor:
    """Each matrix as one row-major line."""
    return x.flatten(-2) if x.dim() > 1 else x


def _copy_(target: Int8Weight, source: Tensor, non_blocking: bool = False) -> Int8Weight:
    if not isinstance(source, Int8Weight) or source.shape != target.shape:
        plain = source.unpack() if isinstance(source, Int8Weight) else source
        source = Int8Weight.quantize(plain.to(target.device).expand(target.shape))
    for name in ("codes", "scale", "low"):
        getattr(target, name).copy_(getattr(source, name), non_blocking)
    return target


def _to_copy(weight: Int8Weight, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """Another device or floating-point dtype keeps the codes."""
    if dtype is not None and not dtype.is_floating_point:
        return weight.unpack().to(dtype)
    options = {key: value for key, value in options.items() if key in ("device", "non_blocking")}
    return weight._map(lambda x: x.to(copy=True, **options), dtype)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: lambda weight: weight._map(lambda x: x),
    _aten.alias.default: lambda weight: weight._map(lambda x: x),
    _aten.clone.default: lambda weight, **_: weight._map(Tensor.clone),
    _aten.copy_.default: _copy_,
    _aten._to_copy.default: _to_copy,
}

# Methods that torch does not dispatch: they read memory, write to a view (here a copy) or exchange memory.
_READERS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_WRITERS = {Tensor.__setitem__: "assignment to elements", Tensor.data.__set__: "assignment to .data"}  # type: ignore[attr-defined]


def _refuse_writes(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if any(isinstance(x, Int8Weight) for x in (value if isinstance(value, (list, tuple)) else [value])):
                raise _refusal(func._schema.name.split("::")[-1])


def _refusal(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} would write to an 8-bit weight, where small updates vanish if they are rounded to nearest. Train "
        "it with an optimizer of lowrank_optim; to overwrite it use copy_ (rounds to nearest) or pack_ (stochastically)"
    )


torch.serialization.add_safe_globals([Int8Weight])  # so that torch.load(weights_only=True) takes it
