"""The parameters of the paper's LLaMA, by name; the head is not tied."""

from __future__ import annotations


def shapes(
    hidden: int, mlp: int, layers: int, vocabulary: int = 32000, keys: int | None = None
) -> dict[str, tuple[int, ...]]:
    """`keys`: width of all keys together, where queries share them."""
    found: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, hidden)}
    for layer in range(layers):
        found |= {f"{layer}.{name}_proj": (hidden, hidden) for name in "qo"}
        found |= {f"{layer}.{name}_proj": (keys or hidden, hidden) for name in "kv"}
        found |= {f"{layer}.gate_proj": (mlp, hidden), f"{layer}.up_proj": (mlp, hidden)}
        found |= {f"{layer}.down_proj": (hidden, mlp)}
        found |= {f"{layer}.norm1": (hidden,), f"{layer}.norm2": (hidden,)}
    return found | {"norm": (hidden,), "lm_head": (vocabulary, hidden)}
