"""examples/pretrain.py: stepping in backward, mixed precision, and the counters of the optimizer."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support.example import EXAMPLES, assert_matches, assert_same, command, loaded, make_job, one_thread, train

import pretrain  # isort: skip
from pretraining import energy, loop, summary, worker  # isort: skip
from pretraining.errors import PretrainError  # isort: skip
from pretraining.interrupt import Interrupt  # isort: skip
from pretraining.job import Job  # isort: skip
from pretraining.log import Log, read  # isort: skip


GALORE = ["--optimizer", "galore", "--set", "rank=4", "update_proj_gap=3"]
BACKWARD = ["--step-in-backward", "--clip", "0"]
WINDOWS = ["--batch", "4", "--micro-batch", "2"]


def restless_scaler(monkeypatch: pytest.MonkeyPatch, init_scale: float, growth_interval: int = 3) -> None:
    """A loss scale that moves within a dozen steps."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=init_scale, growth_interval=growth_interval)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def assert_same_weights(first: loop.Run, second: loop.Run) -> None:
    for (name, p), q in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---------------------------------------------------------------- step in backward


@pytest.mark.few(name=("galore",), dtype=("bf16",))
@pytest.mark.parametrize(
    ("name", "dtype", "micro_batch", "more"),
    [
        ("galore", "fp32", "4", []),
        ("galore", "bf16", "2", ["--accumulate", "whole"]),
        ("galoreadafactor", "bf16", "4", []),
        ("fira", "fp32", "2", []),  # accumulates whole gradients anyway
        ("apollomini", "bf16", "2", []),
    ],
)
def test_step_in_backward_is_the_normal_run(folder, cache, tmp_path, name, dtype, micro_batch, more):
    flags = ["--optimizer", name, "--dtype", dtype, "--micro-batch", micro_batch, "--clip", "0"]
    argv = command(folder, cache, *flags)
    normal = train(make_job(argv), tmp_path / "normal")
    early = train(make_job([*argv, "--step-in-backward", *more]), tmp_path / "early")
    assert early.updater.handle is not None
    assert_same_weights(normal, early)
    assert normal.history == early.history
    for usual, row in zip(read(normal.log.path), read(early.log.path), strict=True):
        assert row["gradient_norm"] == pytest.approx(usual["gradient_norm"], rel=1e-2 if dtype == "bf16" else 1e-5)


@pytest.mark.slow
def test_gradients_accumulate_projected(folder, cache, tmp_path):
    """The same run to rounding, in which a window without a refresh leaves no gradient of a matrix behind."""
    argv = command(folder, cache, *GALORE, *WINDOWS, "--clip", "0")
    normal = train(make_job(argv), tmp_path / "normal")
    early = train(make_job([*argv, "--step-in-backward"]), tmp_path / "early")
    assert early.history.losses == pytest.approx(normal.history.losses, rel=1e-5)
    assert early.history.losses != normal.history.losses
    norms = [row["gradient_norm"] for row in read(early.log.path)]
    assert norms[0] is not None
    assert None in norms


def test_no_gradient_outlives_backward(folder, cache, tmp_path):
    for flags, alive in (([], True), (["--step-in-backward"], False)):
        run = loop.Run(make_job(command(folder, cache, *GALORE, "--clip", "0", *flags)), tmp_path, Interrupt())
        run._backward()
        assert any(p.grad is not None for p in run.model.parameters()) == alive


def test_options_reach_the_library(folder, cache, tmp_path):
    handles = []
    for flags in (
        ["--clip", "0.5", "--clip-by", "delayed", "--accumulate", "whole"],
        ["--clip", "0", "--basis-from", "micro-batch"],
    ):
        job = make_job(command(folder, cache, *GALORE, "--step-in-backward", *flags, "--micro-batch", "3"))
        handles.append(loop.Run(job, tmp_path, Interrupt()).updater.handle)
    found = [(one.accumulation_steps, one.accumulate, one.basis_from) for one in handles]
    assert found == [(2, "whole", "window"), (2, "projected", "micro-batch")]
    assert [(one.clip, one.clip_norm, one.scaler) for one in handles] == [
        ("delayed", 0.5, None),
        ("tensor", None, None),
    ]


@pytest.mark.parametrize("flags", [[], ["--step-in-backward"]], ids=["normal", "backward"])
@pytest.mark.filterwarnings("ignore:non-finite gradient")
def test_divergence_is_noticed(folder, cache, tmp_path, flags):
    job = make_job(command(folder, cache, *GALORE, "--clip", "0", *flags))
    run = train(job, tmp_path / "run", stop=3)
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = float("nan")
    run.interrupt = Interrupt()
    with pytest.raises(PretrainError, match="diverged at step 4: loss nan"):
        run.train()
    assert loaded(job, tmp_path / "run").step == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--micro-batch", "4"], "largest"),
        ([*WINDOWS, "--accumulate", "whole"], "all"),
        (WINDOWS, "coordinates"),
    ],
)
def test_predicted_gradients(folder, cache, tmp_path, flags, expected):
    run = train(make_job(command(folder, cache, *GALORE, *BACKWARD, *flags, "--layers", "9")), tmp_path)
    sizes = {name: p.nbytes for name, p in run.model.named_parameters()}
    thin = {name: 4 * 4 * max(p.shape) if "proj" in name else p.nbytes for name, p in run.model.named_parameters()}
    most, whole = max(sizes.values()), sum(sizes.values())
    found = worker.result(run, worker.predict(run))
    expected = {"largest": most, "all": most + whole, "coordinates": most + sum(thin.values())}[expected]
    assert found["bytes"]["gradients"] == expected
    assert found["seconds"]["optimizer"] is None
    assert "in backward" in summary.table([found], [])
    run.write_report()
    assert "live at once" in (run.folder / "report.txt").read_text()


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_amp_computes_in_16_bits_next_to_float32_weights(folder, cache, tmp_path, amp, dtype):
    run = loop.Run(make_job(command(folder, cache, *GALORE, "--amp", amp)), tmp_path, Interrupt())
    seen = []
    run.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run._backward()
    loop.validation_loss(run.model, run.corpus, run.job, Interrupt())
    assert set(seen) == {dtype}
    assert {p.dtype for p in run.model.parameters()} == {p.grad.dtype for p in run.model.parameters()}
    assert run.model.lm_head.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--step-in-backward", "--micro-batch", "4"]], ids=["normal", "backward"])
def test_an_overflow_leaves_the_step_out_and_lowers_the_scale(folder, cache, tmp_path, monkeypatch, capsys, flags):
    restless_scaler(monkeypatch, 2.0**60, 1000)
    job = make_job(command(folder, cache, *GALORE, "--amp", "fp16", "--clip", "0", "--steps", "60", *flags))
    fresh = loop.Run(job, tmp_path, Interrupt())
    first = train(job, tmp_path / "first", stop=1)
    assert_same_weights(fresh, first)
    assert first.history.overflows == 1
    assert "step 1, gradients overflow at a loss scale of 1.15292e+18" in capsys.readouterr().err
    run = train(job, tmp_path / "first", resume=True)
    rows = read(run.log.path)
    scales = [row["loss_scale"] for row in rows]
    assert scales == sorted(scales, reverse=True)
    assert [row["overflow"] for row in rows] == [row["gradient_norm"] is None for row in rows]
    assert 10 < run.history.overflows < 60
    assert run.history.losses[-1] < run.history.losses[0]


@pytest.mark.parametrize("flags", [[], ["--step-in-backward"]], ids=["normal", "backward"])
def test_gradients_that_overflow_without_a_scale_are_a_divergence(folder, cache, tmp_path, monkeypatch, flags):
    restless_scaler(monkeypatch, 2.0)
    job = make_job(command(folder, cache, *GALORE, "--amp", "fp16", "--clip", "0", *flags))
    run = loop.Run(job, tmp_path, Interrupt())
    run.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(PretrainError, match=r"diverged at step 3: gradients overflow at a loss scale of 0\.5"):
        run.train()


def test_amp_losses_follow_those_of_float32(folder, cache, tmp_path):
    losses = {}
    for amp in ("none", "bf16", "fp16"):
        losses[amp] = train(make_job(command(folder, cache, *GALORE, "--amp", amp)), tmp_path / amp).history.losses
    for amp in ("bf16", "fp16"):
        assert losses[amp] == pytest.approx(losses["none"], rel=2e-2)
        assert losses[amp] != losses["none"]


# ---------------------------------------------------------------- resume

MODES = {
    "projected": [*GALORE, *BACKWARD, *WINDOWS],
    "micro-batch": [*GALORE, *BACKWARD, *WINDOWS, "--basis-from", "micro-batch"],
    "delayed": [*GALORE, "--step-in-backward", "--clip", "0.3", "--clip-by", "delayed", "--accumulate", "whole"],
    "tensor": [*GALORE, "--step-in-backward", "--clip", "0.3", "--clip-by", "tensor", "--micro-batch", "4"],
    "bf16": [*GALORE, "--amp", "bf16"],
    "pure bf16": [*GALORE, *BACKWARD, *WINDOWS, "--dtype", "bf16"],
    "fp16 adamw": ["--optimizer", "adamw", "--amp", "fp16"],
    "fp16": [*GALORE, "--amp", "fp16"],
    "fp16 projected": [*GALORE, *BACKWARD, *WINDOWS, "--amp", "fp16"],
    "fp16 delayed": [*GALORE, "--micro-batch", "4", "--step-in-backward", "--clip-by", "delayed", "--amp", "fp16"],
}


@pytest.mark.few(mode=("projected", "delayed"))
@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_exact(folder, cache, tmp_path, monkeypatch, mode):
    restless_scaler(monkeypatch, 2.0**18)
    job = make_job(command(folder, cache, *MODES[mode]))
    undisturbed = train(job, tmp_path / "whole")
    train(job, tmp_path / "parts", stop=5)
    train(job, tmp_path / "parts", stop=7, resume=True)
    torch.manual_seed(99)
    again = train(job, tmp_path / "parts", resume=True)
    assert_same(undisturbed, again)
    scales = {row.get("loss_scale") for row in read(again.log.path)}
    assert (len(scales) > 1) == ("fp16" in mode)


def test_options_that_change_weights_cannot_change_on_resume(folder, cache, tmp_path):
    job = make_job(command(folder, cache, *GALORE, *BACKWARD, *WINDOWS))
    train(job, tmp_path / "run", stop=3)
    changes = {"step_in_backward": False, "accumulate": "whole", "basis_from": "micro-batch", "clip_by": "delayed"}
    for name, value in (changes | {"amp": "bf16"}).items():
        with pytest.raises(PretrainError, match=f"cannot resume .*{name} was {getattr(job, name)!r}, is {value!r}"):
            dataclasses.replace(job, **{name: value}).check_continues(job)


def test_jobs_of_earlier_versions_are_read(folder, cache):
    """Their runs can be resumed: what they did not know was off."""
    job = make_job(command(folder, cache, *GALORE))
    old = {key: value for key, value in job.to_dict().items() if key not in ("amp", "step_in_backward", "clip_by")}
    job.check_continues(Job.from_dict({key: old[key] for key in old if key not in ("accumulate", "basis_from")}))


@pytest.mark.slow
def test_interrupted_program_resumes_bit_for_bit(folder, cache, tmp_path):
    flags = [*GALORE, *BACKWARD, *WINDOWS, "--amp", "bf16", "--steps", "300", "--eval-every", "100"]
    argv, out = command(folder, cache, *flags), tmp_path / "run"
    line = [sys.executable, str(EXAMPLES / "pretrain.py"), *argv, "--out", str(out)]
    child = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(read(out / "log.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert 5 <= len(read(out / "log.jsonl")) < 300
    done = subprocess.run([*line, "--resume"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "in backward" in done.stdout
    assert (out / "energy.png").read_bytes().startswith(b"\x89PNG")
    with one_thread():
        undisturbed = train(make_job(argv), tmp_path / "undisturbed")
        assert_same(loaded(Job.read(out / "job.json"), out), undisturbed)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step-in-backward"], r"cannot clip \(--clip 1\) by the norm of all .*Add --clip-by delayed .* or --clip 0"),
        (["--step-in-backward", "--clip-by", "global"], r"cannot clip .*--clip-by tensor"),
        (
            ["--step-in-backward", "--clip", "0", "--clip-by", "tensor"],
            "--clip-by tensor with --clip 0 clips nothing; leave one of them out",
        ),
        (
            [*BACKWARD, *WINDOWS, "--accumulate", "whole", "--basis-from", "micro-batch"],
            "--basis-from micro-batch with --accumulate whole: .* leave one of them out",
        ),
        (["--clip-by", "delayed"], r"--clip-by delayed needs --step-in-backward; add it, or leave --clip-by out"),
        (["--basis-from", "window"], r"--basis-from window needs --step-in-backward"),
        (["--accumulate", "whole"], r"--accumulate whole needs --step-in-backward"),
        (
            ["--step-in-backward", "--clip-by", "tensor", "--micro-batch", "2"],
            r"cannot step in backward: --clip needs .*Pass --clip 0, --accumulate whole, .* or --micro-batch 4$",
        ),
        ([*BACKWARD, "--set", "nonfinite=raise"], r"cannot step in backward: nonfinite=\"raise\" promises"),
        ([*BACKWARD, "--optimizer", "adamw"], r"for optimizers of lowrank_optim, and AdamW is torch's; leave one"),
        ([*BACKWARD, "--compare", "galore,muon"], r"for optimizers of lowrank_optim, and Muon is torch's"),
        (["--amp", "fp16", "--dtype", "bf16"], r"--amp fp16 computes in 16 bits next to float32 weights, --dtype bf16"),
        (["--amp", "fp8"], r"--amp: invalid choice: 'fp8'"),
    ],
)
def test_bad_arguments(folder, cache, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = pretrain.main(command(folder, cache, *argv))
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert_matches(message, capsys.readouterr().err.strip())
    assert not list(tmp_path.rglob("job.json"))


# ---------------------------------------------------------------- counters of the optimizer


def test_statistics_are_logged_now_and_then_and_cut_back_on_resume(folder, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STATISTICS", 3)
    job = make_job(command(folder, cache, *GALORE))
    undisturbed = train(job, tmp_path / "whole")
    rows = read(undisturbed.statistics.path)
    assert [row["step"] for row in rows] == [1, 4, 8, 12]
    assert all(0 < row["captured_energy"] <= 1 + 1e-6 for row in rows)
    run = train(job, tmp_path / "parts", stop=5)
    Log(run.statistics.path).write(step=8, refreshes=-1)  # of a run that was killed
    again = train(job, tmp_path / "parts", resume=True)
    assert [(row["step"], row["refreshes"]) for row in read(again.statistics.path)] == [
        (row["step"], row["refreshes"]) for row in rows
    ]


def test_torch_optimizers_have_no_statistics(folder, cache, tmp_path):
    run = train(make_job(command(folder, cache, "--optimizer", "adamw", "--steps", "2")), tmp_path)
    assert read(run.statistics.path) == []
    assert not energy.draw([worker.result(run, worker.predict(run))], [tmp_path], tmp_path / "energy.png")
    assert not (tmp_path / "energy.png").exists()


def test_energy_has_one_point_per_refresh():
    name = "captured_energy/model.layers.{}.self_attn.q_proj.weight"
    values = {1: (0.5, 0.7), 2: (0.5, 0.7), 3: (0.6, 0.7), 4: (0.6, 0.8)}
    rows = [{"step": step, name.format(0): a, name.format(12): b} for step, (a, b) in values.items()]
    rows.insert(2, {"step": 2, "captured_energy": 0.3, "captured_energy/model.norm.weight": 0.3})
    assert energy.curves(rows) == {"q": {0: [(1, 0.5), (3, 0.6)], 12: [(1, 0.7), (4, 0.8)]}}


def test_energy_is_plotted_next_to_the_loss(folder, cache, tmp_path):
    runs = {name: tmp_path / name for name in ("adamw", "galore")}
    results = []
    for name, path in runs.items():
        run = train(make_job(command(folder, cache, "--optimizer", name, "--layers", "2")), path)
        results.append(json.loads(json.dumps(worker.result(run, worker.predict(run)))))
    found = energy.curves(read(runs["galore"] / "statistics.jsonl"))
    assert sorted(found) == sorted(energy.KINDS)
    assert {layer for lines in found.values() for layer in lines} == {0, 1}
    assert energy.draw(results, list(runs.values()), tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")
