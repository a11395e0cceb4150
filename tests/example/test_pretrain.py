"""examples/pretrain.py: the whole program on a tiny model, and each promise of its README."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for package in ("transformers", "tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

import pretrain  # noqa: E402
from pretraining import (  # noqa: E402
    arguments,
    checkpoint,
    corpus,
    data,
    loop,
    optimizers,
    plot,
    schedule,
    summary,
    text,
    worker,
)
from pretraining.errors import PretrainError  # noqa: E402
from pretraining.interrupt import Interrupt  # noqa: E402
from pretraining.job import Job  # noqa: E402
from pretraining.log import read  # noqa: E402
from pretraining.presets import PRESETS  # noqa: E402

import lowrank_optim  # noqa: E402
from tests.support.example import (  # noqa: E402
    EXAMPLES,
    TINY,
    assert_matches,
    assert_same,
    command,
    loaded,
    make_job,
    one_thread,
    train,
)
from tests.support.text import words  # noqa: E402

BOTH = [("adamw", []), ("galore", ["rank=4", "update_proj_gap=3"])]
EVERY = sorted(
    name for name, kind in optimizers._classes(lowrank_optim).items() if not optimizers.is_weight_space(kind)
)
EVERY += ["AdamW", "Adafactor", "Muon"]


# ---------------------------------------------------------------- the whole program


@pytest.mark.slow
def test_compare_writes_table_json_and_plot(folder, cache, tmp_path, capfd):
    out = tmp_path / "both"
    argv = command(folder, cache, "--compare", "adamw:matrix_lr_scale=0.25,galore:rank=4", "--out", str(out))
    assert pretrain.main(argv) == 0
    shown = capfd.readouterr()
    assert all(word in shown.out for word in ("vs AdamW", "validation loss", "GaLoreAdamW rank=4", "curve.png"))
    assert "Traceback" not in shown.err
    content = json.loads((out / "summary.json").read_text())
    adamw, galore = content["runs"]
    assert adamw["initial_weights"] == galore["initial_weights"]
    assert adamw["bytes"]["optimizer_measured"] == adamw["bytes"]["optimizer_predicted"]
    assert galore["bytes"]["optimizer_measured"] == galore["bytes"]["optimizer_predicted"]
    assert galore["bytes"]["optimizer_measured"] < adamw["bytes"]["optimizer_measured"]
    assert galore["tokens"] == 12 * 4 * 16
    assert 0 < galore["optimizer_share_of_time"] < 1
    assert content["versions"]["torch"] == torch.__version__
    assert "--compare" in content["command"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "rank" in (out / "GaLoreAdamW-rank=4" / "report.txt").read_text()

    assert pretrain.main([*argv, "--resume"]) == 0
    assert capfd.readouterr().out.count("finished before") == 2
    assert pretrain.main([*argv, "--resume", "--seed", "3", "--clip", "0"]) == 2
    assert "clip was 1.0, is 0.0; seed was 0, is 3" in capfd.readouterr().err
    assert pretrain.main(argv) == 2
    assert "holds a run already; add --resume" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_rest_is_the_same(folder, cache, tmp_path, number):
    argv = command(folder, cache, "--optimizer", "adamw", "--steps", "400", "--eval-every", "200", "--save-every", "90")
    out = tmp_path / "run"
    line = [sys.executable, str(EXAMPLES / "pretrain.py"), *argv, "--out", str(out)]
    child = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(read(out / "log.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    if number == signal.SIGTERM:
        child.send_signal(number)
    else:  # as a terminal does: to the parent and the child, which hears it from its parent again
        os.killpg(child.pid, number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number, errors
    assert "interrupted and saved; continue with" in errors
    assert f"--out {out} --resume" in errors
    assert "Traceback" not in errors
    saved = checkpoint.load(out / "checkpoint.pt")
    assert 5 <= saved["step"] < 400
    assert len(read(out / "log.jsonl")) == saved["step"]

    done = subprocess.run([*line, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with one_thread():
        undisturbed = train(make_job(argv), tmp_path / "undisturbed")
        assert_same(loaded(Job.read(out / "job.json"), out), undisturbed)


@pytest.mark.slow
def test_orphaned_run_saves_and_ends(folder, cache, tmp_path):
    """The parent can be killed without a chance to pass anything on."""
    argv = command(folder, cache, "--optimizer", "adamw", "--steps", "100000", "--eval-every", "100000")
    line = [sys.executable, str(EXAMPLES / "pretrain.py"), *argv, "--out", str(tmp_path), "--save-every", "100000"]
    parent = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(read(tmp_path / "log.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == len(read(tmp_path / "log.jsonl"))


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "keywords"), BOTH, ids=["adamw", "galore"])
def test_resume_is_bit_exact(folder, cache, tmp_path, dtype, name, keywords):
    settings = ["--set", *keywords] if keywords else []
    job = make_job(command(folder, cache, "--optimizer", name, "--dtype", dtype, *settings))
    undisturbed = train(job, tmp_path / "whole")
    train(job, tmp_path / "parts", stop=5)  # at a validation, which is then made up for
    train(job, tmp_path / "parts", stop=7, resume=True)
    torch.manual_seed(99)  # the checkpoint brings its own random state
    assert_same(undisturbed, train(job, tmp_path / "parts", resume=True))
    assert undisturbed.model.lm_head.weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert [step for step, _ in undisturbed.history.validation] == [5, 10, 12]


@pytest.mark.thin
@pytest.mark.few(name=("GaLoreAdamW", "AdamW"))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_resumes_and_keeps_what_was_predicted(folder, cache, tmp_path, name, dtype):
    job = make_job(command(folder, cache, "--optimizer", name, "--steps", "6", "--dtype", dtype))
    undisturbed = train(job, tmp_path / "whole")
    train(job, tmp_path / "parts", stop=4)
    resumed = train(job, tmp_path / "parts", resume=True)
    assert_same(undisturbed, resumed)
    found = worker.result(resumed, worker.predict(resumed))["bytes"]
    assert found["optimizer_measured"] == found["optimizer_predicted"]


def test_killed_run_continues_from_its_last_checkpoint(folder, cache, tmp_path):
    """Steps logged after the checkpoint are dropped from the log, half a line included."""
    job = make_job(command(folder, cache, "--optimizer", "adamw"))
    undisturbed = train(job, tmp_path / "whole")
    run = train(job, tmp_path / "killed", stop=6)
    with run.log.path.open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert_same(undisturbed, train(job, tmp_path / "killed", resume=True))


def test_changed_arguments_do_not_resume(folder, cache, tmp_path):
    job = make_job(command(folder, cache, "--optimizer", "adamw"))
    train(job, tmp_path / "run", stop=3)
    changed = dataclasses.replace(job, lr=0.5, save_every=99)
    with pytest.raises(PretrainError, match=rf"cannot resume AdamW: .*lr was {job.lr}, is 0\.5\. Give the old values"):
        train(changed, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_streamed_data_set_resumes_across_epochs(tmp_path, cache, monkeypatch):
    datasets = pytest.importorskip("datasets")
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": words(n, 30)}) + "\n" for n in range(90)))
    load = datasets.load_dataset

    def local(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("allenai/c4", "en", "train", True)
        return load("json", data_files=str(source), split=split, streaming=True, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    argv = [
        *TINY.split(),
        "--dataset",
        "allenai/c4",
        "--cache",
        str(tmp_path),
        "--optimizer",
        "adamw",
        "--steps",
        "200",
    ]
    job = make_job([*argv, "--eval-every", "100"])
    undisturbed = train(job, tmp_path / "whole")
    train(job, tmp_path / "parts", stop=30)
    train(job, tmp_path / "parts", stop=110, resume=True)
    again = train(job, tmp_path / "parts", resume=True)
    assert again.data.state_dict()["epoch"] >= 1
    assert_same(undisturbed, again)
    args = arguments.complete(arguments.parser().parse_args([*argv, "--text-field", "body"]))
    with pytest.raises(PretrainError, match=r"has no column 'body'; --text-field: text"):
        corpus.prepare(arguments.request(args), tmp_path)


# ---------------------------------------------------------------- data


def test_split_follows_content_alone(folder, tmp_path):
    """The same whatever the files are called; no document and no copy of one is on both sides."""
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        (renamed / f"{number:03}.md").write_text(path.read_text())
    (renamed / "copy.txt").write_text((folder / "07.txt").read_text())

    def halves(root: Path) -> tuple[set[str], set[str]]:
        found: tuple[set[str], set[str]] = (set(), set())
        for document in text.documents(text.Source(str(root))):
            found[text.is_validation(document, 0.2)].add(document)
        return found

    assert halves(folder) == halves(renamed)
    training, held_out = halves(folder)
    assert training
    assert held_out
    assert not training & held_out


def test_validation_tokens_do_not_depend_on_names_or_order(folder, cache, tmp_path):
    first = make_job(command(folder, cache))
    stream = corpus.Corpus.open(Path(first.corpus))
    coder = stream.coder()
    held_out = sorted((d for d in text.documents(stream.source) if text.is_validation(d, 0.2)), key=text.digest)
    expected = [token for ids in coder.encode(held_out) for token in [*ids, coder.end]]
    assert stream.tokens("validation").tolist() == expected


def test_local_windows_are_a_function_of_their_number(folder, cache):
    job = make_job(command(folder, cache))
    tokens = corpus.Corpus.open(Path(job.corpus)).tokens("train")
    count = (len(tokens) - 1) // 16
    windows = data.LocalWindows(tokens, 16, seed=1)
    epoch = windows.windows(0, count)
    assert len({tuple(row) for row in epoch.tolist()}) == count  # each once
    later = windows.windows(count - 2, 5)  # over the end of the epoch
    assert torch.equal(later[:2], epoch[-2:])
    assert torch.equal(later, data.LocalWindows(tokens, 16, seed=1).windows(count - 2, 5))
    assert not torch.equal(epoch, data.LocalWindows(tokens, 16, seed=2).windows(0, count))


def test_validation_loss_weighs_every_token_the_same(folder, cache, tmp_path):
    """Batches of 3 windows, a last batch that is smaller, a last window that is shorter: still one plain mean."""
    job = make_job(command(folder, cache, "--optimizer", "adamw", "--val-tokens", "127"))
    run = loop.Run(job, tmp_path, Interrupt())
    tokens = run.corpus.tokens("validation")
    shapes = [tuple(batch.shape) for batch in data.validation_batches(tokens, 16, 3)]
    assert shapes == [(3, 17), (3, 17), (1, 17), (1, 15)]
    losses = []
    with torch.no_grad():
        for start in range(0, 126, 16):
            window = torch.tensor(tokens[start : start + 17].astype("int64"))
            log_p = run.model(input_ids=window[None, :-1]).logits[0].double().log_softmax(-1)
            losses += [-log_p[i, target].item() for i, target in enumerate(window[1:])]
    assert len(losses) == 126
    found = loop.validation_loss(run.model, run.corpus, job, Interrupt())
    assert found == pytest.approx(sum(losses) / 126, rel=1e-6)


def test_accumulated_gradient_is_that_of_the_whole_batch(folder, cache, tmp_path):
    job = make_job(command(folder, cache, "--optimizer", "adamw"))
    gradients = []
    for size in (3, 4):
        run = loop.Run(dataclasses.replace(job, micro_batch=size), tmp_path, Interrupt())
        run._backward()
        gradients.append(run.model.lm_head.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_single_file_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\n\n".join(words(n, 200) for n in range(12)).encode() + b"\n\n\xff not utf-8")
    pieces = list(text.documents(text.Source(str(path))))
    assert len(pieces) > 3
    assert all(len(piece) >= text.DOCUMENT_CHARACTERS for piece in pieces[:-1])
    assert "\n\n".join(pieces) == path.read_text(errors="replace")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, where):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"step": 1}, path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args: object) -> None:
        raise full

    class FullFile(io.BytesIO):
        write = fail

    def open_full(self: Path, mode: str) -> FullFile:
        self.touch()
        return FullFile()

    where, name, replacement = {
        "write": (Path, "open", open_full),
        "fsync": (os, "fsync", fail),
        "replace": (os, "replace", fail),
    }[where]
    monkeypatch.setattr(where, name, replacement)
    with pytest.raises(PretrainError, match=r"No space left on device; the last checkpoint there is intact. Make room"):
        checkpoint.save({"step": 2, "weights": torch.zeros(100_000)}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_divergence_leaves_the_last_checkpoint(folder, cache, tmp_path):
    job = make_job(command(folder, cache, "--optimizer", "adamw"))
    run = train(job, tmp_path / "run", stop=3)
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = float("nan")
    run.interrupt = Interrupt()
    with pytest.raises(PretrainError, match=r"AdamW diverged at step 4: loss nan.*Try a lower lr"):
        run.train()
    with pytest.raises(PretrainError, match=r"non-finite weights at step 3"):
        run.save()
    assert checkpoint.load(run.path)["step"] == 3
    assert loaded(job, tmp_path / "run").model.lm_head.weight.isfinite().all()


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], r"--steps: must be a whole number of at least 1, got '0'"),
        (["--warmup", "1"], r"--warmup: must be at least 0 and below 1, got '1'"),
        (["--dtype", "fp8"], r"--dtype: invalid choice: 'fp8'"),
        (["--batch", "many"], r"--batch: must be a whole number of at least 1, got 'many'"),
        (["--lr", "-1"], r"--lr: must be a number above 0, got '-1'"),
        (["--heads", "3"], r"--hidden must be a multiple of 2 \* --heads, got 16 and 3 heads"),
        (["--vocab", "100"], r"--vocab must be at least 257 .*, got 100"),
        (["--device", "cuda:0"], r"finds no CUDA device here; use --device cpu"),
        (["--device", "abacus"], r"--device must be cpu or cuda, got 'abacus'"),
        (["--text", "/no/such"], r"--text must name a file or a folder, got '/no/such', which does not exist"),
        (["--optimizer", "adamm"], r"unknown optimizer 'adamm'; did you mean .*Adam"),
        (["--optimizer", "lbfgs"], r"LBFGS cannot train a whole model here: it needs a closure"),
        (
            ["--optimizer", "adamw", "--set", "beta=1"],
            r"AdamW has no keyword 'beta'; did you mean 'betas'\? valid are lr, .*betas, eps",
        ),
        (["--optimizer", "adamw", "--set", "eps"], r"written key=value, got 'eps'"),
        (["--optimizer", "adamw", "--set", "lr=fast"], r"lr of AdamW must be a number above 0, got 'fast'"),
        (["--optimizer", "galore", "--set", "matrix_lr_scale=2"], r"matrix_lr_scale is for torch optimizers"),
        (["--optimizer", "galore", "--set", "scale=abc"], r"does not accept its arguments: scale must be a number"),
        (["--optimizer", "galore", "--set", "rank=1000"], r"does not accept its arguments: .*nothing to project"),
        (["--compare", "adamw,"], r"an optimizer needs a name, such as galore or adamw"),
        (["--compare", "adamw,adamw"], r"--compare names AdamW twice"),
        (["--compare", "adamw", "--set", "eps=1"], r"--set goes with --optimizer"),
        (["--resume", "--out", "/no/such"], r"nothing to resume in /no/such"),
        (["--sequence", "99999"], r"training tokens, too few for one sequence of 99999"),
    ],
)
def test_bad_arguments(folder, cache, tmp_path, capsys, monkeypatch, argv, message):
    if argv[0] == "--device" and torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    monkeypatch.chdir(tmp_path)
    try:
        code = pretrain.main(command(folder, cache, *argv))
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert_matches(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("job.json"))


def test_folder_without_text(tmp_path, cache, capsys):
    (tmp_path / "binary.dat").write_bytes(b"\0\1\2")
    (tmp_path / "blank.txt").write_text("  \n")
    assert pretrain.main(command(tmp_path, cache)) == 2
    assert "no text in" in capsys.readouterr().err
    (tmp_path / "one.txt").write_text(words(1))
    assert pretrain.main(command(tmp_path, cache, "--out", str(tmp_path / "out"))) == 2
    assert "was chosen for validation, 20% of them are; raise --val-fraction" in capsys.readouterr().err
    assert not list(cache.glob("*.part"))


def test_names_of_optimizers():
    assert optimizers.find("galore") is lowrank_optim.GaLoreAdamW
    assert optimizers.find("ga_lore-ADAMW") is lowrank_optim.GaLoreAdamW
    assert optimizers.find("GaLoreAdafactor") is lowrank_optim.GaLoreAdafactor
    assert optimizers.find("muon") is optimizers.Muon
    assert optimizers.find("adam") is torch.optim.Adam
    assert optimizers.find("nad") is torch.optim.NAdam
    choice = optimizers.parse_choice("adamw:betas=(0.8, 0.95):lr=0.1:foreach=False")
    assert choice.keywords == {"betas": (0.8, 0.95), "lr": 0.1, "foreach": False}
    assert optimizers.split("adamw:betas=(0.8,0.95),galore", ",") == ["adamw:betas=(0.8,0.95)", "galore"]


def test_matrix_lr_scale_is_for_the_matrices_only(folder, cache, tmp_path):
    job = make_job(command(folder, cache, "--optimizer", "adamw", "--lr", "0.01", "--set", "matrix_lr_scale=0.25"))
    run = loop.Run(job, tmp_path, Interrupt())
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {names[id(p)]: group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        assert rate == (0.0025 if "proj" in name else 0.01), name


def test_muon_takes_the_matrices_that_other_methods_project(folder, cache, tmp_path):
    argv = command(folder, cache, "--optimizer", "muon", "--lr", "0.01", "--set", "matrix_lr_scale=0.25")
    run = train(make_job(argv), tmp_path)
    names = {id(p): name for name, p in run.model.named_parameters()}
    for p in run.model.parameters():
        matrix = "proj" in names[id(p)]
        assert run.optimizer.state[p].keys() == ({"momentum_buffer"} if matrix else {"step", "exp_avg", "exp_avg_sq"})
    rates = {names[id(p)]: group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates == {name: 0.0025 if "proj" in name else 0.01 for name in names.values()}
    assert {group["adjust_lr_fn"] for group in run.optimizer.param_groups if "momentum" in group} == {"match_rms_adamw"}


def test_muon_is_the_two_of_torch(folder, cache, tmp_path):
    """Step by step what separate optimizers do."""
    job = make_job(command(folder, cache, "--optimizer", "muon", "--lr", "0.01", "--set", "matrix_lr_scale=1.0"))
    together, apart = (loop.Run(job, tmp_path, Interrupt()).model for _ in range(2))
    one = optimizers.build(together, job)
    named = list(apart.named_parameters())
    options = {"lr": 0.01, "weight_decay": 0.0}
    muon = torch.optim.Muon([p for name, p in named if "proj" in name], **options, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for name, p in named if "proj" not in name], **options)
    for step in range(3):
        for p, (_, q) in zip(together.parameters(), named, strict=True):
            p.grad = torch.full_like(p, 0.1).bernoulli_(0.5, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        for optimizer in (one, muon, adamw):
            optimizer.step()
    for p, (name, q) in zip(together.parameters(), named, strict=True):
        assert torch.equal(p, q), name


def test_golore_turns_random_at_a_share_of_the_steps(folder, cache, tmp_path):
    for more, expected in (([], 16), (["--set", "random_after=3"], 3)):
        job = make_job(command(folder, cache, "--optimizer", "golore", "--steps", "20", *more))
        groups = loop.Run(job, tmp_path, Interrupt()).optimizer.param_groups
        assert {group["random_after"] for group in groups} == {expected}


def test_galore_plus_gets_heads(folder, cache, tmp_path):
    run = loop.Run(make_job(command(folder, cache, "--optimizer", "galore_plus")), tmp_path, Interrupt())
    names = {id(p): name for name, p in run.model.named_parameters()}
    heads = {names[id(p)]: group["heads"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {name for name, count in heads.items() if count == 2} == {name for name in heads if "self_attn" in name}


@pytest.mark.parametrize(("name", "dtype"), [("galore", "bfloat16"), ("galoreadamw8bit", "int8"), ("qgalore", "int8")])
def test_bf16_weights_have_bf16_state_or_less(folder, cache, tmp_path, name, dtype):
    run = loop.Run(make_job(command(folder, cache, "--optimizer", name, "--dtype", "bf16")), tmp_path, Interrupt())
    assert {group["state_dtype"] for group in run.optimizer.param_groups} == {dtype}


def test_every_optimizer_has_a_preset():
    assert {*EVERY, *optimizers._classes(lowrank_optim)} <= PRESETS["nano"].optimizers.keys()


def test_lr_warms_up_and_ends_at_a_tenth():
    factors = [schedule.lr_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0 == max(factors)
    assert factors[99] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule.lr_factor(0, 1, 0) == 1.0


def test_table_shows_failed_runs_and_plot_smooths_without_lag():
    assert "failed" in summary.table([], ["AdamW"])
    line = [float(x) for x in range(50)]
    assert plot.smooth(line)[20:30] == pytest.approx(line[20:30])
    assert summary.human(1536) == "1.50 KiB"
    assert worker.RESULT == "result.json"


def test_two_runs_may_prepare_the_corpus_at_once(folder, tmp_path, monkeypatch):
    args = arguments.complete(arguments.parser().parse_args(command(folder, tmp_path / "cache")))
    request, encode = arguments.request(args), corpus._encode
    seen = []

    def slow(*rest):
        if not seen:  # while the first is at work the second does all of it
            seen.append(True)
            corpus.prepare(request, args.cache)
        return encode(*rest)

    monkeypatch.setattr(corpus, "_encode", slow)
    pids = iter(range(1, 9))
    monkeypatch.setattr(corpus.os, "getpid", lambda: next(pids))
    prepared = corpus.prepare(request, args.cache)
    assert prepared.validation_tokens
    assert not list(args.cache.glob("*.part"))
