"""The MXFP4 GEMV on every target: against fp64, against its own plan, and against deliberately broken versions of
itself."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_amd_quant.kernels.hip import manifest

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.runtime.gemv_mxfp4 import gemv_mxfp4, lds_bytes, plan, plans, tile
from sglang_amd_quant.toolchain.build import HIP_DIR, INCLUDE_DIR, build
from sglang_amd_quant.toolchain.compilers import AmdCompiler, find_compiler

CU_COUNT = 4  # a small GPU, so that blocks take several tiles


@pytest.fixture(scope="session")
def code_objects() -> Any:
    """Where a target's code object is, brought up to date first."""

    @cache
    def get(arch: str, kernel: str) -> Path:
        (built,) = build([arch], code_objects=(manifest.find(kernel)[0],))
        assert [r.problems for r in built.reports] == [[]] * len(built.reports)
        return built.path

    return lambda target, kernel: get(target.arch.name, kernel)


def bf16(x: np.ndarray) -> np.ndarray:
    """Round to bf16, as bits."""
    return torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def wide(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as fp64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def dequantize(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """fp64 weights by torchao's reading of e2m1 and e8m0."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    data, scale = torch.from_numpy(w), torch.from_numpy(scales).view(torch.float8_e8m0fnu)
    return mx.to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.float64).numpy()


def problem(m: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """x [m, k] bf16 bits, w, scales, bias bf16 bits."""
    rng = np.random.default_rng(seed)
    x = bf16(rng.standard_normal((m, k)) * np.exp2(rng.integers(-6, 7, (m, k))))
    w = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    scales = rng.integers(112, 128, (n, k // 32), dtype=np.uint8)
    return x, w, scales, bf16(rng.standard_normal(n))


def assert_close(y: np.ndarray, x: np.ndarray, w: np.ndarray, scales: np.ndarray, bias: np.ndarray | None) -> None:
    """Within what fp32 accumulation over K terms may lose, plus one rounding to bf16 where y is bf16."""
    weights, activations = dequantize(w, scales), wide(x)
    added = 0 if bias is None else wide(bias)
    exact = activations @ weights.T + added
    magnitude = np.abs(activations) @ np.abs(weights).T + np.abs(added)
    bound = x.shape[1] * 2.0**-23 * magnitude
    found = y.astype(np.float64)
    if y.dtype == np.uint16:
        found, bound = wide(y), bound + 2.0**-8 * np.abs(exact)
    assert np.isfinite(found).all()
    assert (np.abs(found - exact) <= bound).all(), np.max(np.abs(found - exact) / bound)


def launch(
    target: Any, code_objects: Any, arrays: tuple, out: Any = np.float32, *, rank: int = 0, **options: Any
) -> Any:
    """Run the GEMV with the plan of that rank. Returns (y, counters)."""
    x, w, scales, bias = arrays
    y = (
        np.full((x.shape[0], w.shape[0]), np.float32(np.nan))
        if out == np.float32
        else np.full((x.shape[0], w.shape[0]), 0x7FC0, out)
    )
    chosen = plans(*x.shape[:1], w.shape[0], x.shape[1], target.arch.name, CU_COUNT)[rank]
    d = gemv_mxfp4(x, w, scales, y, arch=target.arch.name, cu_count=CU_COUNT, bias=bias, chosen=chosen)
    return y, target.run(code_objects(target, d.kernel), d, **options)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 32), (1, 37, 2080), (2, 33, 768), (3, 19, 2880), (4, 40, 4096), (1, 64, 6144), (4, 9, 14336)],
)
def test_agrees_with_fp64_and_loads_each_weight_once(target: Any, code_objects: Any, m: int, n: int, k: int) -> None:
    arrays = problem(m, n, k, seed=n)
    y, counters = launch(target, code_objects, arrays)
    assert_close(y, *arrays)
    if counters is not None:
        for argument, bytes_ in ((1, n * k // 2), (2, n * k // 32)):
            traffic = counters.traffic[argument]
            assert traffic.loaded == traffic.loaded_distinct == bytes_
        stored = counters.traffic[4]
        assert stored.stored == stored.stored_distinct == 4 * m * n


def test_every_kind_of_plan_gives_the_same_bits_up_to_summation_order(target: Any, code_objects: Any) -> None:
    arrays = problem(3, 50, 1056)
    found = plans(3, 50, 1056, target.arch.name, CU_COUNT)
    kinds = {(p.waves_k, p.waves_n, p.slab): rank for rank, p in enumerate(found)}
    for rank in list(kinds.values())[:: max(1, len(kinds) // 6)]:
        assert_close(launch(target, code_objects, arrays, rank=rank)[0], *arrays)


def test_bf16_output_without_bias_from_padded_rows(target: Any, code_objects: Any) -> None:
    x, w, scales, _ = problem(2, 21, 320)
    padded = np.full((2, 336), 0x7FC0, np.uint16)  # NaN between the rows
    padded[:, :320] = x
    y = np.full((2, 21), 0x7FC0, np.uint16)
    d = gemv_mxfp4(padded[:, :320], w, scales, y, arch=target.arch.name, cu_count=CU_COUNT)
    whole = tuple(padded if isinstance(a, np.ndarray) and a.base is padded else a for a in d.args)  # emulated memory
    target.run(code_objects(target, d.kernel), type(d)(d.kernel, d.grid, d.block, whole, d.lds))
    assert_close(y, x, w, scales, None)


@pytest.mark.parametrize("m", [1, 4])
def test_the_result_does_not_depend_on_the_order_of_waves(target: Any, code_objects: Any, m: int) -> None:
    if target.arch.vendor != "amd":
        pytest.skip("the emulator chooses the order")
    from emulator.launch import IN_ORDER, REVERSED, random_schedule

    arrays = problem(m, 23, 1600)
    first = launch(target, code_objects, arrays, schedule=IN_ORDER)[0]
    for schedule in (REVERSED, random_schedule(1), random_schedule(2)):
        np.testing.assert_array_equal(launch(target, code_objects, arrays, schedule=schedule)[0], first)


def test_scales_at_the_ends_of_their_range(target: Any, code_objects: Any) -> None:
    x, w, scales, bias = problem(1, 16, 256)
    scales[:] = np.linspace(0, 230, scales.size).astype(np.uint8).reshape(scales.shape)
    scales[5, 3] = 255
    y, _ = launch(target, code_objects, (x, w, scales, bias))
    assert np.isnan(y[0, 5])
    rows = np.arange(16) != 5
    assert_close(y[:, rows], x, w[rows], scales[rows], bias[rows])


def test_infinite_and_widely_spread_activations(target: Any, code_objects: Any) -> None:
    x, w, scales, bias = problem(1, 8, 64)
    x[0, :32] = bf16(np.exp2(np.arange(32) * 3.0 - 60))  # 93 binades in one block
    y, _ = launch(target, code_objects, (x, w, scales, bias))
    assert_close(y, x, w, scales, bias)
    x[0, 7], w[:, 3] = bf16(np.array([np.inf]))[0], 0x2A  # k = 6 is -1, k = 7 is +1
    y, _ = launch(target, code_objects, (x, w, scales, bias))
    assert (y == np.inf).all()


# ---- plans: no target needed


@settings(max_examples=200)
@given(
    st.integers(1, 4),
    st.integers(1, 40000),
    st.integers(1, 1000).map(lambda b: 32 * b),
    st.sampled_from(manifest.ARCHS),
    st.integers(1, 304),
)
def test_every_plan_fits_the_device(m: int, n: int, k: int, arch: str, cu_count: int) -> None:
    facts = arch_facts(arch)
    for p in plans(m, n, k, arch, cu_count):
        rows, blocks_a_step = tile(facts, p.kernel_m)
        assert m <= p.kernel_m
        assert p.threads == p.waves_k * p.waves_n * facts.wave <= (512 if facts.vendor == "amd" else 384)
        assert p.lds == lds_bytes(facts, p.kernel_m, p.slab, p.waves_k * p.waves_n) <= facts.lds_bytes
        assert p.slab % (p.waves_k * blocks_a_step) == 0
        assert 1 <= p.grid <= -(-n // (rows * p.waves_n))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 32), (5, 8, 32), (1, 0, 32), (1, 8, 0), (1, 8, 48)])
def test_problems_outside_the_contract(m: int, n: int, k: int) -> None:
    with pytest.raises(ShapeError, match="use the GEMM"):
        plan(m, n, k, "gfx950", 256)


@pytest.mark.parametrize("broken", ["w", "scales", "y", "x"])
def test_shapes_that_do_not_fit_each_other(broken: str) -> None:
    x, w, scales, _ = problem(2, 8, 64)
    arrays = {"x": x, "w": w, "scales": scales, "y": np.zeros((2, 8), np.float32)}
    arrays[broken] = np.zeros((2, 60), np.uint16)[:, :52] if broken == "x" else arrays[broken][:, :-1]
    with pytest.raises(ShapeError):
        gemv_mxfp4(**arrays, arch="gfx950", cu_count=256)


# ---- broken versions: what the emulator's checks are for

SOURCE = (HIP_DIR / "gemv_mxfp4.hip").read_text()
MUTANTS: dict[str, tuple[str, str, str, str]] = {
    # name: (file, what is there, what is put in its place, what must be found)
    "no barrier after staging": ("gemv_mxfp4.hip", "    stage(0);\n    block_barrier();", "    stage(0);", "lds race"),
    "no barrier before summing up": (
        "gemv_mxfp4.hip",
        "        });\n        block_barrier();",
        "        });",
        "lds race",
    ),
    "rows beyond the last are loaded": (
        "gemv_mxfp4.hip",
        "if (Dot::chunk_row(c) < rows_left && ",
        "if (",
        "out of bounds",
    ),
    "blocks beyond the last are loaded": (
        "gemv_mxfp4.hip",
        "if (Dot::chunk_row(c) < rows_left && block + Dot::lane_block() + Dot::chunk_block(c) < blocks)",
        "",
        "out of bounds",
    ),
    "partial sums are read before they are written": (
        "gemv_mxfp4.hip",
        "slice < waves_k; slice++",
        "slice <= waves_k; slice++",
        "uninitialised",
    ),
    "swapped scale bytes": (
        "include/mx_dot.h",
        "scale_of(int dot) { return dot / M; }",
        "scale_of(int dot) { return 1 - dot / M; }",
        "wrong",
    ),
}
WAITS = {"weights": "vmcnt", "activations in LDS": "lgkmcnt"}


def mutate(source: dict[str, str], file: str, old: str, new: str) -> dict[str, str]:
    """Replace the one place where `old` stands."""
    assert source[file].count(old) == 1, (file, old)
    return source | {file: source[file].replace(old, new)}


def compile_only_one(source: dict[str, str], compiler: AmdCompiler, target: Any, work: Path) -> str:
    """Assembly of the M = 1, fp32 entry point of a version of the sources."""
    lines = [
        line
        for line in source["gemv_mxfp4.hip"].splitlines()
        if not re.match(r"GEMV\(gemv_mxfp4_(bf16|f32_m[24])", line)
    ]
    (work / "include").mkdir(parents=True, exist_ok=True)
    for name, text in source.items():
        (work / name).write_text("\n".join(lines) if name == "gemv_mxfp4.hip" else text)
    return compiler.assembly(work / "gemv_mxfp4.hip", target.arch, work / "include", (), work)


def first_wait(assembly: str, counter: str) -> str:
    """Drop the last wait on `counter` before the first multiplication."""
    before, product, after = assembly.partition("dot2")
    lines = before.splitlines()
    at = max(i for i, line in enumerate(lines) if re.match(rf"\s*s_wait\w*\s.*{counter}", line))
    return "\n".join(lines[:at] + lines[at + 1 :]) + product + after


@pytest.fixture
def original() -> dict[str, str]:
    """The sources by name."""
    return {"gemv_mxfp4.hip": SOURCE} | {f"include/{f.name}": f.read_text() for f in INCLUDE_DIR.glob("*.h")}


def outcome(target: Any, code: bytes, checks: Any) -> set[str]:
    """What running a version shows: the kinds of its findings, or else whether its result is `right` or `wrong`."""
    from emulator.errors import KernelFault

    arrays = problem(1, 21, 6176)  # several steps a wave, a last one that is not full, and rows that do not fill a tile
    y = np.full((1, 21), np.float32(np.nan))
    chosen = next(p for p in plans(1, 21, 6176, target.arch.name, 1) if p.waves_k in (2, 3))
    d = gemv_mxfp4(*arrays[:3], y, arch=target.arch.name, cu_count=1, bias=arrays[3], chosen=chosen)
    try:
        target.run(code, d, checks=checks)
    except KernelFault as fault:
        return {f.kind.name.lower().replace("_", " ") for f in fault.findings}
    try:
        assert_close(y, *arrays)
    except AssertionError:
        return {"wrong"}
    return {"right"}


@pytest.mark.parametrize("name", [*MUTANTS, *(f"no wait for {what}" for what in WAITS)])
def test_broken_versions_are_caught(target: Any, original: dict[str, str], tmp_path: Path, name: str) -> None:
    """With the checks on each is found, by name; with them off, all but the wrong arithmetic pass unseen."""
    if target.arch.vendor != "amd":
        pytest.skip("the emulator finds them")
    from emulator.findings import Checks

    compiler = find_compiler(target.arch)
    assert isinstance(compiler, AmdCompiler)
    if name in MUTANTS:
        file, old, new, expected = MUTANTS[name]
        assembly = compile_only_one(mutate(original, file, old, new), compiler, target, tmp_path)
    else:
        what = name.removeprefix("no wait for ")
        assembly, expected = (
            first_wait(compile_only_one(original, compiler, target, tmp_path), WAITS[what]),
            "missing wait",
        )
    code = compiler.assemble(assembly, tmp_path / "gemv_mxfp4.hip", target.arch, tmp_path)
    assert expected in outcome(target, code, Checks.ALL)
    if expected != "wrong":
        assert outcome(target, code, Checks.NONE) <= {"right", "wrong"}


def test_the_unbroken_version_has_no_findings(target: Any, original: dict[str, str], tmp_path: Path) -> None:
    """The mutants' own way of building and running finds nothing in the real source."""
    if target.arch.vendor != "amd":
        pytest.skip("the emulator finds them")
    from emulator.findings import Checks

    compiler = find_compiler(target.arch)
    assert isinstance(compiler, AmdCompiler)
    assembly = compile_only_one(original, compiler, target, tmp_path)
    code = compiler.assemble(assembly, tmp_path / "gemv_mxfp4.hip", target.arch, tmp_path)
    assert outcome(target, code, Checks.ALL) == {"right"}
