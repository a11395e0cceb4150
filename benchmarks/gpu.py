"""What `gpu_check` measures: the ceilings of a GPU, kernels, refreshes, steps, a captured step, memory, one rank.

Times are those of the device between two events, with the gaps that the host leaves; rivals run in turns, ratios are
taken round by round and their median is reported.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim
from benchmarks import llama, peers
from benchmarks.memory import SIZES
from lowrank_optim import ops
from lowrank_optim.engine.limits import CHUNK_BYTES
from lowrank_optim.memory.peak import measure
from lowrank_optim.ops import native, quantize
from lowrank_optim.parts import SVD, SubspaceIteration
from lowrank_optim.recipe.algebra import WHOLE

NEVER, GAP = 10**9, 200
ENOUGH = 90  # seconds after which no larger model is begun, of the 150 that its section may take
LAYERS_OF_7B = 8  # of 32: with all of them two optimizers do not fit; the time of a step is proportional to layers
QUICK = (64, 128, 2, 16)  # hidden, mlp, layers, rank
MIB = 2**20
Run = Callable[[], Any]
Found = dict[str, Any]


class Bench:
    """The device, and how to time on it."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.cuda = device.type == "cuda"
        torch.manual_seed(0)
        native.load()

    def seconds(self, run: Run) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def rivals(self, runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
        """Seconds of each, round by round, after two that do not count."""
        rounds = 2 if self.quick else rounds
        all_ = [[self.seconds(run) for run in runs.values()] for _ in range(rounds + 2)][2:]
        return dict(zip(runs, map(list, zip(*all_, strict=True)), strict=True))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)


def device_of(kind: str) -> Found:
    if kind == "cpu":
        return {"name": "cpu"}
    about = torch.cuda.get_device_properties(0)
    found = {"name": about.name, "memory": about.total_memory, "multiprocessors": about.multi_processor_count}
    return {**found, "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda}


def median_ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def copy_bandwidth(bench: Bench) -> float:
    """Bytes per second, read and written, of a large copy."""
    x = torch.empty((1 if bench.quick else 512) * MIB, device=bench.device)  # 2 GiB
    y = torch.empty_like(x).uniform_()
    return 2 * x.nbytes / statistics.median(bench.rivals({"copy": lambda: x.copy_(y)}, 10)["copy"])


def ceilings(bench: Bench) -> Found:
    n = 256 if bench.quick else 8192
    a, b = (bench.randn(n, n, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / statistics.median(bench.rivals({"product": lambda: a @ b}, 10)["product"])
    copied = copy_bandwidth(bench)
    lines = [f"copy {copied / 1e12:.2f} TB/s, bfloat16 products {rate / 1e12:.0f} TFLOP/s"]
    return {"copy_bytes_per_second": copied, "bfloat16_flops_per_second": rate, "lines": lines}


# -- kernels -----------------------------------------------------------------------------------------------------------


def kernels(bench: Bench) -> Found:
    """Bandwidth of each kernel, of the copy's in the same process; bytes that must be read or written are counted."""
    n, copied = (1 << 14 if bench.quick else 1 << 26), copy_bandwidth(bench)
    rows = {}
    for name, (run, size) in _kernels(bench, n).items():
        seconds = statistics.median(bench.rivals({name: run}, 15)[name])
        rows[name] = {"ms": 1e3 * seconds, "bytes_per_element": size, "of_copy_bandwidth": n * size / seconds / copied}
    lines = [f"{name:32}{row['ms']:9.3f} ms {row['of_copy_bandwidth']:7.1%} of a copy" for name, row in rows.items()]
    return {"elements": n, "backend": str(lowrank_optim.backend_info()), "kernels": rows, "lines": lines}


def _kernels(bench: Bench, n: int) -> dict[str, tuple[Run, float]]:
    """name -> (call, bytes per element)."""
    new = {"device": bench.device}
    m, v, r, x, out = bench.randn(n), bench.randn(n).square(), bench.randn(n), bench.randn(n), bench.randn(n)
    codes, per_block = torch.zeros(n, dtype=torch.uint8, **new), torch.zeros(n // 256, **new)
    low, half, half_bytes = per_block.clone(), out.bfloat16(), codes[: n // 2].clone()
    levels = quantize.dynamic_map(True, bench.device)
    table = quantize._nearest_table(levels)
    squares = quantize.dynamic_map(False, bench.device)
    maps = levels, table[0], squares, quantize._nearest_table(squares)[0]
    half_sq, codes_sq, peaks_sq = half.abs(), codes.clone(), per_block.abs()
    w = out.bfloat16().view(-1, 4096)
    numbers = ops.philox.numbers_of(ops.key_of(0, "w"), ops.stream_of("test", 1))
    calls: dict[str, tuple[tuple[Any, ...], float]] = {
        "projected_adam_": ((m, v, r, 0.9, 0.999, 1e-8, 10.0), 24),
        "projected_adam_bfloat16_list_": (
            ([half], [half_sq], [r], 0.9, 0.999, 1e-8, 10.0, None, [numbers[0]], 1, 2, 3, None, [0]),
            16,
        ),
        "projected_adam_int8_list_": (
            ([codes], [per_block], [codes_sq], [peaks_sq], [r], *maps, 256, 0.9, 0.999, 1e-8, 10.0),
            12 + 16 / 256,
        ),
        "add_nearest_": ((w, x.view(w.shape), 0.99), 8),
        "add_stochastic_": ((w, x.view(w.shape), 0.99, *numbers, 0, w.shape[1]), 8),
        "round_to_bfloat16_": ((half, x, *numbers), 6),
        "philox_normal_": ((out, *numbers), 4),
        "quantize_blockwise_": ((codes, per_block, x, levels, *table, 256, True), 5 + 4 / 256),
        "dequantize_blockwise_": ((out, codes, per_block, levels, 256), 5 + 4 / 256),
        "quantize_affine_": ((codes, per_block, low, x, 4, 256), 5 + 8 / 256),
        "dequantize_affine_": ((out, codes, per_block, low, 256), 5 + 8 / 256),
        "pack4_": ((half_bytes, codes), 1.5),
    }

    def call(name: str, arguments: tuple[Any, ...]) -> Run:
        operator = getattr(torch.ops.lowrank_optim, name).default
        return lambda: operator(*arguments)

    return {name: (call(name, arguments), size) for name, (arguments, size) in calls.items()}


# -- refreshes ---------------------------------------------------------------------------------------------------------


def refresh(bench: Bench) -> Found:
    """One matrix; singular values fall as k^-1/2, and a warm start shares 70 % of the norm with this gradient."""
    rows = [_refresh(bench, *shape) for shape in ([(64, 64, 16)] if bench.quick else REFRESHES)]
    return {"rows": rows, "lines": [line for row in rows for line in row.pop("lines")]}


REFRESHES = [(1024, 1024, 256), (2048, 2048, 512), (2048, 5461, 512)]


def _refresh(bench: Bench, m: int, n: int, rank: int) -> Found:
    short = min(m, n)
    left, right = (torch.linalg.qr(bench.randn(size, short))[0] for size in (m, n))
    g = (left * torch.arange(1, short + 1, device=bench.device) ** -0.5) @ right.mT
    noise = bench.randn(m, n)
    older = 0.7 * g + 0.3 * noise * g.norm() / noise.norm()
    random, exact = SubspaceIteration(), SVD()

    def draw(shape: tuple[int, ...], purpose: str = "", some: slice | None = None) -> Tensor:
        return ops.normal(shape, 1, (0, 0), bench.device, some=some)

    previous = random.fit(WHOLE, older, None, rank, draw, None)
    fits: dict[str, Callable[[], Tensor]] = {
        "linalg.svd": lambda: exact.fit(WHOLE, g, None, rank, draw, None)["basis"],
        "svd_lowrank(niter=2)": lambda: torch.svd_lowrank(g, rank, niter=2)[0],
        "cold": lambda: random.fit(WHOLE, g, None, rank, draw, None)["basis"],
        "warm": lambda: random.fit(WHOLE, g, previous, rank, draw, None)["basis"],
    }
    times = bench.rivals(fits, 3)
    energy = {name: float((fit().mT @ g).square().sum()) for name, fit in fits.items()}
    row: Found = {"shape": [m, n], "rank": rank, "lines": [f"{m}x{n}, rank {rank}"]}
    for name in fits:
        row[name] = {
            "ms": 1e3 * statistics.median(times[name]),
            "speedup_over_svd": median_ratio(times["linalg.svd"], times[name]),
            "speedup_over_svd_lowrank": median_ratio(times["svd_lowrank(niter=2)"], times[name]),
            "energy_over_best": energy[name] / energy["linalg.svd"],
        }
        row["lines"].append(
            f"  {name:22}{row[name]['speedup_over_svd']:8.1f}x svd{energy[name] / energy['linalg.svd']:9.4f}"
        )
    return row


# -- whole steps -------------------------------------------------------------------------------------------------------


def projected(bench: Bench, size: str) -> tuple[list[tuple[int, ...]], int, int]:
    """The shapes of a model's projected weights, their rank, and the layers that were taken."""
    hidden, mlp, layers, rank = QUICK if bench.quick else SIZES[size]
    layers = LAYERS_OF_7B if size == "7B" and not bench.quick else layers
    named = llama.shapes(hidden, mlp, layers)
    return [shape for name, shape in named.items() if "_proj" in name], rank, layers


def parameters(bench: Bench, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter(bench.randn(*shape, dtype=dtype).mul_(0.02)) for shape in shapes]
    for p in params:
        p.grad = bench.randn(*p.shape, dtype=dtype).mul_(0.01)
    return params


def steps(bench: Bench) -> Found:
    """Projected weights in bfloat16, GaLore beside torch's fused AdamW on copies of them, between refreshes."""
    start, rows, lines = time.monotonic(), [], []
    for size in ["60M"] if bench.quick else ["60M", "350M", "1B", "7B"]:
        if time.monotonic() - start > ENOUGH:
            lines.append(f"{size} was left out: the sizes before it took {ENOUGH} s")
            break
        rows.append(_steps(bench, size))
        lines.append(rows[-1].pop("line"))
    return {"gap": GAP, "rows": rows, "lines": lines}


def _steps(bench: Bench, size: str) -> Found:
    shapes, rank, layers = projected(bench, size)
    copied = copy_bandwidth(bench)
    params = parameters(bench, shapes, torch.bfloat16)
    adamw = torch.optim.AdamW(params, lr=1e-4, fused=True)
    ours = lowrank_optim.GaLoreAdamW(params, lr=1e-4, rank=rank, update_proj_gap=NEVER, stagger=False)
    eight = lowrank_optim.GaLoreAdamW8bit(params, lr=1e-4, rank=rank, update_proj_gap=NEVER, stagger=False)
    first = bench.seconds(ours.step)
    host = _host(bench, ours.step)
    runs = {"adamw": adamw.step, "galore": ours.step, "galore, 8 bit": eight.step, "galore, tf32": _in_tf32(ours.step)}
    times = bench.rivals(runs, 20)
    ours.param_groups[0]["update_proj_gap"] = 1
    due = [bench.seconds(ours.step) for _ in range(2)]  # seconds each, for the largest
    steady, refreshing = statistics.median(times["galore"]), statistics.median(due)
    elements = sum(p.numel() for p in params)
    ratio = median_ratio(times["galore"], times["adamw"])
    row = {
        "model": size, "layers": layers, "matrices": len(params), "elements": elements, "rank": rank,
        "adamw_ms": 1e3 * statistics.median(times["adamw"]), "galore_ms": 1e3 * steady, "host_ms": 1e3 * host,
        "first_ms": 1e3 * first, "refresh_ms": 1e3 * refreshing,
        "over_fused_adamw": ratio, "8bit_over_fused_adamw": median_ratio(times["galore, 8 bit"], times["adamw"]),
        "tf32_over_fused_adamw": median_ratio(times["galore, tf32"], times["adamw"]),
        "amortised_over_fused_adamw": ratio * (1 + max(0.0, refreshing / steady - 1) / GAP),
        "over_adamw_of_22_bytes": steady / (22 * elements / copied),  # float32 moments, at the copy's bandwidth
    }  # fmt: skip
    row["line"] = f"{size:5}{ratio:7.2f} fused AdamW steps, amortised {row['amortised_over_fused_adamw']:.2f}, "
    row["line"] += f"8 bit {row['8bit_over_fused_adamw']:.2f}, tf32 {row['tf32_over_fused_adamw']:.2f}; "
    row["line"] += f"{1e3 * steady:.2f} ms, host {1e3 * host:.2f} ms"
    del adamw, ours, eight, params
    _free(bench)
    return row


def _in_tf32(run: Run) -> Run:
    """With `torch.set_float32_matmul_precision("high")`, by which training loops let tensor cores form products."""

    def step() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        run()
        torch.set_float32_matmul_precision(before)

    return step


def _host(bench: Bench, run: Run, repeats: int = 5) -> float:
    """Seconds until a call returns; what it launched may still run, unless it waited for that."""
    took = []
    for _ in range(repeats):
        if bench.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def _free(bench: Bench) -> None:
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


def graph(bench: Bench) -> Found:
    """The step of the 60M model's projected weights as a CUDA graph, over the bytes it must move."""
    shapes, rank, _ = projected(bench, "60M")
    params, copied = parameters(bench, shapes, torch.bfloat16), copy_bandwidth(bench)
    lr = torch.tensor(1e-4, device=bench.device)
    options: dict[str, Any] = {"rank": rank, "update_proj_gap": NEVER, "stagger": False, "capturable": True}
    optimizer = lowrank_optim.GaLoreAdamW(params, lr=lr, **options)
    for _ in range(3):
        optimizer.step()
    runs: dict[str, Run] = {"eager": optimizer.step}
    if bench.cuda:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            optimizer.step()
        runs |= {"replay": recorded.replay, "prepare and replay": lambda: (optimizer.prepare(), recorded.replay())}
    times = bench.rivals(runs, 30)
    # weights read and written, gradients read, in bfloat16; moments and coordinates of float32, read and written
    state = sum(24 * rank * max(shape) for shape in shapes)
    floor = sum(6 * p.numel() for p in params) + state
    rows = {name: {"ms": 1e3 * statistics.median(took), "over_floor": statistics.median(took) * copied / floor}
            for name, took in times.items()}  # fmt: skip
    lines = [f"60M {name:20}{row['ms']:8.3f} ms, {row['over_floor']:.1f} floors" for name, row in rows.items()]
    return {"floor_bytes": floor, "rows": rows, "lines": lines}


# -- memory, peers, one rank -------------------------------------------------------------------------------------------


def memory(bench: Bench) -> Found:
    """The most bytes of a step beyond what stays, between refreshes and in one, in chunks."""
    shapes, rank, _ = projected(bench, "350M")
    rows = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for make in (lowrank_optim.GaLoreAdamW, lowrank_optim.GaLoreAdamW8bit, lowrank_optim.FiraAdamW):
            params = parameters(bench, shapes, dtype)
            optimizer = make(params, rank=rank, stagger=False, update_proj_gap=NEVER)
            peaks = {"refresh": _peak(bench, optimizer), "steady": _peak(bench, optimizer)}
            rows[f"{make.__name__}, {name}"] = {key: peak / CHUNK_BYTES for key, peak in peaks.items()}
            del params, optimizer
            _free(bench)
    lines = [f"{name:28}{row['steady']:7.2f} chunks, {row['refresh']:.2f} to refresh" for name, row in rows.items()]
    return {
        "chunk_bytes": CHUNK_BYTES,
        "gradient_bytes": sum(2 * s[0] * s[1] for s in shapes),
        "rows": rows,
        "lines": lines,
    }


def _peak(bench: Bench, optimizer: torch.optim.Optimizer) -> int:
    return measure(optimizer.step, optimizer, bench.device, list).whole


def peer(bench: Bench) -> Found:
    """galore-torch, end to end at the 60M model's projected weights, float32: its step and its refresh."""
    try:
        theirs = peers.galore_torch().GaLoreAdamW
    except ImportError:
        return {"lines": ["galore-torch is not installed: left out"]}
    shapes, rank, _ = projected(bench, "60M")
    params = parameters(bench, shapes, torch.float32)
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    ours = lowrank_optim.GaLoreAdamW([dict(group)], lr=1e-4, stagger=False)
    other = theirs([dict(group)], lr=1e-4, no_deprecation_warning=True)
    first = {"ours": bench.seconds(ours.step), "theirs": bench.seconds(other.step)}
    times = bench.rivals({"ours": ours.step, "theirs": other.step}, 10)
    steady = {name: statistics.median(took) for name, took in times.items()}
    amortised = {name: steady[name] + max(0.0, first[name] - steady[name]) / GAP for name in steady}
    ratios = {
        "steady": median_ratio(times["theirs"], times["ours"]),
        "amortised": amortised["theirs"] / amortised["ours"],
    }
    lines = [f"galore-torch takes {ratios['steady']:.1f} times our step, amortised {ratios['amortised']:.1f} times"]
    return {"seconds": {"first": first, "steady": steady, "amortised": amortised}, "ratios": ratios, "lines": lines}


def one_rank(bench: Bench) -> Found:
    """FSDP2 and the hook for DistributedDataParallel in one process: the same weights, and what a step costs."""
    import torch.distributed as dist

    if bench.cuda:
        torch.cuda.set_device(0)
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{os.path.join(folder, 'meet')}"
        dist.init_process_group("nccl" if bench.cuda else "gloo", init_method=meeting, rank=0, world_size=1)
        for name, wrap in {"fsdp2": _sharded, "ddp_project": _hooked}.items():
            found[name] = _beside_plain(bench, wrap)
        dist.destroy_process_group()
    row = "{0}: weights differ by {largest_difference:.1e}, forward, backward and step take {over_plain:.2f} plain ones"
    return found | {"lines": [row.format(name, **one) for name, one in found.items()]}


Wrap = Callable[[Bench, nn.Module, int], "tuple[nn.Module, torch.optim.Optimizer]"]


def _beside_plain(bench: Bench, wrap: Wrap) -> Found:
    hidden, mlp, _, rank = QUICK if bench.quick else SIZES["60M"]
    models: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        blocks = [nn.Linear(*shape, bias=False) for shape in [(hidden, mlp), (mlp, hidden)] * 8]
        models.append(nn.Sequential(*blocks).to(bench.device))
    plain = models[0], lowrank_optim.GaLoreAdamW(models[0].named_parameters(), rank=rank)
    x = bench.randn(16, hidden)

    def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Run:
        def step() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return step

    times = bench.rivals({"plain": step_of(*plain), "wrapped": step_of(*wrap(bench, models[1], rank))}, 10)
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in models[1].parameters()]
    apart = max((p - q).abs().max().item() for p, q in zip(models[0].parameters(), whole, strict=True))
    return {"largest_difference": apart, "over_plain": median_ratio(times["wrapped"], times["plain"])}


def _sharded(bench: Bench, model: nn.Module, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(bench.device.type, (1,))
    for module in [*model.children(), model]:
        fully_shard(module, mesh=mesh)
    return model, lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=rank)


def _hooked(bench: Bench, model: nn.Module, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=rank)
    lowrank_optim.ddp_project(wrapped, optimizer)
    return wrapped, optimizer


SECTIONS: dict[str, Callable[[Bench], Found]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "steps": steps,
    "graph": graph,
    "refresh": refresh,
    "memory": memory,
    "one_rank": one_rank,
    "peer": peer,
}
