"""Native kernels are the reference, only faster; CUDA sources run on the CPU; and loading says what it did."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_optim import GaLoreAdamW, backend_info, ops
from lowrank_optim.ops import cache, native, quantize, reference, schema
from lowrank_optim.ops import compile as build
from tests.support.calls import (
    CALLS,
    DIRECTION,
    copied,
    distinct_positions,
    grid,
    levels,
    sixteenths,
    tensors_of,
    ulps,
)
from tests.support.subprocesses import environment, run

needs_native = pytest.mark.skipif(backend_info()["cpu"].kernels != "native", reason="no native kernels on this machine")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


every_operator = pytest.mark.parametrize("name", CALLS)


def test_every_operator_has_a_call():
    assert CALLS.keys() == schema.OPERATORS.keys()


TRANSFORMS = {torch.float32: 3e-6, torch.float64: 1e-14}  # errors relative to the largest result


def assert_same(name, ours, theirs):
    for (i, x), (_, y) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        if DIRECTION.get(name) == i:
            assert ulps(x, y) <= 8, "torch's square roots are not rounded correctly"
        elif name == "gram_" and i == 0:
            assert x.numel() == 0 or (x - y).abs().max() <= 1e-13 * (1 + y.abs().max()), "sums in another order"
        elif name == "factored_energy_" and i == 0:
            torch.testing.assert_close(x, y, rtol=1e-13, atol=0, msg="sums in another order")
        elif name == "squares_" and i < 2:
            assert torch.allclose(x, y, rtol=1e-14, atol=0), "sums in another order"
        elif "cosine" in name and i == 0 and x.numel():
            least = TRANSFORMS[theirs[1].dtype] * (1 + y.abs().max())
            assert (x - y).abs().max() <= least, "a transform, and products or another transform"
        else:
            assert torch.equal(x, y), f"argument {i} of {name}"


# -- equality ----------------------------------------------------------------------------------------------------------

shapes = st.one_of(
    st.tuples(st.integers(0, 700)),
    st.tuples(st.integers(0, 5), st.integers(0, 300)),
    st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 2000)),
)


@needs_native
@every_operator
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, variant=st.integers(0, 3), misalign=st.booleans())
def test_native_is_the_reference(name, shape, variant, misalign):
    arguments = CALLS[name](shape, variant)
    ours, theirs = copied(arguments, misalign), copied(arguments)
    getattr(torch.ops.lowrank_optim, name).default(*ours)
    getattr(reference, name)(*theirs)
    assert_same(name, ours, theirs)


@pytest.mark.slow
@needs_native
@every_operator
def test_native_is_the_reference_at_sizes_that_threads_share(name):
    torch.set_num_threads(2)
    try:
        for variant in range(4):
            arguments = CALLS[name]((3, 100_003), variant)
            ours, theirs = copied(arguments), copied(arguments)
            getattr(torch.ops.lowrank_optim, name).default(*ours)
            getattr(reference, name)(*theirs)
            assert_same(name, ours, theirs)
    finally:
        torch.set_num_threads(1)


@needs_native
def test_no_tensors_at_all():
    for name in ("projected_adam_list_", "projected_adam_bfloat16_list_", "projected_adam_int8_list_"):
        arguments = [[] if isinstance(x, list) else x for x in CALLS[name]((2,), 0)]
        getattr(torch.ops.lowrank_optim, name).default(*arguments)


@needs_native
def test_known_answers_of_the_native_philox():
    """Of the authors' Random123 library; element -8 begins the last counter, all of whose bits are set."""
    for key, purpose, start, words in (
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, 0xFFFFFFFF, -8, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        out = torch.zeros(8, dtype=torch.int32)
        torch.ops.lowrank_optim.philox_bits16_.default(out, key, purpose, purpose, None, start)
        halves = out.tolist()
        assert tuple(low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)) == words


@needs_native
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_all_floats_near_midpoints(signed):
    for code_map in (quantize.dynamic_map(signed), quantize.four_bit_map(signed), quantize.nf4_map()):
        midpoints = (code_map[1:] + code_map[:-1]) / 2
        near = (midpoints.view(torch.int32)[:, None] + torch.arange(-100, 101, dtype=torch.int32)).view(torch.float32)
        x = torch.cat([near.flatten(), torch.tensor([1.0, -0.0, 1e-45, -1e-38])])
        codes, _ = quantize.quantize_blockwise(x, code_map, len(x))
        assert torch.equal(codes.long(), torch.bucketize(x, midpoints))


@needs_native
def test_blocks_of_zeros_and_of_the_least_numbers():
    x = torch.cat([torch.zeros(64), torch.full((64,), 1e-42), torch.full((64,), -1e-45), torch.zeros(3)])
    for name, call in (
        ("quantize_blockwise_", levels),
        ("quantize_affine_", grid),
        ("quantize_sixteenths_", sixteenths),
    ):
        arguments = call((195,), 2)
        place = {"quantize_blockwise_": 2, "quantize_affine_": 3, "quantize_sixteenths_": 2}[name]
        arguments[place] = x.abs() if name == "quantize_sixteenths_" else x
        ours, theirs = copied(arguments), copied(arguments)
        getattr(torch.ops.lowrank_optim, name).default(*ours)
        getattr(reference, name)(*theirs)
        assert_same(name, ours, theirs)


def test_selections_are_the_first_of_equal_scores():
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([1.0, torch.nan, 0.0, -torch.inf, -0.0, 2.0, 0.0, torch.inf, 1.0], dtype=dtype)
        scores = torch.stack([scores, scores.flip(0)])
        for rank, first, second in (
            (1, [1], [7]),
            (2, [1, 7], [1, 7]),
            (4, [0, 1, 5, 7], [0, 1, 3, 7]),
            (6, [0, 1, 2, 5, 7, 8], [0, 1, 2, 3, 7, 8]),
            (7, [0, 1, 2, 4, 5, 7, 8], [0, 1, 2, 3, 4, 7, 8]),
            (9, list(range(9)), list(range(9))),
        ):
            for select in (torch.ops.lowrank_optim.select_top_.default, reference.select_top_):
                index = torch.zeros(2, rank, dtype=torch.int32)
                select(index, scores)
                assert index.tolist() == [first, second]


ENTRIES = ("add_at_", "gather_at_", "add_sampled_product_")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("positions", [[5, 6, 6], [7, 6], [4, 12], [9, 17], [-1], [5, 30, 6]], ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_positions_that_do_not_ascend_or_are_outside(name, positions, dtype):
    """Of 3 x 4 entries; where they begin at 5, 4 is outside and 12 is not."""
    positions, out, start = torch.tensor(positions, dtype=dtype), torch.ones(len(positions)), 0
    if name == "add_sampled_product_":
        arguments = [out, torch.ones(3, 2), torch.ones(4, 2), positions]
    else:
        out, dense, start = (torch.ones(3, 4), out, 5) if name == "add_at_" else (out, torch.ones(3, 4), 5)
        arguments = [out, positions, dense, start] if name == "add_at_" else [out, dense, positions, start]
    for call in (getattr(torch.ops.lowrank_optim, name).default, getattr(reference, name)):
        message = f"positions must ascend from at least {start} to below {start + 12}, none of them twice"
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
        assert bool((out == 1).all()), "nothing is written"


def test_a_sampled_product_is_the_product():
    left, right = torch.randn(600, 13, dtype=torch.float64), torch.randn(600, 9, dtype=torch.float64)
    positions = distinct_positions(13 * 9, 1)
    expected = (left.mT @ right).flatten()[positions]
    torch.testing.assert_close(ops.sampled_product(left, right, positions), expected, atol=1e-12, rtol=0)
    assert ops.sampled_product(left[:0], right[:0], positions).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_entries_of_all_dtypes(dtype):
    dense, positions = torch.randn(40, 3).to(dtype), distinct_positions(120, 0, 50)
    values = torch.randn(positions.shape).to(dtype)
    before = dense.flatten()[positions - 50]
    assert torch.equal(ops.gather_at(dense, positions, 50), before)
    ops.add_at_(dense, positions, values, 50)
    assert torch.equal(dense.flatten()[positions - 50], before + values)


# -- the dispatcher ----------------------------------------------------------------------------------------------------


@pytest.mark.thin
@pytest.mark.slow
@every_operator
@pytest.mark.parametrize("variant", [0, 3])
def test_opcheck(name, variant):
    torch.library.opcheck(getattr(torch.ops.lowrank_optim, name).default, CALLS[name]((2, 70), variant))


def spoilt(name):
    """Arguments that must be refused: one tensor of another dtype, shape or layout, or a number out of range."""
    good = CALLS[name]((4, 6), 0)

    def with_(place, bad):
        return [*good[:place], bad, *good[place + 1 :]]

    alike = sum(x.shape == (4, 6) for _, x in tensors_of(good))
    for i, x in enumerate(good):
        in_list = isinstance(x, list)
        if in_list:
            yield with_(i, x * 2)
        x = x[0] if in_list else x
        if isinstance(x, torch.Tensor):
            bad = [x.to(torch.int16)]
            if x.shape == (4, 6):
                bad += [x.repeat(1, 2)[:, ::2], *([x[:3].contiguous()] if alike > 1 or "pack" in name else [])]
            yield from (with_(i, [one] if in_list else one) for one in bad)
    if "int8" in name:
        for bad in (0, 257):
            yield with_(9, bad)
        yield with_(1, [torch.zeros(7)])
        yield with_(6, torch.zeros(5, dtype=torch.uint8))
        yield with_(14, torch.zeros(2))
    if name == "gram_":
        yield with_(0, torch.zeros(7, 7, dtype=torch.float64))
        yield with_(1, torch.zeros(6))
    if "factored" in name:
        matrix = 2 if name == "step_factored_" else 1
        yield with_(matrix, torch.zeros(6))
        for place in (matrix + 1, matrix + 2):
            yield with_(place, good[place].mT.contiguous())
            yield with_(place, good[place][0])
    if name == "factored_energy_":
        yield with_(0, torch.zeros(4, dtype=torch.float64))
    if name == "squares_":
        yield with_(0, torch.zeros(6, dtype=torch.float64))
        yield with_(1, torch.zeros(4, dtype=torch.float64))
        yield with_(2, torch.zeros(6))
    if name == "take_scaled_":
        yield with_(2, torch.zeros(4, 6))
        yield with_(2, torch.zeros(6))
        yield [torch.zeros(6), torch.zeros(6), torch.zeros(1), 1.0]
    if name == "fix_signs_":
        yield with_(0, torch.zeros(6))
    if "quantize" in name:
        yield with_([i for i, x in enumerate(good) if type(x) is int][-1], 0)
    if name == "quantize_affine_":
        yield with_(4, 9)


@every_operator
def test_errors_are_the_same_texts(name):
    checked = schema._checked(schema.OPERATORS[name][1], getattr(reference, name))
    for arguments in spoilt(name):
        with pytest.raises(RuntimeError, match=r"must (be|have)") as plain:
            checked(*arguments)
        with pytest.raises(RuntimeError) as ours:
            getattr(torch.ops.lowrank_optim, name).default(*arguments)
        assert str(plain.value) in str(ours.value)


@needs_native
def test_compilers_see_plain_torch():
    """Compilers fuse what is plain; an operator would be a wall."""
    code_map, seen = quantize.nf4_map(), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    codes, absmax = quantize.quantize_blockwise(torch.randn(128), code_map, 64)
    run = torch.compile(lambda: quantize.dequantize_blockwise(codes, absmax, code_map, 64), backend=backend)
    assert torch.equal(run(), quantize.dequantize_blockwise(codes, absmax, code_map, 64))
    assert not any("lowrank_optim" in name for name in seen)


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "coordinates", "ascent"])
def test_a_step_never_writes_to_gradients(kind):
    w = torch.nn.Parameter(torch.randn(24, 40))
    b = torch.nn.Parameter(torch.randn(24))
    optimizer = GaLoreAdamW([w, b], lr=0.01, rank=4, maximize=kind == "ascent")
    for _ in range(3):
        w.grad, b.grad = torch.randn(24, 40), torch.randn(24)
        before = w.grad.clone(), b.grad.clone()
        optimizer.step()
        assert torch.equal(w.grad, before[0])
        assert torch.equal(b.grad, before[1])


# -- CUDA sources, on the CPU and compiled -----------------------------------------------------------------------------

EMULATED = build.Target("emulated", extra=build.asked_flags())


@pytest.fixture(scope="session")
def emulated():
    """torch.ops.lowrank_optim_emulated: the CUDA kernels, run by threads of the host."""
    schema.define("lowrank_optim_emulated")
    folder, _ = cache.build_cached(EMULATED, retry=True)
    torch.ops.load_library(str(build.library_in(folder, EMULATED)))
    return torch.ops.lowrank_optim_emulated


@pytest.mark.slow
@needs_native
@needs_compiler
@pytest.mark.parametrize("name", sorted(CALLS.keys() - schema.CPU_ONLY))
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 167), (1, 2, 1000)])
def test_emulated_cuda_is_the_cpu(emulated, name, shape):
    for variant in range(4):
        arguments = CALLS[name](shape, variant)
        ours, theirs = copied(arguments, misalign=variant == 1), copied(arguments)
        getattr(emulated, name).default(*ours)
        getattr(torch.ops.lowrank_optim, name).default(*theirs)
        for (_, x), (_, y) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert torch.equal(x, y), "to the last bit"


def symbols(library: Path) -> set[str]:
    lines = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in lines.splitlines()}


ALLOWED = {  # all in the headers of torch 2.10, whose stable ABI later versions keep
    "aoti_torch_abi_version", "aoti_torch_create_device_guard", "aoti_torch_delete_device_guard",
    "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object", "aoti_torch_device_type_cpu",
    "aoti_torch_get_current_cuda_stream", "aoti_torch_get_device_index", "aoti_torch_get_device_type",
    "aoti_torch_get_dim", "aoti_torch_get_dtype", "aoti_torch_get_numel", "aoti_torch_get_size",
    "aoti_torch_is_contiguous", "aoti_torch_library_init_impl", "torch_delete_list", "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr", "torch_library_impl", "torch_list_get_item", "torch_list_size", "torch_parallel_for",
}  # fmt: skip


def assert_stable(library: Path) -> None:
    ours = {name for name in symbols(library) if "torch" in name or "c10" in name or "at::" in name}
    extra = {name for name in ours - ALLOWED if not name.startswith("aoti_torch_dtype_")}
    assert not extra, "symbols that other versions of torch may not have"
    assert not {name for name in symbols(library) if name.startswith(("Py", "_Py"))}, "bound to one CPython"


@needs_native
def test_the_cpu_library_is_bound_to_the_stable_abi_only():
    assert_stable(backend_info()["cpu"].path)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_cuda_library_compiles_links_and_registers(tmp_path, monkeypatch):
    """Without a GPU and with a torch that has no CUDA; all architectures, no registers spilled."""
    monkeypatch.setenv("LOWRANK_OPTIM_STRICT", "1")
    target = build.Target("cuda", ("8.0", "9.0", "10.0+PTX"))
    library = build.build(target, tmp_path)
    assert_stable(library)
    code = (
        "import sys, torch; from lowrank_optim.ops import schema; torch.ops.load_library(sys.argv[1]);"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "assert all(has(f'lowrank_optim::{name}', 'CUDA') for name in schema.OPERATORS.keys() - schema.CPU_ONLY)"
    )
    run(code, str(library))


def test_the_nvcc_that_the_environment_names_comes_first(tmp_path, monkeypatch):
    for folder in ("path", "home/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert build._nvcc() == "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build._nvcc() == str(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    assert build._nvcc() == "nvcc"


# -- loading -----------------------------------------------------------------------------------------------------------

SHOW = (
    "import torch, lowrank_optim as l; l.GaLoreAdamW([torch.nn.Parameter(torch.zeros(8, 8))]); print(l.backend_info())"
)


def without_compiler(tmp_path: Path) -> dict[str, str]:
    return {"CXX": str(tmp_path / "none"), "LOWRANK_OPTIM_CACHE": str(tmp_path / "cache")}


def test_importing_loads_nothing():
    said = run("import lowrank_optim; print(lowrank_optim.backend_info())")
    assert said.count("nothing was looked for yet") == 2


def test_off():
    assert "LOWRANK_OPTIM_NATIVE=off" in run(SHOW, LOWRANK_OPTIM_NATIVE="off")


def test_a_mode_that_there_is_not(monkeypatch):
    said = run(SHOW, fails=True, LOWRANK_OPTIM_NATIVE="on")
    assert "LOWRANK_OPTIM_NATIVE must be one of auto, prebuilt, require, off, got 'on'" in said


def test_without_a_compiler_plain_torch_runs_and_says_why(tmp_path):
    said = run(SHOW, **without_compiler(tmp_path))
    assert "cpu  reference" in said
    assert "is not a program" in said


@pytest.mark.slow
def test_require_without_a_compiler(tmp_path):
    said = run(SHOW, fails=True, LOWRANK_OPTIM_NATIVE="require", **without_compiler(tmp_path))
    assert "RuntimeError: LOWRANK_OPTIM_NATIVE=require, and there are no native kernels for cpu" in said


@pytest.mark.slow
def test_prebuilt_never_compiles(tmp_path):
    said = run(SHOW, LOWRANK_OPTIM_NATIVE="prebuilt", LOWRANK_OPTIM_CACHE=str(tmp_path))
    assert "nothing that fits was built before" in said
    assert not list(tmp_path.glob("cpu-*"))


@needs_compiler
@pytest.mark.slow
def test_four_processes_build_once(tmp_path):
    command = [sys.executable, "-c", SHOW]
    kwargs = dict(env=environment(LOWRANK_OPTIM_CACHE=str(tmp_path)), stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, stderr=subprocess.STDOUT, **kwargs) for _ in range(4)]
    said = [process.communicate()[0] for process in processes]
    assert all("cpu  native" in text for text in said), said
    assert sum("built in" in text for text in said) == 1
    assert len(list(tmp_path.glob("cpu-*"))) == 1
    assert "built before" in run(SHOW, LOWRANK_OPTIM_CACHE=str(tmp_path))


@needs_compiler
def test_a_failed_build_is_reported_and_not_retried_at_each_start(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_OPTIM_CACHE", str(tmp_path))
    target = build.Target("cpu", extra=("-no-such-flag",))
    with pytest.raises(build.BuildError, match="no-such-flag"):
        cache.build_cached(target)
    with pytest.raises(build.BuildError, match="an earlier build failed; `python -m"):
        cache.build_cached(target)


def test_a_stale_library_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    target = build.Target("cpu")
    build.library_in(tmp_path, target).write_bytes(b"")
    (tmp_path / "cpu.json").write_text(
        '{"fingerprint": "older", "compiler": "g++", "archs": [], "sha256": "", "size": 0}'
    )
    with pytest.raises(build.BuildError, match="the prebuilt library is stale"):
        native._prebuilt(target)


def test_sources_and_flags_decide_what_is_stale(tmp_path, monkeypatch):
    shutil.copytree(build.sources(), tmp_path / "csrc")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    before = build.Target("cpu").fingerprint()
    assert before == build.Target("cpu").fingerprint() != build.Target("cpu", extra=("-g",)).fingerprint()
    with (tmp_path / "csrc" / "elements.h").open("a") as file:
        file.write("// changed\n")
    assert build.Target("cpu").fingerprint() != before


@pytest.mark.parametrize(
    ("built", "asked", "fits"),
    [
        (("9.0",), "9.0", True),
        (("8.0",), "8.6", True),
        (("8.6",), "8.0", False),
        (("9.0",), "10.0", False),
        (("9.0+PTX",), "10.0", True),
        (("9.0+PTX",), "8.0", False),
    ],
)
def test_which_gpus_code_runs_on(built, asked, fits):
    assert (asked in native._covered(built)) == fits


def test_architectures_that_mean_nothing(monkeypatch):
    monkeypatch.setenv("LOWRANK_OPTIM_CUDA_ARCHS", "hopper")
    with pytest.raises(build.BuildError, match="got 'hopper'"):
        build.asked_archs()
