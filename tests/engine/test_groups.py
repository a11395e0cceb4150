"""param_groups on the kinds of model that people train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import GaLoreAdamW, GaLorePlusAdamW, param_groups
from lowrank_optim.recipe.plan import names_say
from tests.cases import Net


def kinds(model, **options):
    """{name: "matrix" | "plain" | "vector"}."""
    result = {}
    for group in param_groups(model, verbose=False, **options):
        plain = "rank" in group and group["rank"] is None
        for name, p in group["params"]:
            assert name not in result
            result[name] = ("vector" if p.dim() < 2 or p.numel() == max(p.shape) else "plain") if plain else "matrix"
    return result


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 32))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 20)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.block(x)[:, 0])


def test_vit():
    got = kinds(ViT())
    assert got["patch_embed.weight"] == "matrix", "a convolution with any name"
    assert got["block.self_attn.in_proj_weight"] == got["block.linear1.weight"] == "matrix"
    assert got["pos_embed"] == got["head.weight"] == "plain"
    assert got["cls_token"] == got["head.bias"] == got["block.norm1.weight"] == "vector"
    model = ViT()
    optimizer = GaLoreAdamW(param_groups(model, rank=4, verbose=False), lr=1e-2)
    rows = {row.name: row for row in optimizer.report()}
    assert (rows["patch_embed.weight"].rank, rows["patch_embed.weight"].side) == (4, "left")
    assert optimizer.state[model.patch_embed.weight]["exp_avg"].shape == (4, 48)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 20, (8,))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def llama(**options):
    transformers = pytest.importorskip("transformers", reason="LLaMA models come from transformers (extra: examples)")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **options
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tie", [True, False])
def test_llama(tie):
    model = llama(tie_word_embeddings=tie)
    got = kinds(model)
    matrices = {name for name, kind in got.items() if kind == "matrix"}
    assert len(matrices) == 2 * 7
    assert all("_proj" in name for name in matrices)
    assert got["model.embed_tokens.weight"] == "plain"
    assert ("lm_head.weight" in got) is not tie
    assert sum(kind == "vector" for kind in got.values()) == 5
    optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2)
    tokens = torch.randint(0, 64, (4, 12))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert sum(row.rank == 8 for row in optimizer.report()) == 14


def test_a_layer_as_wide_as_a_table_is_long_is_no_head():
    """BERT-small: 512 positions and hidden size 512."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.positions = nn.Embedding(97, 32), nn.Embedding(32, 32)
            self.query, self.mlp, self.proj = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)
            self.decoder = nn.Linear(32, 97)

    got = kinds(Block())
    assert [got[f"{name}.weight"] for name in ("query", "mlp", "proj")] == ["matrix"] * 3
    assert got["words.weight"] == got["positions.weight"] == got["decoder.weight"] == "plain"


def test_mixture_of_experts():
    transformers = pytest.importorskip("transformers", reason="Mixtral comes from transformers (extra: examples)")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2)
    rows = {row.name: row for row in optimizer.report()}
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3]
    assert stacks, "transformers 5 keeps experts as bare 3-D parameters"
    assert all(rows[name].rank == 8 for name in stacks)
    assert rows[next(name for name in rows if "gate.weight" in name)].rank is None, "a router has too few rows"
    tokens = torch.randint(0, 64, (2, 6))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_options():
    got = kinds(Net(), min_dim=4)
    assert got["conv.weight"] == got["experts"] == got["square.weight"] == "matrix"
    assert got["embed.weight"] == "plain"
    assert kinds(Net(), min_dim=4, exclude=["^square", "experts"])["square.weight"] == "plain"
    assert kinds(Net(), min_dim=4, include=["embed"])["embed.weight"] == "matrix"
    assert kinds(Net(), include=["square"])["square.weight"] == "matrix", "include also wins over min_dim"
    groups = param_groups(Net(), rank=3, min_dim=4, scale=0.5, verbose=False)
    assert all(group["scale"] == 0.5 and group["rank"] == 3 for group in groups if group.get("rank"))
    assert [group["weight_decay"] for group in groups if "weight_decay" in group] == [0.0]
    assert not any("weight_decay" in group for group in param_groups(Net(), decay_vectors=True, verbose=False))
    optimizer = GaLoreAdamW(param_groups(Net(), min_dim=4, verbose=False), rank=0.5)
    assert {row.rank for row in optimizer.report()} == {None, 6}, "without a rank the optimizer's own counts"


def test_frozen_parameters_are_left_out():
    model = Net()
    model.square.requires_grad_(False)
    assert "square.weight" not in kinds(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        param_groups(model)


def test_one_summary_line(capsys):
    param_groups(Net(), min_dim=4)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "5 (0.00M) matrices to project, 1 (0.00M) other matrices" in printed


def test_patterns_must_match():
    with pytest.raises(ValueError, match=r"exclude pattern 'sqare' matches no parameter; the first is 'experts'"):
        param_groups(Net(), exclude=["sqare"])
    with pytest.raises(ValueError, match=r"include must be a list of regular expressions, got the string 'up'"):
        param_groups(Net(), include="up")


def test_meta_models_can_be_grouped():
    with torch.device("meta"):
        assert kinds(ViT()) == kinds(ViT())


def with_heads(model, **options):
    """{name: (heads, side)} of the matrices that have heads, after checking that groups are no more than needed."""
    groups = param_groups(model, heads=True, verbose=False, **{"rank": 4, "min_dim": 4, **options})
    keys = [tuple(sorted((key, x) for key, x in group.items() if key != "params")) for group in groups]
    assert len(set(keys)) == len(keys)
    found = {}
    for group in groups:
        assert ("heads" in group) <= (group["rank"] is not None)
        found |= {name: (group["heads"], group["proj_type"]) for name, _ in group["params"] if "heads" in group}
    plain = kinds(model, **{"rank": 4, "min_dim": 4, **options})
    assert kinds(model, heads=True, **{"rank": 4, "min_dim": 4, **options}) == plain, "heads change no other decision"
    assert set(found) <= {name for name, kind in plain.items() if kind == "matrix"}
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"head_dim": 12}])
def test_heads_of_grouped_queries(device, options, capsys):
    with torch.device(device):
        model = llama(num_key_value_heads=2, **options)
    found = with_heads(model)
    assert len(found) == 2 * 4
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn."
        assert found[name + "q_proj.weight"] == (4, "right")
        assert found[name + "k_proj.weight"] == found[name + "v_proj.weight"] == (2, "right")
        assert found[name + "o_proj.weight"] == (4, "left")
    groups = param_groups(model, rank=4, heads=True, proj_type="reverse_std", scale=0.5)
    assert "M) matrices to project (8 of them with heads), 2 (" in capsys.readouterr().out
    sides = {(group.get("heads"), group["proj_type"]) for group in groups if group["rank"]}
    assert sides == {(None, "reverse_std"), (4, "right"), (2, "right"), (4, "left")}
    assert all(group["scale"] == 0.5 and group["as_matrix"] == "flatten" for group in groups if group["rank"])
    assert len(groups) == 4 + 2
    optimizer = GaLorePlusAdamW(groups, lr=1e-2)
    rows = {row.name: (row.rank, row.side) for row in optimizer.report()}
    assert rows["model.layers.1.self_attn.k_proj.weight"] == (4, "right")
    assert rows["model.layers.1.self_attn.o_proj.weight"] == (4, "left")
    assert rows["model.layers.1.mlp.up_proj.weight"] == (4, "left"), "48 x 32, and reverse_std"


def test_heads_train_a_llama():
    model = llama(num_key_value_heads=2)
    optimizer = GaLorePlusAdamW(param_groups(model, rank=12, heads=True), lr=1e-2, update_proj_gap=3)
    tokens, losses = torch.randint(0, 64, (4, 12)), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_heads_of_torchs_attention(device):
    with torch.device(device):
        model = nn.TransformerEncoderLayer(32, 4, 64)
        apart = nn.MultiheadAttention(32, 4, kdim=20, vdim=24)
    assert with_heads(model) == {"self_attn.in_proj_weight": (12, "right"), "self_attn.out_proj.weight": (4, "left")}
    inputs = {f"{name}_proj_weight": (4, "right") for name in "qkv"}
    assert with_heads(apart) == {**inputs, "out_proj.weight": (4, "left")}
    for one in (model, apart):
        GaLorePlusAdamW(param_groups(one, rank=4, heads=True, verbose=False))
    assert [group.get("heads") for group in param_groups(model, rank=4, heads=True, verbose=False)] == [
        12, None, 4, None,
    ]  # fmt: skip


class Attention(nn.Module):
    """Names as given; the number of heads under `count`, of the module or of its config."""

    def __init__(self, names, count, configured=False, size=32, heads=4):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(size, size))
        holder = self
        if configured:
            self.config = holder = type("Config", (), {})()
        setattr(holder, count, heads)


BERT, T5, OPT = ("query", "key", "value"), ("q", "k", "v", "o"), ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("names", [BERT, T5, OPT])
@pytest.mark.parametrize("count", ["num_heads", "num_attention_heads", "n_heads"])
def test_heads_of_modules_by_name(names, count, configured):
    found = with_heads(nn.Sequential(Attention(names, count, configured), nn.Linear(32, 32)))
    want = {f"0.{name}.weight": (4, "left" if name in ("o", "out_proj") else "right") for name in names}
    assert found == want


def test_heads_of_bert_and_vit():
    transformers = pytest.importorskip("transformers", reason="BERT comes from transformers (extra: examples)")
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=64, **small))
    found = with_heads(bert)
    assert {name.split(".")[-2]: heads for name, heads in found.items()} == dict.fromkeys(BERT, (4, "right"))
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **small))
    assert sorted(with_heads(vit).values()) == [(4, "left"), *[(4, "right")] * 3]


def test_heads_are_found_for_projected_matrices_only():
    model = nn.Sequential(Attention(OPT, "num_heads"), Attention(OPT, "num_heads"))
    model[1].requires_grad_(False)
    found = with_heads(model, exclude=["q_proj"])
    assert set(found) == {f"0.{name}.weight" for name in ("k_proj", "v_proj", "out_proj")}


def test_heads_that_cannot_be_read():
    odd = nn.Sequential(Attention(OPT, "number"), Attention(("q_proj", "o_proj"), "num_heads"))
    with pytest.raises(ValueError, match=r"heads=True finds no attention module in Sequential .* q_proj/k_proj/v_proj"):
        param_groups(odd, heads=True)
    with pytest.raises(ValueError, match="heads=True finds no attention module"):
        param_groups(nn.Sequential(Attention(OPT, "num_heads")), heads=True, exclude=["_proj"])
    with pytest.raises(ValueError, match=r"heads must be True .* or False, got 4"):
        param_groups(Net(), heads=4)
    indivisible = nn.Sequential(Attention(OPT, "num_heads", heads=5), Attention(OPT, "num_heads"))
    assert {name[0] for name in with_heads(indivisible)} == {"1"}


def test_without_heads_groups_are_as_they_were():
    model = llama(num_key_value_heads=2)
    groups = param_groups(model, rank=4, proj_type="reverse_std", verbose=False)
    assert [sorted(group.keys() - {"params"}) for group in groups] == [
        ["as_matrix", "proj_type", "rank", "skip_embeddings"], ["rank"], ["rank", "weight_decay"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("classifier.weight", "head"),
        ("layers.0.attn.heads.weight", ""),
        ("multihead_attn.out_proj.weight", ""),
        ("overhead.weight", ""),
        ("", ""),
    ],
)
def test_names(name, kind):
    assert names_say(name) == kind


def test_import_is_light():
    """`import lowrank_optim` needs torch alone, and no part of it that `import torch` has not loaded."""
    import subprocess
    import sys

    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lowrank_optim\n"
        "print(*(m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names))"
    )
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in new if name.split(".")[0] != "lowrank_optim"]
    assert all(hasattr(lowrank_optim, name) for name in lowrank_optim.__all__)
