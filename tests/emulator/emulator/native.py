"""The compiled interpreter: generates the C of the tables, compiles it once, and mirrors its structs."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from . import codegen, instruction
from .errors import EmulatorError

_CORE = Path(__file__).parent / "core"
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-Wl,-Bsymbolic",
    "-w",
)
_ADDRESS = ctypes.c_void_p
_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64

MAX_FINDINGS = 64


class Buffer(ctypes.Structure):
    """`Buffer` of machine.h."""

    _fields_ = [
        ("host", _ADDRESS),
        ("base", _U64),
        ("size", _U64),
        ("initialised", _ADDRESS),
        ("loaded", _ADDRESS),
        ("stored", _ADDRESS),
        ("loaded_bytes", _U64),
        ("stored_bytes", _U64),
    ]


class Finding(ctypes.Structure):
    """`Finding` of machine.h."""

    _fields_ = [
        ("kind", _U32),
        ("instruction", _U32),
        ("lane", _U32),
        ("wave", _U32),
        ("block", _U32 * 3),
        ("bytes", _U32),
        ("other", ctypes.c_int32),
        ("other_wave", _U32),
        ("address", _U64),
        ("count", _U64),
    ]


class Records(ctypes.Structure):
    """`Records` of machine.h."""

    _fields_ = [("written", _ADDRESS), ("read", _ADDRESS), ("reader", _ADDRESS)]


class Machine(ctypes.Structure):
    """`Machine` of machine.h."""

    _fields_ = [
        ("program", _ADDRESS),
        ("executed", _ADDRESS),
        ("instructions", _U32),
        ("entry", _U32),
        ("gfx", _U32),
        ("wave_size", _U32),
        ("code_base", _U64),
        ("buffers", ctypes.POINTER(Buffer)),
        ("buffer_count", _U32),
        ("lds_bytes", _U32),
        ("scratch_bytes", _U32),
        ("lds_banks", _U32),
        ("vgprs", _U32),
        ("lds", _ADDRESS),
        ("words", Records),
        ("bytes", Records),
        ("scratch", _ADDRESS),
        ("waves", _ADDRESS),
        ("grid", _U32 * 3),
        ("block_size", _U32 * 3),
        ("wave_count", _U32),
        ("user_sgprs", _U32),
        ("user_sgpr", _U32 * 32),
        ("workgroup_id_mask", _U32),
        ("checks", _U32),
        ("order", _U32),
        ("record", _U32),
        ("stop", _U32),
        ("seed", _U64),
        ("limit", _U64),
        ("block", _U32 * 3),
        ("epoch", _U32),
        ("first_epoch", _U32),
        ("wave_instructions", _U64),
        ("lds_loaded", _U64),
        ("lds_stored", _U64),
        ("bank_conflicts", _U64),
        ("lds_accesses", _U64),
        ("finding_count", _U32),
        ("finding", Finding * MAX_FINDINGS),
    ]


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "amd-emulator"


def _host_features() -> str:
    """-march=native compiles for this very processor: its features are part of what a cached build is valid for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), os.uname().machine)


def _compiler() -> tuple[str, ...]:
    """$CC, else gcc, cc or clang, else the one in the `ziglang` wheel."""
    if os.environ.get("CC"):
        return tuple(shlex.split(os.environ["CC"]))
    found = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if found is None and importlib.util.find_spec("ziglang"):
        return sys.executable, "-m", "ziglang", "cc"
    return (found or "gcc",)


def _compile(generated: str, header: str, target: Path, compiler: tuple[str, ...]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        Path(folder, "instruction.h").write_text(header)
        Path(folder, "generated.c").write_text(generated)
        sources = [*sorted(map(str, _CORE.glob("*.c"))), str(Path(folder, "generated.c"))]
        library = Path(folder, "emulator.so")
        command = [*compiler, *_FLAGS, f"-I{folder}", f"-I{_CORE}", *sources, "-o", str(library), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise EmulatorError(f"the emulator needs a C compiler: {compiler[0]!r} is not on PATH (set CC)") from None
        except subprocess.CalledProcessError as error:
            raise EmulatorError(f"compiling the interpreter failed:\n{error.stderr}") from None
        os.replace(library, target)  # atomic: another process may be doing the same


@cache
def library() -> ctypes.CDLL:
    """The interpreter, compiled at first use (some 5 s) and kept in the user's cache folder by a hash of its text."""
    generated, header = codegen.generate(), instruction.c_header()
    compiler = _compiler()
    parts = [generated, header, *compiler, *_FLAGS, _host_features()]
    parts += [path.read_text() for path in sorted(_CORE.iterdir()) if path.suffix in (".c", ".h")]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = _cache_folder() / digest / "emulator.so"
    if not target.exists():
        _compile(generated, header, target, compiler)
    native = ctypes.CDLL(str(target))
    for name in ("machine_size", "instruction_size", "wave_bytes", "count_bits"):
        getattr(native, name).restype = _U64
    native.count_bits.argtypes = [_ADDRESS, _U64]
    native.run_grid.argtypes = [ctypes.POINTER(Machine)]
    mirrored = (ctypes.sizeof(Machine), instruction.INSTRUCTION.itemsize)
    if mirrored != (native.machine_size(), native.instruction_size()):
        raise EmulatorError("the structs of native.py and machine.h differ")
    return native
