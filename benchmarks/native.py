"""What native kernels gain: `python -m benchmarks.native [--rounds 15]`.

On one thread, in its CPU time, each kernel beside plain torch (`ops/reference/`) in turns; ratios are taken round by
round and their median is reported. The state kernel also beside torch's own fused AdamW, per element; on moments in few
bits beside the kernels that open them, update them and write them back; and on a few elements, for what a call costs.
Steps of whole optimizers are taken in two processes, with `LOWRANK_OPTIM_NATIVE` on and off, beside fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import lowrank_optim
from benchmarks import record
from lowrank_optim import ops
from lowrank_optim.ops import native, quantize, reference

N = 128 * 4096
STEPS: dict[str, dict[str, Any]] = {
    "GaLoreAdamW": {},
    "GaLoreAdamW, bfloat16 state": {"state_dtype": "bfloat16"},
    "GaLoreAdamW8bit": {"state_dtype": "int8"},
    "GaLoreAdamW, int4 state": {"state_dtype": "int4"},
}
Run = Callable[[], Any]


def kernels() -> dict[str, tuple[Run, Run]]:
    """name -> (native, plain)."""
    key, stream = ops.key_of(0, "w"), ops.stream_of("test", 1)
    numbers = ops.philox.numbers_of(key, stream)
    x, noise, codes = torch.randn(N), torch.rand(N), torch.empty(N, dtype=torch.uint8)
    scale, low, out = torch.empty(N // 256), torch.empty(N // 256), torch.empty(N)
    bits, half = torch.empty(N, dtype=torch.int32), torch.empty(N, dtype=torch.bfloat16)
    fours, half_bytes = torch.randint(16, (N,), dtype=torch.uint8), torch.empty(N // 2, dtype=torch.uint8)
    levels = quantize.dynamic_map(True)
    table = quantize._nearest_table(levels)
    m, v, r = torch.randn(N), torch.rand(N), torch.randn(N)
    arguments: dict[str, tuple[Any, ...]] = {
        "projected_adam_": (m, v, r, 0.9, 0.999, 1e-8, 10.0),
        "quantize_blockwise_": (codes, scale, x, levels, *table, 256, True),
        "quantize_blockwise_ with noise": (codes, scale, x, levels, *table, 256, True, noise),
        "dequantize_blockwise_": (out, codes, scale, levels, 256),
        "quantize_affine_": (codes, scale, low, x, 4, 256),
        "quantize_sixteenths_ with noise": (codes, scale, v, 256, noise),
        "dequantize_affine_": (out, codes, scale, low, 256),
        "pack4_": (half_bytes, fours),
        "unpack4_": (fours, half_bytes),
        "philox_bits16_": (bits, *numbers),
        "philox_noise16_": (out, *numbers),
        "philox_uniform_": (out, *numbers),
        "philox_normal_": (out, *numbers),
        "round_to_bfloat16_": (half, x, *numbers),
    }
    pairs = {}
    for name, inputs in arguments.items():
        operator = name.split()[0]
        fast, plain = getattr(torch.ops.lowrank_optim, operator).default, getattr(reference, operator)
        pairs[name] = (lambda f=fast, a=inputs: f(*a)), (lambda f=plain, a=inputs: f(*a))
    return pairs


RULE = (0.9, 0.999, 1e-8, 10.0)


def few_bits() -> dict[str, tuple[Run, Run]]:
    """name -> (one pass over moments as they are stored, the same in five)."""
    key, stream = ops.key_of(0, "w"), ops.stream_of("exp_avg", 1)
    (signed, purpose, now, _), second = ops.philox.numbers_of(key, stream), ops.stream_of("exp_avg_sq", 1)
    lists = torch.ops.lowrank_optim.projected_adam_bfloat16_list_.default
    m, v, r = torch.randn(N).bfloat16(), torch.rand(N).bfloat16(), torch.randn(N)

    def opened_bfloat16() -> None:
        wide, wide_sq = m.float(), v.float()
        torch.ops.lowrank_optim.projected_adam_.default(wide, wide_sq, r, *RULE)
        m.copy_(ops.round_to_bfloat16(wide, key, stream))
        v.copy_(ops.round_to_bfloat16(wide_sq, key, second))

    codes, codes_sq = (torch.randint(1, 256, (N,), dtype=torch.uint8) for _ in range(2))
    peak, peak_sq = torch.randn(N // 256), torch.rand(N // 256)
    levels, levels_sq = quantize.dynamic_levels(True), quantize.dynamic_levels(False)
    eight = torch.ops.lowrank_optim.projected_adam_int8_list_.default

    def opened_int8() -> None:
        stored = (codes, peak, levels[0]), (codes_sq, peak_sq, levels_sq[0])
        wide = [quantize.dequantize_blockwise(code, top, table, 256) for code, top, table in stored]
        torch.ops.lowrank_optim.projected_adam_.default(*wide, r, *RULE)
        for (code, top, table), x in zip(stored, wide, strict=True):
            fresh, numbers = quantize.quantize_blockwise(x, table, 256, signed_peak=True)
            code.copy_(fresh)
            top.copy_(numbers)
        codes_sq.clamp_(min=1)

    noise = [signed], purpose, second[0], now, None, [0]
    tensors = [codes], [peak], [codes_sq], [peak_sq], [r]
    return {
        "bfloat16": (lambda: lists([m], [v], [r], *RULE, None, *noise), opened_bfloat16),
        "int8": (lambda: eight(*tensors, *levels, *levels_sq, 256, *RULE), opened_int8),
    }


def calls() -> dict[str, float]:
    """Microseconds of a call on eight elements, and of each tensor more in one of the three lists."""
    tensors = [[torch.rand(8) for _ in range(65)] for _ in range(3)]
    one, many = torch.ops.lowrank_optim.projected_adam_.default, torch.ops.lowrank_optim.projected_adam_list_.default
    few = [some[:1] for some in tensors]
    runs: list[Run] = [
        lambda: one(*(some[0] for some in tensors), *RULE),
        lambda: many(*few, *RULE),
        lambda: many(*tensors, *RULE),
    ]
    taken = [min(seconds(lambda run=run: [run() for _ in range(200)]) for _ in range(15)) / 200 for run in runs]
    return {"call_us": 1e6 * taken[0], "list_us": 1e6 * taken[1], "per_tensor_us": 1e6 * (taken[2] - taken[1]) / 192}


def eager(m: torch.Tensor, v: torch.Tensor, r: torch.Tensor) -> None:
    """Adam's direction in the fewest operations of torch."""
    m.lerp_(r, 0.1)
    v.mul_(0.999).addcmul_(r, r, value=0.001)
    denominator = torch.sqrt(v).mul_((1 - 0.999**10) ** -0.5).add_(1e-8)
    torch.div(m, denominator, out=r).mul_(1 / (1 - 0.9**10))


def fused_adamw() -> Run:
    """torch's, over as many elements."""
    w, g, m, v, step = torch.zeros(N), torch.randn(N), torch.zeros(N), torch.ones(N), torch.tensor(10.0)
    options = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    return lambda: torch._fused_adamw_([w], [g], [m], [v], [], [step], **options)


def seconds(run: Run) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def compared(first: Run, second: Run, rounds: int) -> dict[str, float]:
    """Milliseconds of the first, and the second over the first."""
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds + 2)][2:]
    ratio = statistics.median(b / a for a, b in pairs)
    return {"ms": 1e3 * statistics.median(a for a, _ in pairs), "ratio": ratio}


def steps(rounds: int) -> dict[str, Any]:
    """Whole steps over those of fused AdamW: two blocks of LLaMA-60M at rank 128, and 8M elements of an embedding."""
    shapes = [(512, 512)] * 8 + [(1376, 512)] * 4 + [(512, 1376)] * 2

    def contestant(make: Any, embedded: bool, **options: Any) -> Run:
        matrices = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
        table = [torch.nn.Parameter(torch.randn(16000, 512) * 0.02)]
        ours = make is lowrank_optim.GaLoreAdamW
        groups = [dict(params=matrices, **({"rank": 128, "update_proj_gap": 10**6} if ours else {}))]
        if embedded:
            groups.append(dict(params=table, **({"rank": None} if ours else {})))
        for p in matrices + table:
            p.grad = torch.randn_like(p)
        return make(groups, lr=1e-3, **options).step

    found = {}
    for embedded in (False, True):
        adamw = contestant(torch.optim.AdamW, embedded, fused=True)
        for name, options in STEPS.items():
            ours = contestant(lowrank_optim.GaLoreAdamW, embedded, **options)
            ratio = compared(adamw, ours, rounds)["ratio"]
            found[name + (", with an embedding" if embedded else "")] = ratio
    return found


def steps_with(mode: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.native", "--steps-only", "--rounds", str(rounds)]
    done = subprocess.run(command, env={**os.environ, "LOWRANK_OPTIM_NATIVE": mode}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.steps_only:
        print(json.dumps(steps(arguments.rounds)))
        return
    native.load()
    if lowrank_optim.backend_info()["cpu"].kernels != "native":
        sys.exit(f"there is nothing to compare:\n{lowrank_optim.backend_info()}")
    load = os.getloadavg()[0]
    found: dict[str, Any] = {"load_at_start": load, "elements": N, "plain_over_native": {}}
    for name, (fast, plain) in kernels().items():
        row = compared(fast, plain, arguments.rounds)
        found["plain_over_native"][name] = {"native_ns_per_element": row["ms"] * 1e6 / N, "ratio": row["ratio"]}
        print(f"{name:32} {row['ms'] * 1e6 / N:6.2f} ns per element, plain torch takes {row['ratio']:.1f} times that")
    normal = kernels()["philox_normal_"][0]
    found["normal_over_philox_normal"] = compared(normal, torch.empty(N).normal_, arguments.rounds)["ratio"]
    print(f"torch.Tensor.normal_ takes {found['normal_over_philox_normal']:.2f} times philox_normal_")
    found["state_kernel_over_fused_adamw"] = compared(fused_adamw(), kernels()["projected_adam_"][0], arguments.rounds)
    print(f"the state kernel takes {found['state_kernel_over_fused_adamw']['ratio']:.2f} of fused AdamW per element")
    m, v, r = torch.randn(N), torch.rand(N), torch.randn(N)
    kernel = kernels()["projected_adam_"][0]
    found["fewest_operations_over_state_kernel"] = compared(kernel, lambda: eager(m, v, r), arguments.rounds)["ratio"]
    print(f"the fewest operations of torch take {found['fewest_operations_over_state_kernel']:.1f} times that")
    found["opened_over_one_pass"] = {}
    for name, (fast, opened) in few_bits().items():
        row = compared(fast, opened, arguments.rounds)
        found["opened_over_one_pass"][name] = {"ns_per_element": row["ms"] * 1e6 / N, "ratio": row["ratio"]}
        print(f"{name:32} {row['ms'] * 1e6 / N:6.2f} ns per element, opened moments take {row['ratio']:.1f} times that")
    found["calls"] = calls()
    print(", ".join(f"{name} {value:.2f}" for name, value in found["calls"].items()))
    both = {mode: steps_with(mode, arguments.rounds) for mode in ("require", "off")}
    found["step_over_fused_adamw"] = {
        name: {"native": both["require"][name], "plain": both["off"][name]} for name in both["off"]
    }
    for name, row in found["step_over_fused_adamw"].items():
        print(f"{name:48} {row['native']:5.1f} fused AdamW steps, with plain torch {row['plain']:5.1f}")
    record.write("native", found)


if __name__ == "__main__":
    main()
