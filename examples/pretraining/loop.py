"""The training loop of one run: step, validate, save, stop when asked, continue bit for bit."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import lowrank_optim
from lowrank_optim.reports.storages import stored

from . import checkpoint, memory, model, optimizers, precision, schedule, strategy
from .corpus import Corpus
from .data import training_data, turns, validation_batches
from .errors import PretrainError
from .interrupt import Interrupt
from .job import Job
from .log import Log
from .team import Team

DENSE, METHOD = "dense", "method"  # phases of a run: the first is the warm start, if there is one
MERGED = "merged.pt"
SMALLEST_SCALE = 1.0  # gradients that overflow below it do so without any loss scale
STATISTICS = 50  # so often during a run the optimizer is asked for its counters


@dataclass
class Clock:
    """Seconds spent so far, over all parts of an interrupted run."""

    training: float = 0.0
    optimizer: float = 0.0
    validation: float = 0.0


@dataclass
class History:
    losses: list[float] = field(default_factory=list)  # one per step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    overflows: int = 0  # steps whose gradients did not fit into float16


def token_losses(network: torch.nn.Module, windows: Tensor, amp: str) -> Tensor:
    """Sum of the cross-entropies of all targets in `windows` (count, sequence + 1), in float32."""
    with precision.autocast(windows.device, amp):
        logits = network(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="sum")


class Run:
    """One job in one folder. `train` goes on from wherever the run stands. All processes of a team do the same."""

    def __init__(self, job: Job, folder: Path, interrupt: Interrupt, team: Team | None = None) -> None:
        self.job, self.folder, self.interrupt, self.team = job, folder, interrupt, team or Team()
        self.strategy = strategy.of(job, self.team)
        self.corpus = Corpus.open(Path(job.corpus))
        self.model = self.strategy.build(job)
        self.initial_weights = model.fingerprint(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.data = training_data(self.corpus, job.sequence, job.seed)
        self.log = Log(folder / "log.jsonl", self.team.main)
        self.statistics = Log(folder / "statistics.jsonl", self.team.main)
        self.step, self.clock, self.history, self.earlier_peak = 0, Clock(), History(), 0
        self._begin(DENSE if job.warm_start else METHOD)

    def _begin(self, phase: str, scaler: torch.amp.GradScaler | None = None) -> None:
        """Make the optimizer of a phase, for which the model may be converted, and what goes with it.

        It reports before DeepSpeed takes its parameters.
        """
        self.phase, self.gradients = phase, 0  # bytes of all gradients before an update, at most
        self.optimizer = optimizers.build(self.model, self.job.before if phase == DENSE else self.job)
        self._report = self.optimizer.report() if isinstance(self.optimizer, lowrank_optim.LowRankOptimizer) else None
        self.updater = self.strategy.updater(self.model, self.optimizer, self.job, scaler)
        self.scheduler = schedule.scheduler(self.optimizer, self.job, self.step)

    @property
    def converted(self) -> bool:
        return isinstance(self.optimizer, lowrank_optim.WeightSpaceOptimizer)

    @property
    def weights(self) -> int:
        """Bytes of all parameters and buffers, in the form in which they are kept."""
        return stored([*self.model.parameters(), *self.model.buffers()])

    @property
    def path(self) -> Path:
        return self.strategy.path(self.folder)

    @property
    def peak(self) -> int:
        return max(self.earlier_peak, memory.peak_bytes(self.job.device))

    def train(self) -> bool:
        """True when the run is complete, False when it was interrupted; saved in both cases."""
        self.log.truncate(self.step)
        self.statistics.truncate(self.step)
        bar = self._bar()
        with bar:
            while True:
                if self.phase == DENSE and self.step == self.job.warm_start:
                    self._end_warm_start()
                if self._validation_due():
                    self._validate()
                finished = self.step == self.job.steps and not self._validation_due()
                if self.team.any(finished or self.interrupt.requested):
                    self.save()
                    return finished
                if self.step and self.step % self.job.save_every == 0 and self.step < self.job.steps:
                    self.save()
                self._train_step(bar)

    def _end_warm_start(self) -> None:
        """AdamW's state goes before the method's comes; the loss scale and the schedule go on."""
        scaler = self.updater.scaler
        del self.optimizer, self.updater, self.scheduler
        self._begin(METHOD, scaler)
        self.write_report()
        self.team.say(f"{self.job.label}: step {self.step}, converted after the warm start")

    def write_report(self) -> None:
        """What the optimizer does with each parameter, and what step_in_backward keeps of each gradient."""
        handle = self.updater.handle
        reports = [self.optimizer.report(), handle.report()] if handle else [self._report]
        if self._report is not None and self.team.main:
            (self.folder / "report.txt").write_text("\n\n".join(map(str, reports)) + "\n")

    def merge(self) -> float | None:
        """The validation loss of the model with plain layers again, which is then in MERGED; None after a stop.

        The checkpoint stays the converted one, and the optimizer is done with.
        """
        self.model = lowrank_optim.merge(self.strategy.whole(self.model, self.job))
        loss = validation_loss(self.model, self.corpus, self.job, self.interrupt, self.team)
        if loss is not None:
            merged = dict(self.model.state_dict())
            self.team.first(lambda: checkpoint.save(merged, self.folder / MERGED))
            self.team.say(f"{self.job.label}: merged into a plain model, validation loss {loss:.4f}")
        return loss

    def _bar(self) -> tqdm[Any]:
        shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        # A log file wants a line now and then, a terminal wants a live bar.
        pause = 0.2 if sys.stderr.isatty() else 10.0
        label, quiet = self.job.label, not self.team.main
        return tqdm(
            total=self.job.steps, initial=self.step, desc=label, bar_format=shape, mininterval=pause, disable=quiet
        )

    def _train_step(self, bar: tqdm[Any]) -> None:
        start = self._now()
        loss = self.team.mean(self._backward())
        self.updater.clip()
        norm = self.updater.gradient_norm
        if not (math.isfinite(loss) and (norm is None or math.isfinite(norm) or self.updater.scaler.is_enabled())):
            raise self._diverged(f"loss {loss}, gradient norm {norm}")
        lr, scale = self.scheduler.get_last_lr()[0], self.updater.scaler.get_scale()
        self.gradients = max(self.gradients, self.updater.gradient_bytes() or 0)
        before = self._now()
        try:
            fits = self.updater.step()
        except NotImplementedError as error:
            raise self.team.once(PretrainError(f"{self.job.label}: {error}")) from error
        after = self._now()
        if not fits:
            self._overflow(scale)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.clock.training += after - start
        self.clock.optimizer += after - before
        self.history.losses.append(loss)
        norm = self.updater.gradient_norm
        amp = {"loss_scale": scale, "overflow": not fits} if self.job.amp == "fp16" else {}
        row = {"loss": loss, "lr": lr, "gradient_norm": norm if fits else None, **amp, "seconds": after - start}
        self.log.write(step=self.step, **row)
        self._note_statistics()
        speed = self.job.batch * self.job.sequence / (after - start)
        bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()

    def _diverged(self, signs: str) -> PretrainError:
        text = f"{self.job.label} diverged at step {self.step + 1}: {signs}; the last checkpoint is untouched. "
        return self.team.once(PretrainError(text + "Try a lower lr, more warm-up or a smaller --clip"))

    def _overflow(self, scale: float) -> None:
        """The scaler starts too high and goes down until gradients fit: a few such steps are nothing to worry about."""
        if scale < SMALLEST_SCALE:
            raise self._diverged(f"gradients overflow at a loss scale of {scale:g}")
        self.history.overflows += 1
        left_out = "parameters with such gradients are" if self.job.step_in_backward else "the step is"
        found = f"step {self.step + 1}, gradients overflow at a loss scale of {scale:g}"
        self.team.say(f"{self.job.label}: {found}; {left_out} left out")

    def _note_statistics(self) -> None:
        """Counters of the optimizer, such as the energy that its subspaces capture, where it has them."""
        due = self.step in (1, self.job.steps) or self.step % max(1, self.job.steps // STATISTICS) == 0
        if due and hasattr(self.optimizer, "stats"):
            self.statistics.write(step=self.step, **self.optimizer.stats())

    def _backward(self) -> float:
        """Mean loss over this process's share of the batch; gradients are of the mean, summed up over micro-batches."""
        job, total = self.job, 0.0
        first, tokens = self.step * job.batch + self.team.rank * job.share, job.share * job.sequence
        for offset in range(0, job.share, job.micro_batch):
            count = min(job.micro_batch, job.share - offset)
            windows = self.data.windows(first + offset, count).to(job.device)
            with self.updater.micro_batch(last=offset + count == job.share):
                loss = token_losses(self.updater.network, windows, job.amp) / tokens
                self.updater.backward(loss)
            total += loss.item()
        return total

    def _now(self) -> float:
        if self.job.device.startswith("cuda"):
            torch.cuda.synchronize(self.job.device)
        return time.perf_counter()

    def _validation_due(self) -> bool:
        last = self.history.validation[-1][0] if self.history.validation else 0
        return self.step > last and (self.step % self.job.eval_every == 0 or self.step == self.job.steps)

    def _validate(self) -> None:
        """Given up when a stop is asked for: it is made up for after the resume."""
        start = self._now()
        loss = validation_loss(self.model, self.corpus, self.job, self.interrupt, self.team)
        if loss is None:
            return
        self.clock.validation += self._now() - start
        self.history.validation.append((self.step, loss))
        self.team.say(f"{self.job.label}: step {self.step}, validation loss {loss:.4f}")

    def save(self) -> None:
        finite = all(_here(p).isfinite().all() for p in self.model.parameters())
        if self.team.any(not finite):
            text = f"{self.job.label} has non-finite weights at step {self.step}; the last checkpoint is untouched. "
            raise self.team.once(PretrainError(text + "Try a lower lr or more warm-up"))
        cuda = self.job.device.startswith("cuda")
        rest = {
            "job": self.job.to_dict(),
            "step": self.step,
            "phase": self.phase,
            "scaler": self.updater.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state()] if cuda else []},
            "history": asdict(self.history),
            "clock": asdict(self.clock),
            "peak": self.peak,
            "gradients": self.gradients,
            "numerics": self._numerics(),
        }
        self.strategy.save(self.folder, self.updater, rest)

    def load(self) -> None:
        content = self.strategy.read(self.path)
        self.job.check_continues(Job.from_dict(content["job"]))
        self.step, self.earlier_peak = content["step"], content["peak"]
        if content.get("phase", METHOD) != self.phase:
            self._begin(METHOD)
        self.gradients = content.get("gradients", 0)
        self.strategy.restore(content, self.updater)
        if self.updater.scaler.is_enabled():
            self.updater.scaler.load_state_dict(content["scaler"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.data.load_state_dict(content["data"])
        torch.set_rng_state(content["random"]["cpu"])
        if content["random"]["cuda"] and self.job.device.startswith("cuda"):
            torch.cuda.set_rng_state(content["random"]["cuda"][0])
        self.history, self.clock = History(**content["history"]), Clock(**content["clock"])
        if content["numerics"] != self._numerics():
            self.team.say(
                f"note: {self.job.label} was saved under {content['numerics']} and continues under {self._numerics()}; "
                "it will not be equal to an undisturbed run bit for bit"
            )

    def _numerics(self) -> dict[str, Any]:
        """What decides the last bits of a sum besides the job."""
        return {
            "torch": str(torch.__version__),
            "device": self.job.device.split(":")[0],
            "threads": torch.get_num_threads(),
            **({"processes": self.team.world} if self.team.world > 1 else {}),
        }


def _here(p: Tensor) -> Tensor:
    """What this process has of a parameter."""
    return p.to_local() if isinstance(p, DTensor) else p


@torch.no_grad()
def validation_loss(
    network: torch.nn.Module, corpus: Corpus, job: Job, interrupt: Interrupt, team: Team | None = None
) -> float | None:
    """Sum of the losses of all validation tokens over their number: every token weighs the same."""
    team = team or Team()
    network.eval()
    total, count, stopped = 0.0, 0, False
    batches = validation_batches(corpus.tokens("validation"), job.sequence, job.micro_batch)
    for windows, counts in turns(batches, team.rank, team.world):
        stopped = team.any(interrupt.requested)
        if stopped:
            break
        loss = token_losses(network, windows.to(job.device), job.amp).item()  # sharded models are called by all or none
        total, count = total + counts * loss, count + counts * windows[:, 1:].numel()
    network.train()
    total, count = team.sums(total, count)
    return None if stopped else total / count
