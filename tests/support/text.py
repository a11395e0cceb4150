"""Text made of words that are drawn."""

from __future__ import annotations

import random


def words(seed: int, count: int = 120) -> str:
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(40)]
    return " ".join(draw.choices(vocabulary, k=count))
