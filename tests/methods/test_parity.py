"""Against the published package, where its conventions can be met: no decay, eps scaled to its place, one window."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from benchmarks import peers
from tests.cases import gradients


@pytest.fixture(scope="module")
def galore_torch():
    try:
        return peers.galore_torch()
    except ImportError:
        pytest.skip("galore-torch is not installed; `make test` installs it without its own requirements")


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
def test_one_window_of_galore_torch(galore_torch, shape, proj_type):
    """Its eps is added before bias correction: at step t it acts as eps / sqrt(1 - beta2^t), so eps is 0 here."""
    start, steps = 0.2 * torch.randn(shape), 12
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    common = dict(rank=3, update_proj_gap=200, scale=0.25, proj_type=proj_type)
    mine = lowrank_optim.GaLoreAdamW(
        [{"params": [ours], **common}], lr=0.01, betas=(0.87, 0.98), eps=0.0, weight_decay=0.0, basis="svd"
    )
    options = dict(lr=0.01, betas=(0.87, 0.98), eps=0.0, weight_decay=0.0, no_deprecation_warning=True)
    their = galore_torch.GaLoreAdamW([{"params": [theirs], **common}], **options)
    for g in gradients(shape, steps):
        ours.grad, theirs.grad = g.clone(), g.clone()
        mine.step()
        their.step()
    assert (ours - start).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_its_state_is_larger_than_its_formula_and_ours_is_not(galore_torch):
    shape, rank = (64, 48), 6
    elements = 48 * rank + 2 * 64 * rank
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    mine = lowrank_optim.GaLoreAdamW([ours], rank=rank)
    group = {"params": [theirs], "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    their = galore_torch.GaLoreAdamW([group], no_deprecation_warning=True)
    for p, optimizer in ((ours, mine), (theirs, their)):
        p.grad = torch.randn(shape)
        optimizer.step()
    assert lowrank_optim.state_bytes(mine) == 4 * elements + 4 + 3 * 8
    assert lowrank_optim.state_bytes(their) >= 4 * elements + 4 * (48 - rank) * 48, "a view keeps all of V alive"
