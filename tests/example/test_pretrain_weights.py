"""examples/pretrain.py with methods that convert the model: ramps, warm start, merged weights, bytes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import lowrank_optim
from tests.support.example import StopAt, assert_matches, assert_same, command, make_job, train

import pretrain  # isort: skip
from benchmarks import quality  # isort: skip
from pretraining import arguments, checkpoint, launch, loop, model, optimizers, presets  # isort: skip
from pretraining import schedule, summary, worker  # isort: skip
from pretraining.errors import PretrainError  # isort: skip
from pretraining.interrupt import Interrupt  # isort: skip
from pretraining.job import Job  # isort: skip
from pretraining.log import read  # isort: skip


# Restarts within a dozen steps; for LTE its heads must divide a micro-batch.
SETTINGS = {
    "ReLoRA": ["merge_every=4"],
    "LTE": ["merge_every=2", "heads=2"],
    "SLTrain": ["reset_every=4", "refactor_every=4", "density=0.1"],
    "LoQT": ["update_proj_gap=4"],
    "SST": ["iteration_steps=4"],
    "LowRankAdamW": ["reset_every=4", "refactor_every=4"],
}
RESTARTING = {"ReLoRA", "SLTrain", "SST", "LowRankAdamW"}  # all layers at once
METHODS = [name for name in SETTINGS if hasattr(lowrank_optim, name)]
every_method = pytest.mark.parametrize("name", METHODS)


def argv_of(folder, cache, name: str, *more: str) -> list[str]:
    sizes = ["--hidden", "32", "--mlp", "48", "--micro-batch", "2", "--optimizer", name, "--set", *SETTINGS[name]]
    return command(folder, cache, *sizes, *more)


def test_every_method_is_here():
    assert set(METHODS) == {k for k, v in optimizers._classes(lowrank_optim).items() if optimizers.is_weight_space(v)}
    assert SETTINGS.keys() <= presets.PRESETS["nano"].optimizers.keys()


# ---------------------------------------------------------------- runs


@pytest.mark.thin
@pytest.mark.few(name=("ReLoRA",))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@every_method
def test_resume_is_bit_exact_across_restarts(folder, cache, tmp_path, name, dtype):
    job = make_job(argv_of(folder, cache, name, "--dtype", dtype))
    undisturbed = train(job, tmp_path / "whole")
    train(job, tmp_path / "parts", stop=4)  # at a restart
    train(job, tmp_path / "parts", stop=6, resume=True)
    torch.manual_seed(99)
    resumed = train(job, tmp_path / "parts", resume=True)
    assert_same(undisturbed, resumed)
    found, again = (worker.result(run, worker.predict(run)) for run in (undisturbed, resumed))
    assert found["bytes"] | {"peak": 0} == again["bytes"] | {"peak": 0}


@pytest.mark.few(name=("ReLoRA",))
@every_method
def test_resume_is_bit_exact_across_the_warm_start(folder, cache, tmp_path, name):
    job = make_job(argv_of(folder, cache, name, "--warm-start", "5"))
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    undisturbed = train(job, tmp_path / "whole")
    for stop, phase in ((3, "dense"), (5, "method"), (7, "method")):
        run = train(job, tmp_path / "parts", stop=stop, resume=stop > 3)
        assert checkpoint.load(run.path)["phase"] == phase
        assert run.converted == (phase == "method")
    assert_same(undisturbed, train(job, tmp_path / "parts", resume=True))
    rows = (tmp_path / "whole" / "report.txt").read_text()
    assert name in rows


def test_warm_start_is_adamw_and_then_the_method(folder, cache, tmp_path):
    """The first updates are those of a run of AdamW with the preset's values, as is the schedule."""
    dense = train(make_job(command(folder, cache, "--optimizer", "adamw", "--micro-batch", "2")), tmp_path / "dense")
    argv = [*command(folder, cache, "--optimizer", "relora", "--micro-batch", "2"), "--warm-start", "8"]
    warm = train(make_job(argv), tmp_path / "warm")
    assert warm.history.losses[:9] == dense.history.losses[:9]  # ReLoRA begins where the dense weights are
    assert warm.history.losses[9:] != dense.history.losses[9:]
    job = warm.job
    expected = [schedule.lr_factor(step, 12, 1) * (0.032 if step < 8 else job.lr) for step in range(12)]
    ramp = [(step - 7) / 10 if step >= 8 else 1.0 for step in range(12)]
    found = [row["lr"] for row in read(warm.log.path)]
    rates = [group["initial_lr"] for group in dense.optimizer.param_groups]
    assert found[:8] == [schedule.lr_factor(step, 12, 1) * rates[0] for step in range(8)]
    assert found[8:] == pytest.approx([a * b for a, b in zip(expected, ramp, strict=True)][8:])


@pytest.mark.thin
@pytest.mark.few(name=("ReLoRA",))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@every_method
def test_ends_merged(folder, cache, tmp_path, name, dtype, capfd):
    """11 steps, so that LTE has progress that it did not merge."""
    job = make_job(argv_of(folder, cache, name, "--steps", "11", "--dtype", dtype))
    launch.enter(job, tmp_path)
    assert worker.work(tmp_path, Interrupt())
    found = json.loads((tmp_path / "result.json").read_text())
    limit = 1e-5 if dtype == "fp32" else 1e-2
    assert found["merged_validation_loss"] == pytest.approx(found["validation_loss"], rel=limit)
    assert f"merged into a plain model, validation loss {found['merged_validation_loss']:.4f}" in capfd.readouterr().err
    plain = model.build(dataclasses.replace(job, seed=7))
    plain.load_state_dict(torch.load(tmp_path / "merged.pt", weights_only=True))
    run = loop.Run(job, tmp_path, Interrupt())
    assert loop.validation_loss(plain, run.corpus, job, Interrupt()) == found["merged_validation_loss"]
    run.load()  # the checkpoint is the converted one
    assert run.step == 11
    assert found["parameters"] == sum(p.numel() for p in plain.parameters())


@pytest.mark.few(name=("ReLoRA",))
@every_method
def test_stopped_while_it_merges(folder, cache, tmp_path, name):
    job = make_job(argv_of(folder, cache, name, "--steps", "2"))
    launch.enter(job, tmp_path)
    run = train(job, tmp_path)
    run.interrupt = StopAt(0)
    run.interrupt.run = run
    assert run.merge() is None
    assert not (tmp_path / "merged.pt").exists()
    assert worker.work(tmp_path, Interrupt())
    assert launch.finished(tmp_path) is not None


@pytest.mark.few(name=("ReLoRA",))
@every_method
def test_bytes_are_those_predicted(folder, cache, tmp_path, name):
    job = make_job(argv_of(folder, cache, name, "--micro-batch", "4"))
    run = train(job, tmp_path)
    found = worker.result(run, worker.predict(run))["bytes"]
    for what in ("optimizer", "weights", "gradients"):
        predicted = found["optimizer_predicted" if what == "optimizer" else what]
        assert found[f"{what}_measured"] == predicted, what


def test_steps_in_backward(folder, cache, tmp_path):
    argv = argv_of(folder, cache, "ReLoRA", "--clip", "0", "--micro-batch", "4")
    normal = train(make_job(argv), tmp_path / "normal")
    early = train(make_job([*argv, "--step-in-backward"]), tmp_path / "early")
    assert normal.history == early.history
    found = worker.result(early, worker.predict(early))
    assert found["bytes"]["gradients_measured"] is None
    assert "~" in summary.table([found], [])


def test_table_tells_both_rates_and_the_total(folder, cache, tmp_path):
    results = []
    for name in ("relora", "adamw"):
        run = train(make_job(command(folder, cache, "--optimizer", name, "--steps", "2")), tmp_path / name)
        results.append(worker.result(run, worker.predict(run)))
    shown = summary.table(results, ["LoQT"]).splitlines()
    assert max(map(len, shown)) <= 140
    assert "total" in shown[0]
    assert "0.032, matrices 0.004" in shown[2]
    for line, result in zip(shown[2:], results, strict=False):
        size = result["bytes"]
        assert summary.human(sum(size[f"{k}_measured"] for k in ("weights", "gradients", "optimizer"))) in line
    loqt = {**results[0], "job": {**results[0]["job"], "optimizer": "LoQT", "keywords": {"scale": 0.5}}}
    assert "matrices" not in summary.table([loqt], [])
    old = {k: v for k, v in results[1]["bytes"].items() if k not in ("weights_measured", "gradients_measured")}
    assert "~" in summary.table([{**results[1], "bytes": old}], [])


# ---------------------------------------------------------------- ramps


def test_lr_rises_again_after_restarts():
    factors = [schedule.restart_factor(step, 10, 4) for step in range(23)]
    assert factors[:10] == [1.0] * 10
    assert factors[10:] == [0.25, 0.5, 0.75, *[1.0] * 7, 0.25, 0.5, 0.75]
    late = [schedule.restart_factor(step, 10, 4, first=3) for step in range(23)]
    assert late == [1.0] * 3 + ([0.25, 0.5, 0.75] + [1.0] * 7) * 2
    assert {schedule.restart_factor(step, 10, 0, first=3) for step in range(23)} == {1.0}
    assert [schedule.restart_factor(step, None, 2, first=3) for step in range(6)] == [1, 1, 1, 0.5, 1, 1]


@pytest.mark.few(name=("ReLoRA",))
@every_method
def test_ramps_follow_the_period_of_the_method(folder, cache, tmp_path, name):
    if name not in RESTARTING:
        assert make_job(argv_of(folder, cache, name)).restart_warmup == 0
        return
    job = make_job(argv_of(folder, cache, name, "--restart-warmup", "2", "--warmup", "0"))
    rates = [row["lr"] for row in read(train(job, tmp_path).log.path)]
    cosine = [job.lr * schedule.lr_factor(step, 12, 0) for step in range(12)]
    halved = [step for step in range(12) if rates[step] == pytest.approx(cosine[step] / 2)]
    assert halved == [4, 8]
    assert sum(rate == pytest.approx(usual) for rate, usual in zip(rates, cosine, strict=True)) == 10


@pytest.mark.parametrize(
    ("settings", "expected"),
    [("merge_every=50", 10), ("merge_every=5000", 100), ("merge_every=4", 0), ("merge_every=50 reset=random", 10)],
)
def test_ramps_of_relora_by_themselves(folder, cache, settings, expected):
    argv = command(folder, cache, "--optimizer", "relora", "--set", *settings.split())
    assert make_job(argv).restart_warmup == expected
    assert make_job([*argv, "--restart-warmup", "0"]).restart_warmup == 0


def test_which_methods_ramp():
    for name, keywords, expected in (
        ("LowRankAdamW", {}, 200),
        ("LowRankAdamW", {"reset_every": None}, None),
        ("LoQT", {}, None),
        ("SST", {}, 200),
        ("SLTrain", {}, None),
        ("SLTrain", {"reset_every": 7}, 7),
        ("LTE", {}, None),
        ("LTE", {"reset": "drop"}, 10),
        ("GaLoreAdamW", {}, None),
    ):
        if hasattr(lowrank_optim, name):
            assert schedule.restart_period(optimizers.find(name), keywords) == expected, name


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optimizer relora --set matrix_lr_scale=2", r"got it for ReLoRA; use its lr and rest_lr instead"),
        ("--optimizer relora --set merge_every=often", r"ReLoRA merge_every=often does not accept .*merge_every must"),
        ("--optimizer relora --set rest_lr=-1", r"does not accept its arguments: rest_lr must be"),
        ("--optimizer loqt --set base=int3", r"does not accept its arguments: base must be one of"),
        ("--optimizer lowrank --set model=x", r"LowRankAdamW has no keyword 'model'"),
        ("--optimizer relora --set rank=1000", r"(?s)does not accept its arguments: .*rank 1000 >= min"),
        ("--optimizer relora --set include=('no_such',)", r"does not accept its arguments: .*no_such"),
        ("--optimizer relora --restart-warmup 50", r"must be below the 50 updates between two restarts of ReLoRA.*50$"),
        ("--optimizer loqt --restart-warmup 5", r"LoQT with these keywords never restarts all layers at once; leave"),
        ("--optimizer lowrank --set reset_every=None --restart-warmup 5", r"LowRankAdamW with these .* never restarts"),
        ("--compare relora,galore --restart-warmup 5", r"GaLoreAdamW with these keywords never restarts"),
        ("--optimizer adamw --warm-start 5", r"--warm-start 5 is for methods that convert the model, .*AdamW does not"),
        ("--optimizer relora --warm-start 12", r"--warm-start 12 leaves ReLoRA none of --steps 12"),
        (
            "--optimizer relora --warm-start 5 --step-in-backward --clip 0",
            r"trains with torch's AdamW, which cannot step in backward; leave it or --step-in-backward out",
        ),
        ("--optimizer weightspace", r"unknown optimizer 'weightspace'"),
        ("--optimizer lte --set heads=2", r"2 heads of LTE heads=2 must divide micro-batches, which are of 1 and 3"),
    ],
)
def test_bad_arguments(folder, cache, tmp_path, capsys, monkeypatch, argv, message):
    if "lte" in argv and "LTE" not in METHODS:
        pytest.skip("no LTE")
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(command(folder, cache, *argv.split())) == 2
    assert_matches(message, capsys.readouterr().err.strip())
    assert not list(tmp_path.rglob("job.json"))


def test_good_arguments_are_checked_without_memory(folder, cache):
    for more in (["exclude=('q_proj',)"], ["include=('layers.0',)"], ["base=nf4", "exact_base=True"]):
        optimizers.check(make_job(command(folder, cache, "--optimizer", "relora", "--set", *more)))


def test_job_cannot_change_on_resume(folder, cache, tmp_path):
    job = make_job(argv_of(folder, cache, "ReLoRA", "--restart-warmup", "1", "--warm-start", "5"))
    for name, value in (("restart_warmup", 2), ("warm_start", 4), ("dense", {})):
        with pytest.raises(PretrainError, match=f"{name} was .*, is {value}"):
            dataclasses.replace(job, **{name: value}).check_continues(job)
    kept = {k: v for k, v in job.to_dict().items() if k not in ("restart_warmup", "warm_start", "dense")}
    assert Job.from_dict(kept).warm_start == 0


def test_help_tells(capsys):
    with pytest.raises(SystemExit):
        arguments.parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--restart-warmup N updates over which lr rises" in text
    assert "then convert it" in text


@pytest.mark.slow
def test_the_whole_program(folder, cache, tmp_path, capfd):
    out = tmp_path / "both"
    argv = command(folder, cache, "--compare", "adamw,relora:merge_every=4", "--out", str(out))
    assert pretrain.main(argv) == 0
    shown = capfd.readouterr()
    assert "merged.pt" in shown.out
    assert "merged into a plain model" in shown.err
    assert pretrain.main([*argv, "--resume"]) == 0
    assert capfd.readouterr().out.count("finished before") == 2


# ---------------------------------------------------------------- benchmarks/quality.py


@every_method
def test_sweep_is_of_lr_alone(name):
    method = quality.METHODS[name]
    assert method.first == presets.PRESETS["nano"].optimizers[name]["lr"]
    assert method.candidate(0.004) == (0.004, {"rest_lr": 0.032})


def test_rows_without_weights_and_gradients_are_read(tmp_path, monkeypatch, capsys):
    """Rows of earlier versions know the bytes of the state alone, and those of diverged runs none."""
    rows = [{"validation_loss": 5.0, "state_bytes": 8}, {"validation_loss": None}]
    full = {"state_bytes": 2**20, "weights_bytes": 2**21, "gradients_bytes": 2**19}
    rows += [{"validation_loss": 4.0, **full}] * 2
    settings = {"lr": 0.002, "keywords": {"rest_lr": 0.032}, "steps": 9}
    for index, row in enumerate(rows):
        row = rows[index] = {"method": ("AdamW", "ReLoRA")[index // 2], "seed": index % 2, **settings, **row}
    monkeypatch.setattr(quality, "SWEEP", tmp_path / "sweep.json")
    quality.SWEEP.write_text(json.dumps({"rows": rows}))
    store = quality.Store(9)
    old, new = (quality._summary(store, name, name, 0.002, {"rest_lr": 0.032}, 2) for name in ("AdamW", "ReLoRA"))
    assert (old["state_bytes"], "weights_bytes" in old) == (8, False)
    assert full.items() <= new.items()
    quality.show([{**row, "over_better_adamw": 1.0, "state_over_adamw": 1.0} for row in (old, new)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].endswith("| - |")
    assert shown[3].endswith("| 3.50 |")
