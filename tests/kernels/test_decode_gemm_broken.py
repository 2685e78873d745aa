"""The decode GEMM broken on purpose: the emulator's checks or the comparison with fp64 find each version."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import decode_problems
import pytest
from decode_problems import Problem, activations, weights

from sglang_amd_quant.toolchain.build import HIP_DIR
from sglang_amd_quant.toolchain.compilers import AmdCompiler, find_compiler

ARCHS = ("gfx950", "gfx942", "gfx1100")
AMD, RACE = "include/decode_amd.h", "no barrier between"
MUTANTS: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    # name: (file, what is there, what is put in its place, what is said of it, where)
    "none": ("decode_gemm.hip", "", "", "right", ARCHS),
    "no barrier after staging": (
        "decode_gemm.hip", "rows);\n    }\n    block_barrier();", "rows);\n    }", RACE, ARCHS
    ),
    "no barrier before summing": (AMD, "block_barrier();\n        owned = rows;", "owned = rows;", RACE, ARCHS),
    "a counter that stays": (AMD, "if (thread_index() == 0) *counter = 0;", "", "counters are not zero again", ARCHS),
    "factors that nobody wrote": (
        AMD, "if (row >= rows.count) *factor_at(row, which) = 0;", "", "never written", ARCHS[1:]
    ),
    "another tile's scales": (AMD, "lane_row() + TILE_ROWS * (word % LANE_GROUPS)", "lane_row()", "wrong", ARCHS),
    "int4": ("decode_gemm.hip", "", "", "right", ARCHS),
    "int4: a zero point that is always 0": ("include/int4.h", "(word & 15) | 0x6400", "0x6400", "wrong", ARCHS),
    "int4: scales beyond K": (
        AMD, "smaller(s.wave_end * SCALE_TILE, row_scales)", "s.wave_end * SCALE_TILE", "out of bounds", ARCHS
    ),
    "int4: a factor of 32 activations for 128": (
        "include/decode_quantize_amd.h", "if constexpr (Blocks == 4)", "if constexpr (Blocks == 5)", "wrong", ARCHS
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_found(target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file, old, new, said, archs = MUTANTS[name]
    if target.arch.name not in archs:
        pytest.skip("not for this target")
    from emulator.errors import KernelFault

    work = tmp_path / "hip"
    shutil.copytree(HIP_DIR, work, ignore=shutil.ignore_patterns("__pycache__"))
    text = (work / file).read_text()
    assert not old or text.count(old) == 1
    (work / file).write_text(text.replace(old, new) if old else text)
    main = (work / "decode_gemm.hip").read_text()  # one entry point will do: the macro's lines without the others
    one = r"\1#define SCHEME(NAME, W, A) DECODE(decode_##NAME##_m4, W, A, 4, MANY, 2, false)\n"
    only = re.sub(r"(#else .*?\n)#define SCHEME.*?(?=#define QUANTIZED)", one, main, count=1, flags=re.S)
    (work / "decode_gemm.hip").write_text(only)
    scheme, define = ("int4_w4a16_g32", "DECODE_INT4_W4A16=1") if "int4" in name else ("mxfp8", "DECODE_MXFP8=1")
    compiler = find_compiler(target.arch)
    assert isinstance(compiler, AmdCompiler)
    binary = compiler.compile(work / "decode_gemm.hip", target.arch, work / "include", (define,), work).binary
    (work / "broken.hsaco").write_bytes(binary)
    monkeypatch.setattr(decode_problems, "code_object", lambda arch, scheme: work / "broken.hsaco")
    problem = Problem(scheme, activations(3, 1120, 1), weights(scheme, (50, 1120), 1))
    plan = next(p for p in problem.plans(target.arch.name) if p.split == 2 and p.waves_k == 2 and p.groups > 1)
    try:
        y, _ = problem.run(target, plan)
        exact, magnitudes = problem.reference()
        outcome = "right" if ((y.double() - exact).abs() <= problem.bound(magnitudes)).all() else "wrong"
    except (KernelFault, AssertionError) as found:
        outcome = str(found)
    assert said in outcome
