"""The state of a chunk during its step: a stored tensor is opened when a part reads it, and not before.

Opening a tensor in few bits (bfloat16, int8) makes a float32 copy. Kernels that update the stored tensor itself need no
copy, so they take it from here while it is still closed. Once a tensor is open, the open one is the newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import NamedTuple

from torch import Tensor

from ..recipe.store import Noise, Store


class Stored(NamedTuple):
    """One logical tensor of one parameter in its stored form.

    Attributes:
        store: how it is stored.
        kept: the stored tensors, by suffix of their key.
        noise: the random numbers with which a write in this step is rounded.
    """

    store: Store
    kept: dict[str, Tensor]
    noise: Noise


class Opened(MutableMapping[str, Tensor]):
    """State tensors by name, as parts see them. A tensor is opened by its first read.

    Args:
        keys: names of the tensors.
        read: opens the tensor of a name, `(b, *spec.shape)` for the b matrices of the chunk.
        find: returns the tensor of a name in stored form, one entry per parameter.
        split: cuts an open or computed tensor into one tensor per parameter.
    """

    def __init__(
        self,
        keys: Iterable[str],
        read: Callable[[str], Tensor],
        find: Callable[[str], list[Stored]],
        split: Callable[[Tensor], list[Tensor]],
    ) -> None:
        # None stands for a tensor that is still closed.
        self._tensors: dict[str, Tensor | None] = dict.fromkeys(keys)
        self._read, self._find, self.split = read, find, split

    def __getitem__(self, key: str) -> Tensor:
        x = self._tensors[key]
        if x is None:
            x = self._tensors[key] = self._read(key)
        return x

    def __setitem__(self, key: str, x: Tensor) -> None:
        self._tensors[key] = x

    def __delitem__(self, key: str) -> None:
        del self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        # Inherited from Mapping, this test would read the tensor, and so open it.
        return key in self._tensors

    def is_open(self, key: str) -> bool:
        """Whether a tensor has been opened. Its stored form is then out of date."""
        return self._tensors[key] is not None

    def stored(self, *keys: str) -> list[tuple[Stored, ...]] | None:
        """Return these tensors of each parameter in stored form, to be updated there; None if one of them is open."""
        if any(map(self.is_open, keys)):
            return None
        return list(zip(*map(self._find, keys), strict=True))


class OfMatrix(MutableMapping[str, Tensor]):
    """The state of one matrix of a batch, or of a slice of it, as views that write through.

    Args:
        st: the state of the batch.
        index: the number of the matrix, or the slice.
    """

    def __init__(self, st: MutableMapping[str, Tensor], index: int | slice) -> None:
        self._st, self._index = st, index

    def __getitem__(self, key: str) -> Tensor:
        return self._st[key][self._index]

    def __setitem__(self, key: str, x: Tensor) -> None:
        self._st[key][self._index].copy_(x)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key} belongs to all matrices of the batch")

    def __iter__(self) -> Iterator[str]:
        return iter(self._st)

    def __len__(self) -> int:
        return len(self._st)

    def __contains__(self, key: object) -> bool:
        return key in self._st
