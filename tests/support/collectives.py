"""Collectives, counted."""

from __future__ import annotations

import torch.distributed as dist


class Counted:
    """Elements of every collective while it is entered, and the bytes of all."""

    def __enter__(self):
        self.sizes, self.bytes, self.before = [], 0, (dist.all_reduce, dist.all_gather)

        def all_reduce(x, *args, **kwargs):
            self.sizes.append(x.numel())
            self.bytes += x.nbytes
            return self.before[0](x, *args, **kwargs)

        def all_gather(pieces, x, *args, **kwargs):
            self.sizes.append(x.numel())
            self.bytes += x.nbytes
            return self.before[1](pieces, x, *args, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        return self

    def __exit__(self, *_):
        dist.all_reduce, dist.all_gather = self.before
