"""examples/pretrain.py in several processes: the losses of one process, its resume, and its single error.

Processes take longer to start than to work, so those of a module do everything in turn.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.example import EXAMPLES, assert_matches, command, make_job, train
from tests.support.text import words

from pretraining import corpus, data, folders, launch, loop, sharded  # isort: skip
from pretraining.errors import PretrainError, ToldElsewhereError  # isort: skip
from pretraining.interrupt import Interrupt  # isort: skip
from pretraining.log import read  # isort: skip
from pretraining.team import Team  # isort: skip
from tests.support.example_ranks import GALORE, SIZES, assert_close, go, spawn

pytestmark = pytest.mark.slow  # its processes take long


PARALLEL = ("ddp", "fsdp2")
CONVERTED = {
    "relora": ["--set", "merge_every=4", "--warm-start", "5"],
    "loqt": ["--set", "update_proj_gap=4"],
    "lte": ["--set", "merge_every=2", "heads=2"],
}


def weights(run):
    return {name: getattr(p, "full_tensor", p.detach)().clone() for name, p in run.model.named_parameters()}


def state(run):
    """Of the first process; sharded state is gathered."""
    kept = {}
    for name, p in run.model.named_parameters():
        for key, x in run.optimizer.state[p].items():
            kept[name, key] = x.full_tensor() if hasattr(x, "full_tensor") else x
    return kept


def undisturbed_and_resumed(job, path, team):
    whole = go(job, path / "whole", team)
    go(job, path / "parts", team, stop=5, only=team.world - 1)  # before a validation; one process hears of it
    if team.main:
        shutil.copytree(path / "parts", path / "stopped")
    go(job, path / "parts", team, stop=7)
    torch.manual_seed(99)
    resumed = go(job, path / "parts", team)
    return whole, resumed


def compare(first, second):
    """Are weights, optimizer, losses and log equal to the bit?"""
    assert first.history == second.history
    for mine, other in ((weights(first), weights(second)), (state(first), state(second))):
        assert mine.keys() == other.keys()
        for key, x in mine.items():
            assert torch.equal(x, other[key]), key
    if first.team.main:
        rows = [[row | {"seconds": 0} for row in read(run.log.path)] for run in (first, second)]
        assert rows[0] == rows[1]


# ---------------------------------------------------------------- what processes do together


def one_process_shards(team, folder, job):
    go(dataclasses.replace(job, strategy="fsdp2"), folder / "fsdp2 of one", team, stop=5)


def two_processes(team, folder, job, converted):
    found = {}
    for name in PARALLEL:
        (path := folder / name).mkdir(exist_ok=True)
        dist.barrier()
        parallel = dataclasses.replace(job, strategy=name)
        whole, resumed = undisturbed_and_resumed(parallel, path, team)
        compare(whole, resumed)
        found[name] = whole.history
        found[name, "first weights"] = whole.initial_weights
    found["fsdp2 of one"] = go(dataclasses.replace(job, strategy="fsdp2"), folder / "fsdp2 of one", team).history
    failing_save(dataclasses.replace(job, strategy="fsdp2"), folder / "fsdp2" / "whole", team)
    for name, one in converted.items():
        (path := folder / name).mkdir(exist_ok=True)
        dist.barrier()
        parallel = dataclasses.replace(one, strategy="ddp")
        whole = go(parallel, path / "whole", team)
        assert same_on_all(whole), f"{name}: weights differ between processes"
        go(parallel, path / "parts", team, stop=7)
        assert whole.history == go(parallel, path / "parts", team).history
        found[name] = whole.history
        found[name, "merged"] = whole.merge()
    if team.main:
        torch.save(found, folder / "found.pt")


def same_on_all(run):
    total = torch.stack([x.double().abs().sum() for x in (*run.model.parameters(), *run.model.buffers())])
    first = total.clone()
    dist.broadcast(first, 0)
    return torch.equal(total, first)


def failing_save(job, path, team):
    """One of two disks is full: all ranks get the error of that rank, and the earlier checkpoint stays."""
    run, save = go(job, path, team), sharded.dcp.save
    before = run.path

    def half(state, checkpoint_id):
        if team.rank == 1:
            raise OSError("no room")
        (checkpoint_id / "half").write_text("half")

    sharded.dcp.save = half
    with pytest.raises(
        ToldElsewhereError if team.main else PretrainError, match=r"no room; .*checkpoint-\d+ is intact"
    ):
        run.save()
    sharded.dcp.save = save
    assert run.path == before
    assert go(job, path, team).step == job.steps


@pytest.fixture(scope="module")
def jobs(folder, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        job = make_job(command(folder, cache, *SIZES, *GALORE))
        flags = [*SIZES, "--hidden", "32", "--mlp", "48", "--micro-batch", "2"]
        converted = {
            name: make_job(command(folder, cache, *flags, "--optimizer", name, *more))
            for name, more in CONVERTED.items()
        }
    return job, converted


@pytest.fixture(scope="module")
def found(jobs, tmp_path_factory):
    job, converted = jobs
    path = tmp_path_factory.mktemp("ranks")
    spawn(one_process_shards, 1, path, job)
    spawn(two_processes, 2, path, job, converted)
    return torch.load(path / "found.pt", weights_only=False) | {"path": path}


@pytest.fixture(scope="module")
def alone(jobs, tmp_path_factory):
    return train(jobs[0], tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize("name", [*PARALLEL, "fsdp2 of one"])
def test_losses_are_those_of_one_process(found, alone, name):
    """Every step's and every validation's; "fsdp2 of one" was begun by one process and went on with two."""
    assert_close(found[name], alone.history)
    assert found[name].losses[-1] < found[name].losses[0] - 0.3


@pytest.mark.parametrize("name", PARALLEL)
def test_first_weights_are_those_of_one_process(found, alone, name):
    assert found[name, "first weights"] == alone.initial_weights


def test_one_process_resumes_where_two_stopped(found, alone, jobs, tmp_path):
    run = loop.Run(jobs[0], found["path"] / "ddp" / "stopped", Interrupt())
    run.load()
    assert run.step == 5
    assert run.train()
    assert_close(run.history, alone.history)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_models_train_in_parallel(found, jobs, tmp_path, name):
    """LTE's heads take other sequences than in one process, so only its own resume and merge are comparable."""
    history = found[name]
    if name != "lte":
        assert_close(history, train(jobs[1][name], tmp_path / "run").history)
    assert found[name, "merged"] == pytest.approx(history.validation[-1][1], rel=1e-5)


def test_only_complete_folders_are_checkpoints(tmp_path):
    team, written = Team(), []
    assert not folders.newest(tmp_path).exists()
    for step in (1, 2):
        folders.save(tmp_path, team, {"step": step}, lambda part: written.append(part.name))
        assert folders.read(folders.newest(tmp_path))["step"] == step
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]

    def killed(part):
        (part / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.save(tmp_path, team, {"step": 3}, killed)
    assert folders.read(folders.newest(tmp_path))["step"] == 2
    folders.save(tmp_path, team, {"step": 4}, lambda part: None)
    assert sorted(path.name for path in (tmp_path / "checkpoint-3").iterdir()) == ["rest.pt"]
    (tmp_path / "checkpoint-10").mkdir()
    assert folders.newest(tmp_path).name == "checkpoint-10"


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_turns_see_every_batch_once(world):
    batches = [torch.full((1,), float(i)) for i in range(7)]
    seen = [list(data.turns(iter(batches), rank, world)) for rank in range(world)]
    assert len({len(one) for one in seen}) == 1
    assert sorted(x.item() for one in seen for x, counts in one if counts) == list(range(7))


def test_processes_read_the_same_stream(tmp_path, folder, cache, monkeypatch):
    """Each leaves out what the others have; the state of the first is good for all, in any number."""

    class Stream(list):
        def set_epoch(self, epoch): ...
        def state_dict(self):
            return {}

        def load_state_dict(self, state): ...

    rows = Stream({"text": words(n, 60)} for n in range(40))
    monkeypatch.setattr(data, "open_stream", lambda source: rows)
    stream = corpus.Corpus.open(Path(make_job(command(folder, cache)).corpus))
    one = data.StreamedWindows(stream, 16)
    expected = one.windows(0, 36)
    for world in (2, 3):
        readers = [data.StreamedWindows(stream, 16) for _ in range(world)]
        share = 12 // world
        for step in range(3):
            parts = [reader.windows(12 * step + rank * share, share) for rank, reader in enumerate(readers)]
            assert torch.equal(torch.cat(parts), expected[12 * step : 12 * step + 12])
        assert readers[0].state_dict()["next"] <= 36 - 12 + share
    with pytest.raises(AssertionError, match="goes forward only"):
        readers[-1].windows(3, 1)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("world", "argv", "message"),
    [
        (None, "--strategy ddp", r"--strategy ddp needs a launcher, also for one process: torchrun"),
        (2, "--strategy single", r"--strategy single in 2 processes would train 2 times the same"),
        (3, "--batch 4", r"--batch must be a multiple of the number of processes, which is 3, got 4"),
        (
            2,
            "--step-in-backward --clip 0",
            r"--strategy ddp: --step-in-backward uses gradients before they are averaged",
        ),
        (2, "--strategy fsdp2 --amp fp16", r"--amp fp16 needs a loss scale, .* sharded"),
        (2, "--strategy fsdp2 --optimizer relora", r"ReLoRA converts layers, which must be whole in every process"),
        (2, "--optimizer lte --set heads='ranks'", r"heads='ranks' keeps other weights in every process"),
    ],
)
def test_refused_with_a_reason(folder, cache, tmp_path, monkeypatch, world, argv, message):
    if world:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PretrainError) as caught:
        launch.plan(command(folder, cache, *argv.split()))
    assert_matches(message, str(caught.value))
    assert not list(tmp_path.rglob("job.json"))


def test_strategy_follows_the_launcher(folder, cache, monkeypatch):
    job = make_job(command(folder, cache, "--local_rank=0"))
    assert (job.strategy, job.world, job.micro_batches) == ("single", 1, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    job = make_job(command(folder, cache))
    assert (job.strategy, job.world, job.share, job.micro_batches) == ("ddp", 2, 2, 1)


def test_which_checkpoints_can_be_resumed(folder, cache):
    one = make_job(command(folder, cache))

    def continues(first, second):
        before, after = (dataclasses.replace(one, strategy=name, world=world) for name, world in (first, second))
        try:
            after.check_continues(before)
        except PretrainError as error:
            return str(error)

    assert continues(("single", 1), ("ddp", 4)) is None
    assert continues(("fsdp2", 2), ("fsdp2", 4)) is None
    assert continues(("zero2", 2), ("zero2", 2)) is None
    assert "world was 2, is 4" in continues(("zero2", 2), ("zero2", 4))
    assert "strategy was 'ddp', is 'fsdp2'" in continues(("ddp", 2), ("fsdp2", 2))


def test_resume_command_names_the_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["examples/pretrain.py"])
    assert launch.resume_command(["--out", "x"], Path("x")) == "python examples/pretrain.py --out x --resume"
    monkeypatch.setenv("WORLD_SIZE", "4")
    expected = "deepspeed --no_local_rank --num_accelerators 4 examples/pretrain.py --resume --out y"
    assert launch.resume_command([], Path("y")) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch.resume_command([], Path("y")).startswith("torchrun --nnodes 2 --nproc_per_node 2 examples/")


# ---------------------------------------------------------------- torchrun


def torchrun(world: int, *argv: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    return [*launcher, str(EXAMPLES / "pretrain.py"), *argv]


def wait_for(steps: int, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while len(read(log)) < steps and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(read(log)) >= steps


@pytest.mark.slow
def test_a_bad_flag_is_one_error(folder, cache, tmp_path):
    for argv, message in (
        (["--steps", "0"], "--steps: must be"),
        (["--optimizer", "adamm"], "error: unknown optimizer"),
    ):
        line = torchrun(2, *command(folder, cache, *argv, "--out", str(tmp_path / "run")))
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert done.stderr.count(message) == 1
        assert "Traceback" not in done.stderr.partition("ChildFailedError")[0].partition("Traceback")[0]
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PARALLEL)
def test_killed_stopped_and_resumed(folder, cache, tmp_path, name):
    """Kill -9 of one process, then SIGTERM to torchrun, then to the end: the undisturbed run, bit for bit."""
    flags = ["--steps", "60", "--save-every", "7", "--eval-every", "25", "--strategy", name]
    argv = command(folder, cache, *SIZES, *GALORE, *flags)
    out = tmp_path / "run"
    line = torchrun(2, *argv, "--out", str(out))
    child = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    wait_for(10, out / "log.jsonl")
    ranks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    child.communicate(timeout=120)
    assert child.returncode != 0

    child = subprocess.Popen([*line, "--resume"], stderr=subprocess.PIPE, text=True)
    before = len(read(out / "log.jsonl"))
    wait_for(before + 5, out / "log.jsonl")
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=120)
    assert errors.count("interrupted and saved; continue with") == 1, errors
    assert "torchrun --nproc_per_node 2" in errors

    assert subprocess.run([*line, "--resume"], timeout=200).returncode == 0
    assert subprocess.run(torchrun(2, *argv, "--out", str(tmp_path / "whole")), timeout=200).returncode == 0
    rows = [[row | {"seconds": 0} for row in read(path / "log.jsonl")] for path in (out, tmp_path / "whole")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 60


@pytest.mark.slow
def test_comparison_in_two_processes_and_resume_in_three(folder, cache, tmp_path):
    flags = ["--compare", "adamw,galore:rank=4", "--strategy", "fsdp2", "--out", str(tmp_path / "both")]
    argv = command(folder, cache, *SIZES, *flags)
    done = subprocess.run(torchrun(2, *argv), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "vs AdamW" in done.stdout
    assert done.stdout.count("wrote") == 5
    for path in tmp_path.rglob("result.json"):
        path.unlink()
    done = subprocess.run(torchrun(3, *argv, "--resume"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("and continues under") == 2


def three_processes(team, folder, job):
    for name in PARALLEL:
        (path := folder / name).mkdir(exist_ok=True)
        dist.barrier()
        whole, resumed = undisturbed_and_resumed(dataclasses.replace(job, strategy=name), path, team)
        compare(whole, resumed)


@pytest.mark.slow
def test_three_processes_resume_exactly(jobs, tmp_path):
    spawn(three_processes, 3, tmp_path, jobs[0])
