"""`amd-mx build` and what is under it: incremental builds, errors with file and line, reports, claims."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from sglang_amd_quant.kernels.hip.manifest import AMD_ARCHS, ARCHS, CODE_OBJECTS, CodeObject, EntryPoint, find

from sglang_amd_quant.cli.main import main
from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.runtime.launch import offsets
from sglang_amd_quant.toolchain import compilers
from sglang_amd_quant.toolchain.build import HIP_DIR, Built, build
from sglang_amd_quant.toolchain.compilers import ZIGLANG, AmdCompiler, BuildError, find_compiler, first_error
from sglang_amd_quant.toolchain.report import (
    CLAIMS,
    KernelReport,
    amd_reports,
    check,
    instructions,
    nvidia_reports,
    table,
)

pytest.importorskip("ziglang")

COPY = """#include "memory.h"
KERNEL(256, 1) copy(const Words* from, Words* to, int count, float) {
    const int i = block_index() * 256 + thread_index();
    if (i < count) store_words(to + i, stream_words(from + i));
}
"""
ENTRY = EntryPoint("copy", ("from:ptr", "to:ptr", "count:i32", "unused:f32"))


def build_one(folder: Path, source: str, entry: EntryPoint = ENTRY, arch: str = "gfx950", **options: object) -> Built:
    """Build one source as a code object of its own."""
    (folder / "one.hip").write_text(source)
    made = build(
        [arch], code_objects=(CodeObject("one", "one.hip", (entry,)),), hip_dir=folder, out=folder / "out", **options
    )  # type: ignore[arg-type]
    return made[0]


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    first = build_one(tmp_path, COPY)
    assert not first.cached
    assert first.path.read_bytes()[:4] == b"\x7fELF"
    again = build_one(tmp_path, COPY)
    assert again.cached
    assert again.reports == first.reports
    assert not build_one(tmp_path, COPY, force=True).cached
    assert not build_one(tmp_path, COPY.replace("i < count", "i <= count")).cached
    wider = replace(ENTRY, claims=("wide_loads",))
    assert not build_one(tmp_path, COPY, wider).cached
    first.path.write_bytes(b"damaged")
    assert not build_one(tmp_path, COPY, wider).cached
    for damaged in ("", "[]", "{}"):
        first.path.with_suffix(".json").write_text(damaged)
        assert not build_one(tmp_path, COPY, wider).cached


def test_a_changed_header_recompiles(tmp_path: Path) -> None:
    include = tmp_path / "include"
    include.mkdir()
    for header in (HIP_DIR / "include").glob("*.h"):
        (include / header.name).write_text(header.read_text())
    assert not build_one(tmp_path, COPY).cached
    assert build_one(tmp_path, COPY).cached
    (include / "wave.h").write_text((include / "wave.h").read_text() + "\n")
    assert not build_one(tmp_path, COPY).cached


def test_an_error_names_file_and_line(tmp_path: Path) -> None:
    broken = COPY.replace("i < count", "i < cuont")
    with pytest.raises(BuildError, match=r"one\.hip:4 for gfx950: use of undeclared identifier 'cuont'") as raised:
        build_one(tmp_path, broken)
    assert "cuont" in raised.value.log
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("log", "place", "message"),
    [
        ("a/b.hip:12:5: error: no\n  x\n", "a/b.hip:12", "no"),
        ("In file included from x.hip:1:\ninc/y.h:7:1: fatal error: gone\n", "inc/y.h:7", "gone"),
        (
            'k.hip(31): error: identifier "q" is undefined\n\n1 error detected',
            "k.hip:31",
            'identifier "q" is undefined',
        ),
        ("warning\nld.lld: error: undefined symbol: f\n", "", "warning"),
        ("", "", ""),
    ],
)
def test_first_error_of_clang_and_nvcc(log: str, place: str, message: str) -> None:
    assert first_error(log) == (place, message)


def test_the_manifest_and_the_source_must_agree(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="holds the kernels copy, the manifest says other"):
        build_one(tmp_path, COPY, replace(ENTRY, name="other"))
    for params in (("from:ptr", "to:ptr", "count:i64", "unused:f32"), ENTRY.params[:-1], (*ENTRY.params, "more:i32")):
        with pytest.raises(BuildError, match=r"parameter \d of 4 is not what the manifest says"):
            build_one(tmp_path, COPY, replace(ENTRY, params=params))
    with pytest.raises(BuildError, match="does not exist"):
        build(["gfx950"], code_objects=(CodeObject("none", "none.hip", (ENTRY,)),), hip_dir=tmp_path, out=tmp_path)


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_reports_of_a_known_kernel(tmp_path: Path, arch: str) -> None:
    report = build_one(tmp_path, COPY, replace(ENTRY, claims=("wide_loads",)), arch).reports[0]
    assert report.problems == []
    assert (report.lds, report.scratch, report.spills, report.agpr, report.threads) == (0, 0, 0, 0, 256)
    assert report.loads == report.stores == {16: 1}
    assert report.mix is not None
    assert report.mix["total"] == sum(n for kind, n in report.mix.items() if kind != "total")
    assert report.mix["matrix"] == report.mix["scratch"] == report.mix["lds_read"] == 0
    assert 1 <= report.vgpr <= 16
    assert report.occupancy == arch_facts(arch).waves_per_simd
    assert KernelReport.from_json(json.loads(json.dumps(report.to_json()))) == report


SPILLS = """#include "wave.h"
KERNEL(1024, 1) copy(const float* from, float* to, int count, float) {
    float v[150];
#pragma unroll
    for (int i = 0; i < 150; i++) v[i] = from[i * count + thread_index()];
    block_barrier();
#pragma unroll
    for (int i = 0; i < 150; i++) to[i * count + thread_index()] = v[149 - i] * v[i];
}
"""
BIG_LDS = """#include "wave.h"
__shared__ int buffer[20000];
KERNEL(256, 1) copy(const int* from, int* to, int count, float) {
    for (int i = thread_index(); i < 15000; i += 256) buffer[i] = from[i];
    block_barrier();
    for (int i = thread_index(); i < 15000; i += 256) to[i] = buffer[20000 - 1 - i] + count;
}
"""
SCALED = """#include "matrix.h"
KERNEL(64, 1) copy(const Packed<8>* from, Accumulator* to, int count, float) {
#ifdef __gfx950__
    to[lane_index()] = matrix_mx<MxElement::e2m1, MxElement::e4m3>(from[0], count, from[1], count, to[lane_index()]);
#endif
}
"""


def test_spills_fail_a_build(tmp_path: Path) -> None:
    problems = build_one(tmp_path, SPILLS).reports[0].problems
    assert len(problems) == 1
    assert re.fullmatch(r"spills \d+ registers", problems[0])


def test_lds_over_the_cap_fails_a_build(tmp_path: Path) -> None:
    assert build_one(tmp_path, BIG_LDS, arch="gfx950").reports[0].problems == []  # 160 KiB there
    compiler = find_compiler(arch_facts("gfx942"))
    with pytest.raises(BuildError, match="local memory"):  # clang itself refuses more than an arch has
        build_one(tmp_path, BIG_LDS, arch="gfx942")
    assert compiler is not None
    report = replace(build_one(tmp_path, BIG_LDS).reports[0], arch="gfx942")
    check(report, arch_facts("gfx942"), (), "")
    assert report.problems == ["uses 80000 bytes of LDS, gfx942 has 65536"]


def test_a_broken_claim_fails_a_build(tmp_path: Path) -> None:
    claiming = replace(ENTRY, claims=("scaled_mfma",))
    assert build_one(tmp_path, SCALED, claiming).reports[0].problems == []
    problems = build_one(tmp_path, COPY, claiming).reports[0].problems
    assert problems == ["claims scaled_mfma, but no instruction is v_mfma_scale_f32_"]
    assert build_one(tmp_path, COPY, claiming, "gfx1100").reports[0].problems == []  # says nothing about gfx11


REGISTERS = """#include "wave.h"
template <int N> DEVICE void hold(const float* from, float* to, int count) {
    float v[N];
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = from[i * count + thread_index()];
    block_barrier();
#pragma unroll
    for (int i = 0; i < N; i++) to[i * count + thread_index()] = v[N - 1 - i] * v[i];
}
KERNEL(256, 1) hold20(const float* from, float* to, int count) { hold<20>(from, to, count); }
KERNEL(256, 1) hold70(const float* from, float* to, int count) { hold<70>(from, to, count); }
KERNEL(256, 1) hold130(const float* from, float* to, int count) { hold<130>(from, to, count); }
"""


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_occupancy_is_what_llvm_says(tmp_path: Path, arch: str) -> None:
    facts, compiler = arch_facts(arch), find_compiler(arch_facts(arch))
    assert isinstance(compiler, AmdCompiler)
    (tmp_path / "hold.hip").write_text(REGISTERS)
    assembly = compiler.assembly(tmp_path / "hold.hip", facts, HIP_DIR / "include", (), tmp_path)
    said = [int(o) for o in re.findall(r"^; Occupancy: (\d+)", assembly, re.M)]
    assert [r.occupancy for r, _ in amd_reports(assembly, facts).values()] == said
    assert len(set(said)) > 1


PTXAS = """ptxas info    : Compiling entry function 'copy' for 'sm_90'
ptxas info    : Function properties for copy
    24 bytes stack frame, 20 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem
"""
SASS = """
		Function : copy
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0030*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0040*/                   NOP;
"""


def test_reports_of_nvidia_kernels() -> None:
    arch = arch_facts("sm_90")
    report = nvidia_reports(PTXAS, SASS, arch)["copy"]
    assert (report.vgpr, report.spills, report.scratch, report.lds, report.occupancy) == (64, 20, 24, 512, 8)
    assert (report.loads, report.stores) == ({16: 1}, {2: 1})
    assert report.mix is not None
    assert (report.mix["total"], report.mix["matrix"]) == (4, 1)
    check(report, arch, ("dot_units", "wide_loads", "async_lds"), instructions(SASS, "copy", arch))
    assert report.problems == ["spills 20 bytes", r"claims async_lds, but no instruction is LDGSTS\S*\.128"]
    assert nvidia_reports(PTXAS, "", arch)["copy"].mix is None  # no disassembler
    assert "copy" in table([report])


def test_manifest_is_sound() -> None:
    for arch in ARCHS:  # a name stands for one thing on each target
        held = [c for c in CODE_OBJECTS if arch in c.archs]
        names = [e.name for c in held for e in c.entry_points]
        assert len(names) == len(set(names))
        assert len({c.name for c in held}) == len(held)
    for c in CODE_OBJECTS:
        assert (HIP_DIR / c.source).exists()
        assert set(c.archs) <= set(ARCHS)
        for e in c.entry_points:
            assert set(e.claims) <= set(CLAIMS)
            assert len(offsets(e.types)) == len(e.params)
            assert all(find(e.name, arch) == (c, e) for arch in c.archs)
            assert find(e.name)[1].types == e.types
    with pytest.raises(KeyError):
        find("nothing")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.hip").write_text(COPY)
    small = (CodeObject("one", "one.hip", (replace(ENTRY, claims=("wide_loads",)),)),)
    monkeypatch.setattr("sglang_amd_quant.cli.build.CODE_OBJECTS", small)
    monkeypatch.setattr("sglang_amd_quant.cli.build.HIP_DIR", tmp_path)
    arguments = ["build", "--arch", "gfx942,gfx1100", "--out", str(tmp_path)]
    assert main([*arguments, "--report"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split()[:3] == ["kernel", "arch", "VGPR"]
    assert "2 compiled, 0 up to date" in text
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [o["cached"] for o in data["code_objects"]] == [True] * len(data["code_objects"])
    assert {k["arch"] for k in data["kernels"]} == {"gfx942", "gfx1100"}
    monkeypatch.setitem(CLAIMS, "wide_loads", {"gfx942": "no_such_instruction"})
    assert main([*arguments, "--force"]) == 1
    assert "claims wide_loads" in capsys.readouterr().out
    assert main(["build", "--arch", "gfx90a"]) == 2
    assert "use one of gfx950" in capsys.readouterr().err


def test_a_machine_without_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilers, "_ziglang", lambda: None)
    monkeypatch.setattr(compilers, "_rocm", lambda: None)
    monkeypatch.setattr(compilers, "_nvcc", lambda: None)
    with pytest.raises(UnsupportedError, match=f"pip install ziglang=={ZIGLANG}"):
        build_one(tmp_path, COPY)
    with pytest.raises(UnsupportedError, match="nvcc"):
        build_one(tmp_path, COPY, arch="sm_90")
    with pytest.raises(UnsupportedError, match="ROCM_PATH"):
        build_one(tmp_path, COPY, which="rocm")
    with pytest.raises(UnsupportedError, match="use one of zig, rocm"):
        build_one(tmp_path, COPY, which="gcc")


@pytest.mark.parametrize(
    ("content", "why"), [("#!/bin/sh\nexit 3\n", "exited with 3"), ("no program", "Exec format error")]
)
def test_an_nvcc_that_does_not_run_is_told_in_a_line(
    content: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(content)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    compilers._nvcc.cache_clear()
    with pytest.raises(UnsupportedError, match=rf"{nvcc}: .*{why}; install it anew, or take it off PATH"):
        find_compiler(arch_facts("sm_90"))
    compilers._nvcc.cache_clear()


def test_rocms_compiler_is_taken_where_ziglang_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A ROCm tree whose tools are ziglang's, under ROCm's names."""
    zig = compilers._ziglang()
    assert zig is not None
    tools = tmp_path / "rocm" / "llvm" / "bin"
    tools.mkdir(parents=True)
    for name, command in (("clang", zig.clang), ("ld.lld", zig.lld)):
        (tools / name).write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    compilers._rocm.cache_clear()
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    monkeypatch.setattr(compilers, "_ziglang", lambda: None)
    made = build_one(tmp_path, COPY)
    assert made.compiler.startswith("ROCm clang version")
    assert made.path.read_bytes()[:4] == b"\x7fELF"
    compilers._rocm.cache_clear()


def test_the_pinned_compiler_is_the_build_dependency() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"ziglang=={ZIGLANG}"' in pyproject
    found = find_compiler(arch_facts("gfx950"), "zig")
    assert found is not None
    assert found.identity == f"ziglang {ZIGLANG}"


@pytest.mark.skipif(not os.environ.get("CUDA_HOME") and find_compiler(arch_facts("sm_90")) is None, reason="no nvcc")
def test_nvcc_builds_the_same_source(tmp_path: Path) -> None:
    report = build_one(tmp_path, COPY, replace(ENTRY, claims=("wide_loads",)), "sm_90").reports[0]
    assert report.problems == []
    assert report.vgpr > 0
    broken = COPY.replace("i < count", "i < cuont")
    with pytest.raises(BuildError, match=r"one\.hip:4 for sm_90: identifier \"cuont\" is undefined"):
        build_one(tmp_path, broken, arch="sm_90")
