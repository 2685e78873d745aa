"""Compiles what `kernels/hip/manifest.py` lists: incremental by content, in parallel, with a resource report a
kernel."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.kernels.hip.manifest import CODE_OBJECTS, CodeObject, EntryPoint
from sglang_amd_quant.runtime.arch import Arch, arch_facts
from sglang_amd_quant.runtime.code_objects import CODE_OBJECT_DIR, code_object_path
from sglang_amd_quant.runtime.launch import offsets
from sglang_amd_quant.toolchain.compilers import ZIGLANG, AmdCompiler, BuildError, NvidiaCompiler, find_compiler
from sglang_amd_quant.toolchain.report import Argument, KernelReport, amd_reports, check, instructions, nvidia_reports

HIP_DIR = CODE_OBJECT_DIR.parent / "hip"
INCLUDE_DIR = HIP_DIR / "include"


@dataclass(frozen=True)
class Built:
    """One code object for one arch.

    Attributes:
        code_object: what it was made from.
        arch: target.
        path: file.
        reports: one an entry point, in the manifest's order.
        compiler: name and version of the compiler that made it.
        cached: it was up to date already.
    """

    code_object: CodeObject
    arch: Arch
    path: Path
    reports: list[KernelReport]
    compiler: str
    cached: bool


def available_archs(archs: Iterable[str], which: str | None = None) -> list[str]:
    """Those of `archs` that this machine has a compiler for."""
    return [a for a in archs if find_compiler(arch_facts(a), which) is not None]


def build(
    archs: Iterable[str],
    *,
    code_objects: tuple[CodeObject, ...] = CODE_OBJECTS,
    hip_dir: Path = HIP_DIR,
    out: Path = CODE_OBJECT_DIR,
    reuse: Path | None = None,
    which: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> list[Built]:
    """Bring the code objects of `archs` up to date.

    Args:
        archs: targets.
        code_objects: what to compile.
        hip_dir: where their sources are.
        out: folder to write to: `<arch>/<name>.hsaco` or `.cubin`, and `.json` beside it.
        reuse: folder of an earlier build; what is up to date there is copied.
        which: HIP compiler to insist on (`zig`, `rocm`).
        jobs: compilers at a time; default one a CPU.
        force: compile also what is up to date.
        progress: called after each code object.

    Returns:
        What was built, in the order of the manifest and then of `archs`. Reports may hold problems.

    Raises:
        BuildError: a source does not compile, or does not hold the manifest's entry points; the first of them if
            several.
        UnsupportedError: no compiler for an arch.
    """
    units = []
    for name in archs:
        arch = arch_facts(name)
        compiler = find_compiler(arch, which)
        if compiler is None:
            remedy = (
                f"pip install ziglang=={ZIGLANG}"
                if arch.vendor == "amd"
                else "put CUDA's nvcc on PATH or set CUDA_HOME"
            )
            raise UnsupportedError(f"arch {name}", "no compiler for it on this machine", remedy)
        units += [(c, arch, compiler) for c in code_objects if name in c.archs]
    order = {c.name: i for i, c in enumerate(code_objects)}
    units.sort(key=lambda unit: order[unit[0].name])
    with ThreadPoolExecutor(max_workers=jobs or os.cpu_count()) as pool:
        futures = [pool.submit(_build_one, *unit, hip_dir, out, reuse, force) for unit in units]
        try:
            for done in as_completed(futures):
                done.result()
                progress()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [f.result() for f in futures]


def _build_one(
    code_object: CodeObject,
    arch: Arch,
    compiler: AmdCompiler | NvidiaCompiler,
    hip_dir: Path,
    out: Path,
    reuse: Path | None,
    force: bool,
) -> Built:
    source = hip_dir / code_object.source
    if not source.exists():
        raise BuildError(f"{code_object.name} for {arch.name}", f"{source} does not exist", "correct the manifest")
    include = hip_dir / "include" if (hip_dir / "include").is_dir() else INCLUDE_DIR
    path = code_object_path(code_object.name, arch, out)
    key = _key(code_object, source, include, compiler.identity)
    for folder in () if force else (out, *([reuse] if reuse else [])):
        kept = _up_to_date(code_object_path(code_object.name, arch, folder), key)
        if kept is not None:
            binary, facts = kept
            if folder != out:
                _write_both(path, binary, facts)
            reports = [KernelReport.from_json(r) for r in facts["reports"]]
            return Built(code_object, arch, path, reports, compiler.identity, cached=True)
    with tempfile.TemporaryDirectory() as work:
        output = compiler.compile(source, arch, include, code_object.defines, Path(work))
    if arch.vendor == "amd":
        found = amd_reports(output.assembly, arch)
    else:
        found = {name: (r, []) for name, r in nvidia_reports(output.notes, output.assembly, arch).items()}
    expected = {e.name for e in code_object.entry_points}
    if found.keys() != expected:
        raise BuildError(
            f"{code_object.source} for {arch.name}",
            f"holds the kernels {', '.join(sorted(found)) or 'none'}, the manifest says {', '.join(sorted(expected))}",
            "make source and manifest agree",
        )
    reports = []
    for entry_point in code_object.entry_points:
        report, arguments = found[entry_point.name]
        if arch.vendor == "amd":
            _check_arguments(code_object, arch, entry_point, arguments)
        check(report, arch, entry_point.claims, instructions(output.assembly, entry_point.name, arch))
        reports.append(report)
    facts = {"key": key, "sha256": hashlib.sha256(output.binary).hexdigest(), "compiler": compiler.identity}
    facts |= {"code_object": code_object.name, "arch": arch.name, "reports": [r.to_json() for r in reports]}
    _write_both(path, output.binary, facts)
    return Built(code_object, arch, path, reports, compiler.identity, cached=False)


def _key(code_object: CodeObject, source: Path, include: Path, compiler: str) -> str:
    """Changes when anything does that the code object or its report depends on."""
    digest = hashlib.sha256(repr((compiler, code_object)).encode())
    toolchain = sorted(Path(__file__).parent.glob("*.py"))  # how it is compiled and what is reported: flags, claims
    for file in [source, *sorted(include.glob("*.h")), *toolchain]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _up_to_date(path: Path, key: str) -> tuple[bytes, dict[str, Any]] | None:
    """A code object and its record, if both are there, belong together and were made from what `key` stands for."""
    record = path.with_suffix(".json")
    if not path.exists() or not record.exists():
        return None
    binary = path.read_bytes()
    try:
        facts = json.loads(record.read_text())
        fresh = facts["key"] == key and facts["sha256"] == hashlib.sha256(binary).hexdigest()
    except (ValueError, KeyError, TypeError):  # cut or garbled: it is made anew
        return None
    return (binary, facts) if fresh else None


def _write_both(path: Path, binary: bytes, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, binary)
    _write(path.with_suffix(".json"), json.dumps(facts, indent=1).encode())


def _check_arguments(code_object: CodeObject, arch: Arch, entry_point: EntryPoint, stated: list[Argument]) -> None:
    """The manifest's signature must pack to what the code object reads."""
    types = entry_point.types
    packed = [Argument(o, s, t == "ptr") for (o, s), t in zip(offsets(types), types, strict=True)]
    if packed != stated:
        place = next(
            (i for i, (a, b) in enumerate(zip(packed, stated, strict=False)) if a != b), min(len(packed), len(stated))
        )
        raise BuildError(
            f"{code_object.source}, {entry_point.name} for {arch.name}",
            f"parameter {place} of {len(stated)} is not what the manifest says",
            "make the parameters in kernels/hip/manifest.py those of the source",
        )


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step: another process may be reading it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(name, 0o644)
    os.replace(name, path)
