"""APOLLO-Mini: one factor per matrix from a rank of one. Zhu et al. 2024, https://arxiv.org/abs/2412.05270"""

from __future__ import annotations

import functools

from .apollo import APOLLO


class APOLLOMini(APOLLO):
    """`APOLLO` with rank 1, one factor for the whole matrix, and scale 128, all as published.

    Memory: `2 n` elements per matrix and two numbers, almost nothing.

    Example::

        opt = lowrank_optim.APOLLOMini(lowrank_optim.param_groups(model), lr=1e-2)
    """

    default_rank = 1

    __init__ = functools.partialmethod(APOLLO.__init__, granularity="tensor", scale=128.0)
