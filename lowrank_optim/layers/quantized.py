"""Provide weights in few bits that are tensors to torch: `Int8Weight` for training, `NF4Weight` for frozen bases.

An optimizer of this package writes to them with stochastic rounding, so that updates below one quantization step
survive on average.

References: Zhang et al., "Q-GaLore: quantized GaLore with INT4 projection and layer-adaptive low-rank gradients",
arXiv 2407.08296 (8 bits); Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", arXiv 2305.14314 (NF4).
Differences from the first: a block's grid starts at a float32 number and not at a clamped integer, the grid is
computed again at each update, and the noise is a function of parameter, step and element. Difference from the second:
the numbers of the blocks stay in float32 (no double quantization).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from .. import checks
from ..ops.philox import Stream
from ..ops.quantize import (
    PIECE,
    dequantize_affine,
    dequantize_blockwise,
    nf4_map,
    pack4,
    quantize_affine,
    quantize_blockwise,
    uniform_noise,
    unpack4,
)
from .choose import linears

if TYPE_CHECKING:
    from typing_extensions import Self

_aten = torch.ops.aten
_MANY = 1 << 24  # number of elements that are packed at once on accelerators


class QuantizedWeight(Tensor):
    """A weight `(..., m, n)` that is stored as lines of codes, with numbers for each block of a line.

    A line is a whole matrix in row-major order or, with `by_rows=True`, a row.

    For torch it is a tensor of its `dtype` with a plain gradient, and any operation reads its values. It is written to
    by `copy_`, which rounds to nearest, and by `pack_`. Every other in-place operation is refused, because the updates
    of a usual optimizer would vanish if they were rounded to nearest. Views are copies: values written to them are
    lost. `F.linear` saves the codes for backward, not the values.

    A subclass defines the inner tensors, and how lines are encoded to them and decoded.

    Args:
        inner: the tensors of `per`, in its order, `(..., ceil(m n / per))`, or `(..., m, ceil(n / per))` by rows.
        shape, dtype: those of the weight for torch.
    """

    per: ClassVar[dict[str, int]]  # the inner tensors by name, and how many elements share an entry of each

    @staticmethod
    def __new__(cls, *inner: Tensor, shape: torch.Size, dtype: torch.dtype) -> Self:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=inner[0].device)
        for name, x in zip(cls.per, inner, strict=True):
            setattr(self, name, x)
        return self

    @classmethod
    def encode(cls, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the inner tensors for lines `(..., k)`.

        Without noise, values are rounded to nearest. With uniform noise `(..., k)` they are rounded up or down, so that
        `E[result] = x`.
        """
        raise NotImplementedError

    def decode(self, k: int, dtype: torch.dtype) -> Tensor:
        """Return the values of the lines, `(..., k)` in `dtype`."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, x: Tensor, by_rows: bool = False) -> Self:
        """Return a plain weight quantized to nearest, with the same dtype for torch."""
        return cls(*cls.encode(x.detach() if by_rows else _flat(x.detach())), shape=x.shape, dtype=x.dtype)

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a plain tensor in `dtype` (None: the weight's own), outside autograd."""
        return self.decode(self._line, dtype or self.dtype).view(self.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the values as a plain tensor in `dtype`, inside autograd: their gradient is that of the weight."""
        return cast(Tensor, _Read.apply(self, dtype))  # type: ignore[no-untyped-call]

    def pack_(self, x: Tensor, key: int, stream: Stream, first: int = 0) -> None:
        """Overwrite the weight by `x`, each element rounded up or down so that `E[result] = x`.

        Args:
            x: finite, in any floating-point dtype and the shape of the weight.
            key, stream: the noise is a function of these and of the element's row-major index.
            first: index of the first element in the whole weight, where other ranks have the rows before it.
        """
        if x.shape != self.shape:
            raise ValueError(f"pack_ needs a tensor of shape {tuple(self.shape)}, got {tuple(x.shape)}")
        torch.autograd.graph.increment_version(self)  # backward through an older value is an error, as for any tensor
        k = self._line
        new, inner = x.detach().reshape(-1, k), [(t.view(-1, t.shape[-1]), self.per[name]) for name, t in self._inner()]
        # Noise and intermediate values are made for `lines` lines of `size` elements at a time. On a CPU they then stay
        # in the cache. A piece is a multiple of every block, so pieces begin with blocks.
        size = PIECE if x.device.type == "cpu" else max(k, 1)
        lines = max(1, (PIECE if x.device.type == "cpu" else _MANY) // max(k, 1))
        for i in range(0, len(new), lines):
            for start in range(0, k, size):
                values = new[i : i + lines, start : start + size]
                noise = uniform_noise(tuple(values.shape), key, stream, first + i * k + start, x.device)
                for (target, per), piece in zip(inner, self.encode(values, noise), strict=True):
                    target[i : i + lines, start // per : start // per + piece.shape[-1]] = piece

    def stored_bytes(self) -> int:
        """Return the number of bytes of the codes and of the numbers of their blocks."""
        return sum(x.numel() * x.element_size() for _, x in self._inner())

    def parts(self) -> list[Tensor]:
        """Return the inner tensors in the order of `per`, in the same memory."""
        return [x for _, x in self._inner()]

    @property
    def by_rows(self) -> bool:
        """Whether a line of codes is a row, and not a whole matrix."""
        return self.dim() > 1 and self._inner()[0][1].dim() == self.dim()

    @property
    def _line(self) -> int:
        """The number of elements of a line of codes."""
        return self.shape[-1] if self.by_rows else self.shape[-2:].numel()

    def _inner(self) -> list[tuple[str, Tensor]]:
        """Return the inner tensors with their names."""
        return [(name, getattr(self, name)) for name in self.per]

    def _map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        """Return a weight of the same class and shape whose inner tensors are changed by a function."""
        return type(self)(*(change(x) for _, x in self._inner()), shape=self.shape, dtype=dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.unpack()!r}, requires_grad={self.requires_grad})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.Size, torch.dtype]]:
        return list(self.per), (self.shape, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], kind: tuple[torch.Size, torch.dtype], size: object, stride: object
    ) -> Self:
        return cls(*(inner[name] for name in cls.per), shape=kind[0], dtype=kind[1])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # First the methods that torch does not dispatch to `__torch_dispatch__`: these read memory or write to it.
        if func in _READERS:
            return func(args[0].detach().unpack(), *args[1:], **(kwargs or {}))
        if func in _WRITERS and isinstance(args[0], QuantizedWeight):
            raise _refusal(_WRITERS[func], args[0])
        with torch._C.DisableTorchFunctionSubclass():
            # `F.linear` is caught here, above autograd, so that codes are saved for backward instead of values.
            if func is linear:
                return _linear(*args, **(kwargs or {}))
            if func is Tensor.share_memory_:
                args[0]._map(Tensor.share_memory_)
                return args[0]
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _SPECIAL and isinstance(args[0], QuantizedWeight):
            return _SPECIAL[func](*args, **kwargs)
        if func._schema.is_mutable:
            _refuse_writes(func, args, kwargs)
        # Any other operation sees plain values.
        args, kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.unpack, (args, kwargs))
        return func(*args, **kwargs)


class Int8Weight(QuantizedWeight):
    """A weight `(..., m, n)` in one byte per element and 8 bytes per block of 256: 1.03 bytes per element.

    `quantize_weights` makes it, and optimizers of this package train it. A value is `low + scale * code`: a grid of 256
    equal steps from the smallest to the largest value of its block.

    Inner tensors: `codes` uint8, one per element; `scale` and `low` float32, one per block.
    """

    per = {"codes": 1, "scale": 256, "low": 256}
    codes: Tensor
    scale: Tensor
    low: Tensor

    @classmethod
    def encode(cls, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        return quantize_affine(x, 8, cls.per["scale"], noise)

    def decode(self, k: int, dtype: torch.dtype) -> Tensor:
        return dequantize_affine(self.codes, self.scale, self.low, self.per["scale"], dtype)


class NF4Weight(QuantizedWeight):
    """A weight `(..., m, n)` in half a byte per element and 4 bytes per block of 64: 0.5625 bytes per element.

    It is meant for the base of a low-rank layer, which changes only when factors are merged into it. A value is
    `absmax * nf4_map()[code]`. Codes and values are those of bitsandbytes, except for the order in a byte: here the
    first code is the lower half, there it is the upper half.

    Rounded to nearest, as by `copy_`, a merge loses every change below half a step (4 to 15 % of the largest magnitude
    of a block), and loses it again at every merge. `pack_` keeps changes in expectation: its noise is independent
    between elements and averages out in a product, whereas a low-rank update does not. Where the error of rounding is
    compensated (LoQT fits its factor to it), rounding to nearest leaves the smallest error to compensate.

    `quantize_weights` does not make these weights: with 16 values in a block, the noise of an update at every step
    would be far larger than the updates. An optimizer that is given such a weight writes to it by `pack_`.

    Inner tensors: `codes` uint8, two to a byte; `absmax` float32, one per block.
    """

    per = {"codes": 2, "absmax": 64}
    codes: Tensor
    absmax: Tensor

    @classmethod
    def encode(cls, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        codes, absmax = quantize_blockwise(x, nf4_map(x.device), cls.per["absmax"], noise=noise)
        return pack4(codes), absmax

    def decode(self, k: int, dtype: torch.dtype) -> Tensor:
        codes = unpack4(self.codes, k)
        return dequantize_blockwise(codes, self.absmax, nf4_map(codes.device), self.per["absmax"], dtype)


def quantize_weights(model: nn.Module, *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> nn.Module:
    """Replace the weights of linear layers by `Int8Weight`, in place. Make the optimizer afterwards.

    The output head stays as it is, and so does a weight that is also an embedding. Weights that linear layers share
    stay shared.

    Args:
        model: any module.
        include, exclude: regular expressions, searched in names of parameters, that decide before any other rule.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module.
        ValueError: a pattern matches nothing, an included weight is also used by a module that is no linear layer, a
            weight is not finite, or there is nothing to quantize. The model is then unchanged.

    Example::

        model = lowrank_optim.quantize_weights(model)
    """
    checks.module(model)
    # All weights are checked before the first is replaced, so that an error leaves the model unchanged.
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


class _Read(torch.autograd.Function):
    """The values of a weight as a plain tensor, through which gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.unpack(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None


class _Linear(torch.autograd.Function):
    """The product y = x W^T + b, which saves x and the codes, and decodes W again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear(x, weight.unpack(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Hooks on saved tensors, such as those that offload them, may hand back a plain copy.
            plain = weight.unpack(grad.dtype) if isinstance(weight, QuantizedWeight) else weight.to(grad.dtype)
            grad_x = grad @ plain
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name)
    """Compute `F.linear`, also under autocast, with any of its arguments quantized."""
    if not isinstance(weight, QuantizedWeight):
        return linear(input, weight, bias)
    device, dtype = input.device.type, weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)  # noqa: A001
    return _Linear.apply(input, weight, bias, dtype)  # type: ignore[no-any-return,no-untyped-call]


def _flat(x: Tensor) -> Tensor:
    """Return `(..., m, n)` as lines `(..., m n)`, one for each matrix."""
    return x.flatten(-2) if x.dim() > 1 else x.view(-1)


def _copy_(target: QuantizedWeight, source: Tensor, non_blocking: bool = False) -> QuantizedWeight:
    """Overwrite a weight: by the codes of a source of the same kind, else by the source's values rounded to nearest."""
    same = type(source) is type(target) and source.shape == target.shape and source.by_rows == target.by_rows
    if not same:
        plain = source.unpack() if isinstance(source, QuantizedWeight) else source
        source = target.quantize(plain.to(target.device).expand(target.shape), target.by_rows)
    for name, x in target._inner():
        x.copy_(getattr(source, name), non_blocking)
    return target


def _to_copy(weight: QuantizedWeight, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """Return a copy on another device or in another dtype; with floating-point dtypes the codes stay the same."""
    if dtype is not None and not dtype.is_floating_point:
        return weight.unpack().to(dtype)
    options = {key: value for key, value in options.items() if key in ("device", "non_blocking")}
    return weight._map(lambda x: x.to(copy=True, **options), dtype)


# Operators that work on the codes. All others work on plain values.
_SPECIAL: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: lambda weight: weight._map(lambda x: x),
    _aten.alias.default: lambda weight: weight._map(lambda x: x),
    _aten.clone.default: lambda weight, **_: weight._map(Tensor.clone),
    _aten.copy_.default: _copy_,
    _aten._to_copy.default: _to_copy,
}

# Methods that torch does not dispatch: they read memory, write to a view (which is a copy here) or exchange memory.
_READERS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_WRITERS = {Tensor.__setitem__: "assignment to elements", Tensor.data.__set__: "assignment to .data"}  # type: ignore[attr-defined]


def _refuse_writes(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise if an in-place operator would write to a quantized weight, as its schema tells."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(x, QuantizedWeight):
                    raise _refusal(func._schema.name.split("::")[-1], x)


def _refusal(name: str, weight: Tensor) -> RuntimeError:
    """Return the error for an operation that would write to a quantized weight."""
    return RuntimeError(
        f"{name} would write to an {type(weight).__name__}, where small updates vanish if they are rounded to nearest. "
        "Train it with an optimizer of lowrank_optim; to overwrite it use copy_ (rounds to nearest) or pack_ "
        "(stochastically); to average weights, average plain weights, as lowrank_optim.merge returns them"
    )


torch.serialization.add_safe_globals([Int8Weight, NF4Weight])  # so that torch.load(weights_only=True) takes them
