"""Finds the compilers of this machine and knows how to call them.

AMD targets need nothing but clang and lld with an AMDGPU back end, device only and without HIP's headers. Those come
with the `ziglang` wheel (a build dependency, pinned: the code objects a wheel ships are the ones that were tested) or
with ROCm. The way goes over assembly text, because that is also what the resource report reads. sm_90 needs CUDA's
nvcc.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sglang_amd_quant.errors import AmdMxError, UnsupportedError
from sglang_amd_quant.runtime.arch import Arch

ZIGLANG = "0.17.0"
"""The pinned version (clang 22.1.8), the same as in pyproject.toml; 0.14.1 and older know no gfx950."""


class BuildError(AmdMxError, RuntimeError):
    """A source that does not compile, or machine code that is not what the manifest says.

    Attributes:
        log: everything the compiler said.
    """

    log = ""


@dataclass(frozen=True)
class Output:
    """What compiling one source for one arch gave.

    Attributes:
        binary: the code object (.hsaco) or cubin.
        assembly: AMD: the compiler's assembly; NVIDIA: the disassembly, empty without cuobjdump.
        notes: NVIDIA: what ptxas said of resources.
    """

    binary: bytes
    assembly: str
    notes: str = ""


@dataclass(frozen=True)
class AmdCompiler:
    """clang and lld.

    Attributes:
        identity: name and version; part of what makes a code object out of date.
        clang: the command.
        lld: the command.
    """

    identity: str
    clang: tuple[str, ...]
    lld: tuple[str, ...]

    def compile(self, source: Path, arch: Arch, include: Path, defines: tuple[str, ...], work: Path) -> Output:
        """Compile one source into `work`.

        Raises:
            BuildError: the source does not compile.
        """
        assembly = self.assembly(source, arch, include, defines, work)
        return Output(self.assemble(assembly, source, arch, work), assembly)

    def assembly(self, source: Path, arch: Arch, include: Path, defines: tuple[str, ...], work: Path) -> str:
        """The assembly text of one source. Raises BuildError."""
        text = work / f"{source.stem}.s"
        flags = ["-x", "hip", "-std=c++17", "-O3", f"--offload-arch={arch.name}", "-Wall", "-Wextra"]
        flags += ["--cuda-device-only", "-nogpulib", "-nogpuinc", f"-I{include}", *(f"-D{d}" for d in defines)]
        run([*self.clang, *flags, "-S", str(source), "-o", str(text)], source, arch)
        return text.read_text()

    def assemble(self, assembly: str, source: Path, arch: Arch, work: Path) -> bytes:
        """The code object of an assembly text. Raises BuildError."""
        text, part, whole = (work / f"{source.stem}.{kind}" for kind in ("in.s", "o", "hsaco"))
        text.write_text(assembly)
        target = ["-target", "amdgcn-amd-amdhsa", f"-mcpu={arch.name}"]
        run([*self.clang, *target, "-c", "-x", "assembler", str(text), "-o", str(part)], source, arch)
        run([*self.lld, "-shared", "--no-undefined", str(part), "-o", str(whole)], source, arch)
        return whole.read_bytes()


@dataclass(frozen=True)
class NvidiaCompiler:
    """nvcc, and cuobjdump where there is one.

    Attributes:
        identity: name and version.
        nvcc: path.
        cuobjdump: path, or None: then there is no instruction mix.
    """

    identity: str
    nvcc: str
    cuobjdump: str | None

    def compile(self, source: Path, arch: Arch, include: Path, defines: tuple[str, ...], work: Path) -> Output:
        """Compile one source into `work`.

        Raises:
            BuildError: the source does not compile.
        """
        cubin = work / f"{source.stem}.cubin"
        digits = arch.name.removeprefix("sm_")
        target = f"-gencode=arch=compute_{digits}a,code=sm_{digits}a"  # "a": wgmma is no part of plain sm_90
        flags = ["-x", "cu", "-std=c++17", "-O3", target, "-cubin", "-Xptxas", "-v"]
        flags += [f"-I{include}", *(f"-D{d}" for d in defines)]
        notes = run([self.nvcc, *flags, str(source), "-o", str(cubin)], source, arch)
        sass = run([self.cuobjdump, "-sass", str(cubin)], source, arch) if self.cuobjdump else ""
        return Output(cubin.read_bytes(), sass, notes)


def run(command: list[str], source: Path, arch: Arch) -> str:
    """Run one compiler step. Returns what it printed.

    Raises:
        BuildError: it failed; names the first file and line that the compiler blames.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(
            f"{source.name} for {arch.name}", f"cannot run {command[0]}: {error}", "see `amd-mx doctor`"
        ) from None
    if done.returncode:
        place, reason = first_error(done.stdout)
        where = f"{place} for {arch.name}" if place else f"{source.name} for {arch.name}"
        failure = BuildError(
            where, reason or f"{Path(command[0]).name} exited with {done.returncode}", "see the compiler's output"
        )
        failure.log = done.stdout
        raise failure
    return done.stdout


def first_error(log: str) -> tuple[str, str]:
    """(file:line, message) of the first error in the output of clang (`f:1:2: error: m`) or nvcc (`f(1): error: m`)."""
    found = re.search(
        r"^(?P<file>[^\s:(][^:(\n]*)[:(](?P<line>\d+)[^\n]*?\berror\b[^:\n]*: (?P<message>[^\n]*)", log, re.M
    )
    if found is None:
        return "", log.strip().splitlines()[0] if log.strip() else ""
    return f"{found['file']}:{found['line']}", found["message"].strip()


def find_compiler(arch: Arch, which: str | None = None) -> AmdCompiler | NvidiaCompiler | None:
    """The compiler for an arch, or None if this machine has none.

    Args:
        which: for AMD targets, `zig` or `rocm` to insist on one; None takes ziglang if there, else ROCm. The
            environment variable AMD_MX_HIP_COMPILER does the same.

    Raises:
        UnsupportedError: the one insisted on is not there.
    """
    if arch.vendor == "nvidia":
        return _nvcc()
    which = which or os.environ.get("AMD_MX_HIP_COMPILER")
    finders = {"zig": _ziglang, "rocm": _rocm}
    if which is None:
        return _ziglang() or _rocm()
    if which not in finders:
        raise UnsupportedError(f"HIP compiler {which!r}", "unknown", f"use one of {', '.join(finders)}")
    found = finders[which]()
    if found is None:
        remedy = f"pip install ziglang=={ZIGLANG}" if which == "zig" else "install ROCm or set ROCM_PATH"
        raise UnsupportedError(f"HIP compiler {which!r}", "not found on this machine", remedy)
    return found


@lru_cache(maxsize=1)
def _ziglang() -> AmdCompiler | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    zig = str(Path(spec.origin).parent / ("zig.exe" if sys.platform == "win32" else "zig"))
    version = _output([zig, "version"]).strip()
    return AmdCompiler(f"ziglang {version}", (zig, "clang"), (zig, "ld.lld"))


@lru_cache(maxsize=1)
def _rocm() -> AmdCompiler | None:
    hipcc = shutil.which("hipcc")
    roots = [os.environ.get("ROCM_PATH"), str(Path(hipcc).resolve().parents[1]) if hipcc else None, "/opt/rocm"]
    for root in filter(None, roots):
        tools = Path(root) / "llvm" / "bin"
        if (tools / "clang").exists() and (tools / "ld.lld").exists():
            version = _output([str(tools / "clang"), "--version"]).splitlines()[0]
            return AmdCompiler(f"ROCm {version}", (str(tools / "clang"),), (str(tools / "ld.lld"),))
    return None


@lru_cache(maxsize=1)
def _nvcc() -> NvidiaCompiler | None:
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (shutil.which("nvcc", path=f"{root}/bin") if root else None) or shutil.which("nvcc")
    if nvcc is None:
        return None
    release = re.search(r"V([\d.]+)", _output([nvcc, "--version"]))
    return NvidiaCompiler(f"nvcc {release[1] if release else 'unknown'}", nvcc, _cuobjdump(Path(nvcc)))


def _cuobjdump(nvcc: Path) -> str | None:
    triton = importlib.util.find_spec("triton")
    places = [nvcc.parent / "cuobjdump", nvcc.resolve().parent / "cuobjdump"]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(p) for p in places if p.exists()), shutil.which("cuobjdump"))


def _output(command: list[str]) -> str:
    """What a compiler says of itself.

    Raises:
        UnsupportedError: it does not run.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        why = error.strerror or str(error)
    except subprocess.CalledProcessError as error:
        why = f"`{' '.join(command[1:])}` exited with {error.returncode}"
    raise UnsupportedError(f"compiler {command[0]}", why, "install it anew, or take it off PATH")
