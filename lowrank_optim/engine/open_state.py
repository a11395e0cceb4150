"""The state of a chunk while its step is taken: what is stored, opened when somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import NamedTuple

from torch import Tensor

from ..recipe.store import Noise, Store


class Stored(NamedTuple):
    """One tensor of one parameter as it is kept, by suffix, with the noise that it would be rounded with."""

    store: Store
    kept: dict[str, Tensor]
    noise: Noise


class Opened(MutableMapping[str, Tensor]):
    """Tensors by name, as parts see them. A kernel that works on what is stored leaves them closed: there is no copy.

    Args:
        keys: what there is.
        read: opens one, for all parameters of the chunk.
        find: one as it is stored, parameter by parameter.
        split: what has been opened or computed, by parameter.
    """

    def __init__(
        self,
        keys: Iterable[str],
        read: Callable[[str], Tensor],
        find: Callable[[str], list[Stored]],
        split: Callable[[Tensor], list[Tensor]],
    ) -> None:
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
        return key in self._tensors

    def is_open(self, key: str) -> bool:
        return self._tensors[key] is not None

    def stored(self, *keys: str) -> list[tuple[Stored, ...]] | None:
        """These tensors of each parameter, to be updated where they are; None if one is open, and the newer one."""
        if any(map(self.is_open, keys)):
            return None
        return list(zip(*map(self._find, keys), strict=True))


class OfMatrix(MutableMapping[str, Tensor]):
    """What of a state belongs to matrix `index` of the batch, or to a slice: views, opened when somebody asks."""

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
