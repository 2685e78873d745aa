"""What machine code costs and which instructions it has: static facts, read from the assembly and its metadata."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from sglang_amd_quant.runtime.arch import Arch

CLAIMS: dict[str, dict[str, str]] = {
    "scaled_mfma": {"gfx950": r"v_mfma_scale_f32_"},
    "matrix": {"gfx9": r"v_mfma_", "gfx11": r"v_wmma_", "sm_90": r"(HMMA|QMMA|HGMMA|QGMMA)\b"},
    "dot_units": {"gfx9": r"v_(dot2|mfma)", "gfx11": r"v_(dual_)?(dot2|wmma)", "sm_90": r"H?G?MMA\b"},
    "wide_loads": {
        "gfx9": r"(global|buffer)_load_dwordx4",
        "gfx11": r"(global|buffer)_load_b128",
        "sm_90": r"LDG\S*\.128",
    },
    "async_lds": {"gfx950": r"(global_load_lds_dwordx4|buffer_load_dwordx4\b.*\blds)", "sm_90": r"LDGSTS\S*\.128"},
}
"""Claim -> arch prefix -> what at least one instruction must match. An arch that no prefix fits makes no such claim."""

_CLASSES: dict[str, dict[str, str]] = {
    "amd": {
        "matrix": r"v_(mfma|wmma|smfmac|swmmac)",
        "async_copy": r"(global_load_lds|buffer_load_\w+\b.*\blds$)",
        "global_load": r"(global|buffer|flat)_load",
        "global_store": r"(global|buffer|flat)_store",
        "atomic": r"(global|buffer|flat|ds)_(atomic|add|cmpst|max|min)",
        "scratch": r"scratch_",
        "lds_permute": r"ds_(bpermute|permute|swizzle)",
        "lds_read": r"ds_(read|load)",
        "lds_write": r"ds_(write|store)",
        "barrier": r"s_barrier",
        "wait": r"s_wait",
        "vector": r"v_",
        "scalar": r"s_",
    },
    "nvidia": {
        "matrix": r"(HMMA|IMMA|QMMA|BMMA|DMMA|HGMMA|IGMMA|QGMMA)\b",
        "async_copy": r"(LDGSTS|UBLKCP|UTMALDG)",
        "global_load": r"LDG?\b",
        "global_store": r"STG?\b",
        "atomic": r"(ATOM|RED\b|REDG|ATOMS)",
        "scratch": r"(LDL|STL)\b",
        "lds_permute": r"SHFL",
        "lds_read": r"(LDS|LDSM)\b",
        "lds_write": r"(STS|STSM)\b",
        "barrier": r"BAR\b",
        "wait": r"(DEPBAR|LDGDEPBAR|NANOSLEEP)",
        "scalar": r"(U[A-Z0-9]+|R2UR|S2UR)\b",
        "vector": r"",
    },
}
"""Instruction classes by vendor; the first that matches an instruction counts it."""

_WIDTHS = {
    "ubyte": 1,
    "sbyte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "byte": 1,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
}
_WIDTHS |= {
    "dwordx4": 16,
    "u8": 1,
    "i8": 1,
    "u16": 2,
    "i16": 2,
    "b8": 1,
    "b16": 2,
    "b32": 4,
    "b64": 8,
    "b96": 12,
    "b128": 16,
}


@dataclass
class KernelReport:
    """Static facts about one entry point on one arch.

    Attributes:
        kernel: entry point.
        arch: target.
        vgpr: vector registers a lane (NVIDIA: registers a thread); on gfx9 accumulation registers included.
        agpr: those of them that are accumulation registers.
        sgpr: scalar registers a wave; None for NVIDIA.
        lds: bytes of static LDS a block; dynamic LDS comes on top at launch.
        scratch: bytes of private memory a lane.
        spills: registers spilled to scratch, vector and scalar (NVIDIA: bytes stored by spills).
        threads: the most threads a block may have.
        occupancy: waves a SIMD holds, as registers and static LDS allow.
        code: bytes of machine code.
        mix: instructions by class; None if no disassembler was there.
        loads: global loads by bytes a lane; None likewise.
        stores: global stores by bytes a lane; None likewise.
        problems: what makes the build fail.
    """

    kernel: str
    arch: str
    vgpr: int
    agpr: int
    sgpr: int | None
    lds: int
    scratch: int
    spills: int
    threads: int
    occupancy: int
    code: int
    mix: dict[str, int] | None = None
    loads: dict[int, int] | None = None
    stores: dict[int, int] | None = None
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain data; widths become strings."""
        data = asdict(self)
        for key in ("loads", "stores"):
            data[key] = data[key] and {str(width): n for width, n in sorted(data[key].items())}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelReport:
        """The inverse of `to_json`."""
        widths = {k: data[k] and {int(w): n for w, n in data[k].items()} for k in ("loads", "stores")}
        return cls(**(data | widths))


@dataclass(frozen=True)
class Argument:
    """An explicit kernel argument as the code object states it: byte offset, bytes, and whether it is a global
    pointer."""

    offset: int
    size: int
    pointer: bool


def amd_reports(assembly: str, arch: Arch) -> dict[str, tuple[KernelReport, list[Argument]]]:
    """Reports and explicit arguments of every kernel in an AMD assembly text (clang's or Triton's)."""
    result = {}
    for name, text in _amd_metadata(assembly).items():
        body = _amd_body(assembly, name)
        vgpr, lds, threads = (
            _number(r"^    \.vgpr_count:\s+(\d+)", text),
            _number(r"^    \.group_segment_fixed_size:\s+(\d+)", text),
            _number(r"^    \.max_flat_workgroup_size:\s+(\d+)", text),
        )
        report = KernelReport(
            kernel=name,
            arch=arch.name,
            vgpr=vgpr,
            agpr=_number(r"^    \.agpr_count:\s+(\d+)", text),
            sgpr=_number(r"^    \.sgpr_count:\s+(\d+)", text),
            lds=lds,
            scratch=_number(r"^    \.private_segment_fixed_size:\s+(\d+)", text),
            spills=_number(r"^    \.vgpr_spill_count:\s+(\d+)", text)
            + _number(r"^    \.sgpr_spill_count:\s+(\d+)", text),
            threads=threads,
            occupancy=arch.occupancy(vgpr, lds, max(1, threads // arch.wave)),
            code=_number(rf"^\s*\.size\s+{re.escape(name)},.*?codeLenInByte = (\d+)", assembly),
        )
        _count(report, body, arch)
        result[name] = report, _amd_arguments(text)
    return result


def _number(pattern: str, text: str) -> int:
    """The number that the pattern's group finds, 0 if there is none."""
    found = re.search(pattern, text, re.M | re.S)
    return int(found[1]) if found else 0


def _amd_metadata(assembly: str) -> dict[str, str]:
    """The YAML of each kernel in the text's `amdhsa.kernels` list."""
    found = re.search(r"^amdhsa\.kernels:\n(.*?)^\S", assembly, re.M | re.S)
    kernels = {}
    for item in re.split(r"^  - ", found[1] if found else "", flags=re.M)[1:]:
        text = "    " + item  # the first key stands behind the dash
        name = re.search(r"^    \.name:\s+(\S+)", text, re.M)
        if name:
            kernels[name[1].strip("'\"")] = text
    return kernels


def _amd_arguments(metadata: str) -> list[Argument]:
    found = re.search(r"^    \.args:\n(.*?)(?=^    \.|\Z)", metadata, re.M | re.S)
    arguments = []
    for item in re.split(r"^      - ", found[1] if found else "", flags=re.M)[1:]:
        values = dict(re.findall(r"\.(\w+):\s+(\S+)", item))
        if not values["value_kind"].startswith("hidden_"):
            arguments.append(
                Argument(int(values["offset"]), int(values["size"]), values["value_kind"] == "global_buffer")
            )
    return arguments


def _amd_body(assembly: str, name: str) -> list[str]:
    found = re.search(rf"^{re.escape(name)}:.*?\n(.*?)^\s*(?:\.section|\.Lfunc_end)", assembly, re.M | re.S)
    lines = (line.split(";")[0].strip() for line in (found[1] if found else "").splitlines())
    return [line for line in lines if re.match(r"[a-z]\w+(\s|$)", line) and not line.endswith(":")]


def nvidia_reports(notes: str, sass: str, arch: Arch) -> dict[str, KernelReport]:
    """Reports of every kernel from ptxas's verbose output and the disassembly (which may be empty)."""
    result = {}
    for part in re.split(r"Compiling entry function '", notes)[1:]:
        name = part.partition("'")[0]
        registers, lds = _number(r"Used (\d+) registers", part), _number(r"(\d+) bytes smem", part)
        body = _sass_body(sass, name)
        result[name] = report = KernelReport(
            kernel=name,
            arch=arch.name,
            vgpr=registers,
            agpr=0,
            sgpr=None,
            lds=lds,
            scratch=_number(r"(\d+) bytes stack frame", part),
            spills=_number(r"(\d+) bytes spill stores", part),
            threads=1024,
            occupancy=arch.occupancy(registers, lds, 1024 // arch.wave),
            code=16 * len(body),
        )
        if body:
            _count(report, body, arch)
    return result


def _sass_body(sass: str, name: str) -> list[str]:
    found = re.search(rf"Function : {re.escape(name)}\n(.*?)(?=Function : |\Z)", sass, re.S)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", found[1] if found else "")
    return [line for line in lines if not line.startswith("NOP")]


def _count(report: KernelReport, body: list[str], arch: Arch) -> None:
    classes = {name: re.compile(pattern) for name, pattern in _CLASSES[arch.vendor].items()}
    mix: Counter[str] = Counter(dict.fromkeys(classes, 0))
    widths: dict[str, Counter[int]] = {"global_load": Counter(), "global_store": Counter()}
    for instruction in body:
        kind = next((name for name, pattern in classes.items() if pattern.match(instruction)), "vector")
        mix[kind] += 1
        if kind in widths:
            widths[kind][_width(instruction)] += 1
    report.mix = {"total": len(body), **mix}
    report.loads, report.stores = dict(widths["global_load"]), dict(widths["global_store"])


def _width(instruction: str) -> int:
    """Bytes a lane that a global load or store moves."""
    opcode = instruction.split()[0]
    if opcode[0].isupper():
        size = re.search(r"\.(128|64|U?16|U8|S8|S16)\b", opcode)
        return 4 if size is None else int(size[1].lstrip("US")) // 8
    return _WIDTHS[re.sub(r"_(d16(_hi)?|format_\w+)", "", opcode).split("_")[-1]]


def check(report: KernelReport, arch: Arch, claims: tuple[str, ...], body: str) -> None:
    """Put into `report.problems` what must fail a build: spills, LDS over the cap, claims that the code does not keep.

    Args:
        body: the instructions, one a line; empty if there was no disassembler, then claims are not checked.
    """
    if report.spills:
        report.problems.append(
            f"spills {report.spills} registers" if arch.vendor == "amd" else f"spills {report.spills} bytes"
        )
    elif report.scratch:
        report.problems.append(f"uses {report.scratch} bytes of scratch a lane")
    if report.lds > arch.lds_bytes:
        report.problems.append(f"uses {report.lds} bytes of LDS, {arch.name} has {arch.lds_bytes}")
    for claim in claims:
        for prefix, pattern in CLAIMS[claim].items():
            if body and arch.name.startswith(prefix) and not re.search(pattern, body, re.M):
                report.problems.append(f"claims {claim}, but no instruction is {pattern}")


def instructions(assembly: str, kernel: str, arch: Arch) -> str:
    """The instructions of one kernel, one a line, from AMD assembly or a disassembled cubin."""
    return "\n".join(_amd_body(assembly, kernel) if arch.vendor == "amd" else _sass_body(assembly, kernel))


def table(reports: list[KernelReport]) -> str:
    """The reports as aligned text; all figures are static."""
    head = ["kernel", "arch", "VGPR", "AGPR", "SGPR", "LDS", "scratch", "spills", "occupancy", "code", "matrix"]
    head += ["load16", "load8", "load<=4", "store", "LDSread", "LDSwrite", "async", "wait", "problems"]
    rows = [head]
    for r in reports:
        fixed = [r.vgpr, r.agpr, r.sgpr, r.lds, r.scratch, r.spills, r.occupancy, r.code]
        counted: list[int | None] = [None] * 9
        if r.mix is not None and r.loads is not None:
            narrow = sum(n for width, n in r.loads.items() if width <= 4)
            counted = [r.mix["matrix"], r.loads.get(16, 0), r.loads.get(8, 0), narrow, r.mix["global_store"]]
            counted += [r.mix["lds_read"], r.mix["lds_write"], r.mix["async_copy"], r.mix["wait"]]
        figures = ["n/a" if c is None else str(c) for c in (*fixed, *counted)]
        rows.append([r.kernel, r.arch, *figures, "; ".join(r.problems) or "none"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = (0, 1, len(head) - 1)
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
