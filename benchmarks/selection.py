"""DCT's selection and SLTrain's entries beside plain torch: `python -m benchmarks.selection [--rounds 15]`.

On one thread, in its CPU time, each beside what it replaces, in turns; ratios are taken round by round and their
median is reported. Shapes are those of LLaMA layers, gradients as they come and transposed.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import lowrank_optim
from benchmarks import record
from benchmarks.native import Run, compared
from lowrank_optim import SparseLowRankLinear, ops
from lowrank_optim.layers import sparse
from lowrank_optim.ops import native, reference
from lowrank_optim.ops.dictionary import dictionary, scores
from lowrank_optim.parts.random import top

TOKENS = 2048


def selections() -> dict[str, tuple[Run, Run]]:
    """name -> (ours, plain): r = n / 4 vectors of a DCT for a gradient (n, k), as coefficients, squares, sums, topk."""
    pairs: dict[str, tuple[Run, Run]] = {}
    for n, k in ((256, 1024), (512, 1376), (1024, 2736), (2048, 2048)):
        for order in ("rows", "columns"):
            g = torch.randn(n, k) if order == "rows" else torch.randn(k, n).mT
            d = dictionary("dct2", n, g.dtype, g.device)

            def plain(g: Tensor = g, d: Tensor = d) -> Tensor:
                return (d.mT @ g).square().sum(-1).topk(len(g) // 4).indices.sort().values.int()

            for how, fast in (("FFT", True), ("product", False)):
                name = f"selection {n} x {k} by {how}, {order} in memory"
                pairs[name] = (lambda g=g, fast=fast: top(scores("dct2", g, 2, fast), len(g) // 4)), plain
    for n in (1024, 4096):
        values, index = torch.rand(n), torch.empty(n // 4, dtype=torch.int32)
        select = torch.ops.lowrank_optim.select_top_.default
        pairs[f"select_top_ of {n}, over a sort"] = (
            lambda v=values, i=index, f=select: f(i, v),
            lambda v=values, i=index: reference.select_top_(i, v),
        )
    return pairs


def entries() -> dict[str, tuple[Run, Run]]:
    """The same for an SLTrain layer (m, n) of density 0.03 and some tokens; plain is what a few lines of torch do."""
    pairs: dict[str, tuple[Run, Run]] = {}
    for m, n, r, dtype in (
        (512, 512, 128, torch.float32),
        (2736, 1024, 256, torch.float32),
        (2736, 1024, 256, torch.bfloat16),
    ):
        layer = SparseLowRankLinear(nn.Linear(n, m, bias=False, dtype=dtype), r, init="random")
        b, a, values = (x.detach() for x in (layer.B, layer.A, layer.values))
        support, s = layer.support, layer.scale
        w, other = torch.randn(2, m, n, dtype=dtype)
        x, g = torch.randn(TOKENS, n, dtype=dtype), torch.randn(TOKENS, m, dtype=dtype)
        long = support.long()

        def composed(b: Any = b, a: Any = a, v: Any = values, i: Any = long, s: float = s) -> Tensor:
            return (s * (b @ a)).flatten().scatter_add(0, i, v).view(len(b), -1)

        def step(layer: Any = layer, x: Any = x, g: Any = g) -> None:
            layer(x.requires_grad_()).backward(g)

        def plain_step(layer: Any = layer, x: Any = x, g: Any = g, composed: Any = composed, i: Any = long) -> None:
            linear(x.requires_grad_(), composed(layer.B, layer.A, layer.values, i, layer.scale)).backward(g)

        pairs |= {
            f"{name}, {m} x {n}, {str(dtype).removeprefix('torch.')}": pair
            for name, pair in {
                "recomposed weight": (lambda p=(b, a, values, support, s, dtype): sparse._composed(*p), composed),
                "add_at_": (
                    lambda w=w, i=support, v=values: ops.add_at_(w, i, v),
                    lambda w=other, i=support, v=values: w.view(-1).index_add_(0, i, v),
                ),
                "gather_at": (
                    lambda w=w, i=support: ops.gather_at(w, i),
                    lambda w=w, i=support: w.view(-1).index_select(0, i),
                ),
                "gradient of the entries": (
                    lambda g=g, x=x, i=support, layer=layer: sparse._at_support(g, x, i, layer._pieces()),
                    lambda g=g, x=x, i=support: (g.mT @ x).flatten().index_select(0, i),
                ),
                "forward and backward": (step, plain_step),
            }.items()
        }
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    native.load()
    if lowrank_optim.backend_info()["cpu"].kernels != "native":
        sys.exit(f"there is nothing to compare:\n{lowrank_optim.backend_info()}")
    found: dict[str, Any] = {"load_at_start": os.getloadavg()[0], "tokens": TOKENS, "plain_over_ours": {}}
    for name, (ours, plain) in {**selections(), **entries()}.items():
        row = compared(ours, plain, arguments.rounds)
        found["plain_over_ours"][name] = row
        print(f"{name:56} {row['ms']:8.3f} ms, plain torch takes {row['ratio']:5.2f} times that", flush=True)
    record.write("selection", found)


if __name__ == "__main__":
    main()
