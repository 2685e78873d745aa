"""Compiles the project's Triton kernels for GPUs that are not here, and reports on them as on HIP kernels.

Triton's compiler needs no GPU and no driver for that: the target is named, types and constants are given. What it gives
for AMD is assembly text with the same metadata as clang's. Every architecture has its own process, see `workers`.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.runtime.arch import Arch, arch_facts
from sglang_amd_quant.toolchain.compilers import BuildError, NvidiaCompiler, find_compiler
from sglang_amd_quant.toolchain.report import KernelReport, amd_reports, check, instructions, nvidia_reports
from sglang_amd_quant.toolchain.workers import ProcessAborted, Worker


class Variant(Protocol):
    """One specialization of a Triton kernel, as kernels/triton/manifest.py lists them: plain, picklable data."""

    @property
    def name(self) -> str:
        """How the report calls it."""

    @property
    def arch(self) -> str:
        """Target."""

    @property
    def claims(self) -> tuple[str, ...]:
        """What its machine code must show: names of `report.CLAIMS`."""

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""

    @property
    def signature(self) -> dict[str, str]:
        """Triton type of each argument that is no constexpr."""

    @property
    def constants(self) -> dict[str, object]:
        """The constexpr arguments."""

    @property
    def divisible(self) -> tuple[str, ...]:
        """Arguments promised to be multiples of 16."""

    @property
    def short(self) -> tuple[str, ...]:
        """Pointers promised to be to less than 2 GiB, which AMD's buffer instructions can address."""

    @property
    def options(self) -> dict[str, int]:
        """Compile options, `num_warps` among them."""


@dataclass(frozen=True)
class Call:
    """The variant that Triton's launcher would compile for one call of a kernel.

    Attributes:
        module, function: where the kernel is.
        arch, signature, constants, divisible, short, options, claims: as of a `Variant`.
    """

    module: str
    function: str
    arch: str
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: tuple[str, ...]
    short: tuple[str, ...]
    options: dict[str, int]
    claims: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The kernel's, and what tells its variants apart."""
        return ", ".join([self.function, *(f"{k} {v}" for k, v in self.constants.items())])

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""
        return getattr(importlib.import_module(self.module), self.function)


def call(kernel: Any, arch: str, *args: Any, **kwargs: Any) -> tuple[Call, list[Any]]:
    """What `kernel[grid](*args, **kwargs)` would compile on `arch`, and the arguments it would pass on.

    As Triton's launcher does: None and the integer 1 become constants, integers and addresses that are multiples of 16
    are promised to be, keywords that are no argument are compile options.
    """
    options: dict[str, int] = {"num_warps": 4}
    options |= {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
    bound.apply_defaults()
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    divisible, short, passed = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, bound.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            constants[name] = getattr(value, "value", value)
            continue
        passed.append(value)
        signature[name] = _type(value)
        number = value.data_ptr() if hasattr(value, "data_ptr") else value
        if special and not isinstance(number, float) and number % 16 == 0:
            divisible.append(name)
        if hasattr(value, "untyped_storage") and value.untyped_storage().nbytes() < 1 << 31:
            short.append(name)
    module, function = kernel.fn.__module__, kernel.fn.__name__
    made = Call(module, function, arch, signature, constants, tuple(divisible), tuple(short), options)
    return made, passed


_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "float8_e4m3fn": "fp8e4nv"}
_TYPES |= {"float8_e5m2": "fp8e5", "bool": "u1", "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64"}
_TYPES |= {"int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64"}


def _type(value: Any) -> str:
    """Triton's name of an argument's type."""
    if hasattr(value, "data_ptr"):
        return "*" + _TYPES[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


@dataclass(frozen=True)
class Compiled:
    """A Triton kernel's machine code.

    Attributes:
        variant: what was compiled.
        code: the code object or cubin.
        kernel: name of its entry point.
        lds: bytes of dynamic LDS its launch needs.
        threads: threads a block.
        report: static facts and problems; of an NVIDIA kernel that claims nothing, without counts of instructions.
    """

    variant: Variant
    code: bytes
    kernel: str
    lds: int
    threads: int
    report: KernelReport


_workers: dict[str, Worker] = {}


def compile_variant(variant: Variant) -> Compiled:
    """Compile one variant.

    Raises:
        BuildError: Triton cannot compile it.
    """
    return compile_variants([variant])[0]


def compile_variants(wanted: Iterable[Variant]) -> list[Compiled]:
    """Compile variants, those of different architectures at the same time. Raises as `compile_variant`."""
    begun = []
    for variant in wanted:
        worker = _workers.setdefault(variant.arch, Worker())
        begun.append((variant, worker, worker.submit(_compile, variant)))
    made = []
    for variant, worker, future in begun:
        try:
            made.append(worker.result(future))
        except ProcessAborted as aborted:
            raise BuildError(f"{variant.name} for {variant.arch}", str(aborted), _REMEDY) from None
    return made


@atexit.register
def _end_workers() -> None:
    for worker in _workers.values():
        worker.close()


_REMEDY = "see kernels/triton/manifest.py"


def _compile(variant: Variant) -> Compiled:
    """`compile_variant`, in the architecture's process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    arch = arch_facts(variant.arch)
    target = GPUTarget("hip", arch.name, arch.wave) if arch.vendor == "amd" else GPUTarget("cuda", 90, arch.wave)
    names = variant.kernel.arg_names
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for promised, promise in ((variant.divisible, ["tt.divisibility", 16]), (variant.short, ["tt.pointer_range", 32])):
        for n in promised if arch.vendor == "amd" or promise[0] == "tt.divisibility" else ():
            attributes.setdefault((names.index(n),), []).append(list(promise))
    source_of = GluonASTSource if variant.kernel.is_gluon() else ASTSource
    source = source_of(variant.kernel, signature, constexprs=variant.constants, attrs=attributes)
    try:
        made = triton.compile(source, target=target, options=variant.options)
    except Exception as error:  # Triton raises whatever its passes raise
        innermost: BaseException = error  # those around it quote the source, not the reason
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        reason = (str(innermost).strip() or type(innermost).__name__).splitlines()[-1]
        raise BuildError(f"{variant.name} for {arch.name}", reason, _REMEDY) from None
    kernel, lds = made.metadata.name, made.metadata.shared
    if arch.vendor == "amd":
        code, assembly = made.asm["hsaco"], made.asm["amdgcn"]
        report = amd_reports(assembly, arch)[kernel][0]
    else:
        code = made.asm["cubin"]
        assembly, report = _nvidia(code, kernel, arch, disassemble=bool(variant.claims))
    report.kernel, report.lds = variant.name, lds
    waves = variant.options["num_warps"]
    report.threads = waves * arch.wave
    report.occupancy = arch.occupancy(report.vgpr, lds, waves)
    check(report, arch, variant.claims, instructions(assembly, kernel, arch) if assembly else "")
    return Compiled(variant, code, kernel, lds, report.threads, report)


def _nvidia(code: bytes, kernel: str, arch: Arch, disassemble: bool) -> tuple[str, KernelReport]:
    """Disassembly (empty if not wanted: it takes longer than compiling) and report of a cubin: registers and spills are
    in Triton's metadata only after loading, so the disassembler's resource listing is read instead."""
    compiler = find_compiler(arch)
    tool = compiler.cuobjdump if isinstance(compiler, NvidiaCompiler) else _bundled_cuobjdump()
    if tool is None:
        raise UnsupportedError("cuobjdump", "not found on this machine", "put CUDA's nvcc on PATH or set CUDA_HOME")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.cubin"
        file.write_bytes(code)
        wanted = ["-res-usage", *(["-sass"] if disassemble else [])]
        listing = subprocess.run([tool, *wanted, str(file)], capture_output=True, text=True, check=True)
    usage = re.search(rf"Function {re.escape(kernel)}:\s*\n\s*(.*)", listing.stdout)
    facts = dict(re.findall(r"([A-Z]+):(\d+)", usage[1] if usage else ""))
    notes = (
        f"Compiling entry function '{kernel}'\n {facts.get('STACK', 0)} bytes stack frame, "
        f"Used {facts.get('REG', 0)} registers\n"
    )
    return listing.stdout if disassemble else "", nvidia_reports(notes, listing.stdout, arch)[kernel]


def _bundled_cuobjdump() -> str | None:
    from sglang_amd_quant.toolchain.compilers import _cuobjdump

    return _cuobjdump(Path("nvcc"))


def compile_all(archs: Iterable[str]) -> list[Compiled]:
    """Every variant for the archs given.

    Raises:
        UnsupportedError: Triton is not installed.
        BuildError: as `compile_variant`.
    """
    try:
        from sglang_amd_quant.kernels.triton.manifest import variants
    except ImportError as error:
        raise UnsupportedError("Triton", f"cannot be imported ({error})", "pip install triton==3.6.0") from None
    wanted = set(archs)
    return compile_variants(v for v in variants() if v.arch in wanted)
