"""bfloat16 weights on a real training run: a small LLaMA on text, with steps below the last bit of its weights."""

from __future__ import annotations

import copy
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.cases import every_case

transformers = pytest.importorskip("transformers")

LENGTH, STEPS = 64, 60
# Mean change of a weight per step. A bfloat16 weight of 0.02 or more, as most are, only takes steps above 3e-5 when
# rounded to nearest. Subspace-Momentum does not scale its coordinates: a few weights get most of the change, and with
# it most of the progress, so its mean must be smaller before theirs vanish as well.
CHANGE = {"subspace_momentum": 4e-7}


@pytest.fixture(scope="module")
def text():
    """Python's standard library, a token per byte."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-h]*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def loss_of(model, text, number, rows=8):
    generator = torch.Generator().manual_seed(number)
    tokens = text[torch.randint(0, len(text) - LENGTH, (rows, 1), generator=generator) + torch.arange(LENGTH)].long()
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def train(model, optimizer, text, steps, first):
    for number in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, text, number).backward()
        optimizer.step()
    return model


@torch.no_grad()
def evaluate(model, text):
    model = copy.deepcopy(model).float()
    return sum(loss_of(model, text, 10**6 + number, rows=16).item() for number in range(4)) / 4


@pytest.fixture(scope="module")
def trained(text):
    """Half-trained in float32: the loss still falls by 0.01 in sixty steps that are each below a weight's last bit."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), text, 200, 0)


def continued(case, trained, text, mode, lr, steps=STEPS):
    model = copy.deepcopy(trained)
    if mode != "fp32":
        model.bfloat16()
    bf16_update = "none" if mode == "fp32" else mode
    numbers = dict(lr=lr, rank=16, update_proj_gap=40, weight_decay=0.01, bf16_update=bf16_update)
    return train(model, case.build(list(model.named_parameters()), **numbers), text, steps, 1000)


def rate(case, trained, text):
    """The lr that changes weights by `CHANGE` per step, in the mean: an lr means other things to other methods."""
    model = continued(case, trained, text, "fp32", 1e-6, 5)
    changes = [(p - q).detach().abs().flatten() for p, q in zip(model.parameters(), trained.parameters(), strict=True)]
    return 1e-6 * 5 * CHANGE.get(case.name, 4e-6) / float(torch.cat(changes).mean())


@pytest.mark.slow
@every_case
def test_bfloat16_weights_train_like_float32(case, trained, text):
    lr = rate(case, trained, text)
    rounded = copy.deepcopy(trained).bfloat16()
    progress = {
        mode: evaluate(rounded if mode != "fp32" else trained, text)
        - evaluate(continued(case, trained, text, mode, lr), text)
        for mode in ("fp32", "stochastic", "kahan", "none")
    }
    # Over three seeds and all methods: stochastic 0.985 to 1.024 of float32's progress; kahan 0.927 to 1.004, because
    # its weights lag by what their compensation still owes; none 0.05 to 0.11, Subspace-Momentum 0.17 to 0.33.
    assert progress["fp32"] > 0.003, "there must be something to lose"
    assert progress["stochastic"] == pytest.approx(progress["fp32"], rel=0.1)
    assert progress["kahan"] == pytest.approx(progress["fp32"], rel=0.15)
    assert progress["none"] < 0.5 * progress["fp32"], "the steps must be small enough to vanish"
