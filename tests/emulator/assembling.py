"""Small kernels in assembly and HIP, built with clang from the `ziglang` wheel; one instruction over a wave of data."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import ziglang
from emulator import CodeObject, launch

_ZIG = str(Path(ziglang.__file__).parent / "zig")
HIP_FLAGS = ("-x", "hip", "--cuda-device-only", "-nogpulib", "-nogpuinc", "-fdeclspec", "-O3")

# A kernel with `arguments` 8-byte arguments whose address is in s[0:1]; block number in s2, thread number in v0.
_KERNEL = """
.text
.globl {name}
.p2align 8
.type {name},@function
{name}:
{body}
  s_endpgm
.size {name}, .-{name}
.rodata
.p2align 6
.amdhsa_kernel {name}
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_system_sgpr_workgroup_id_x 1
  .amdhsa_kernarg_size {kernarg}
  .amdhsa_group_segment_fixed_size {lds}
  .amdhsa_private_segment_fixed_size {scratch}
  .amdhsa_next_free_vgpr 128
  .amdhsa_next_free_sgpr 96
  .amdhsa_float_denorm_mode_32 3
  {wave}
.end_amdhsa_kernel
"""
_METADATA = """  - .name: {name}
    .symbol: {name}.kd
    .kernarg_segment_size: {kernarg}
    .kernarg_segment_align: 8
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: {scratch}
    .wavefront_size: {wave_size}
    .sgpr_count: 96
    .vgpr_count: 128
    .max_flat_workgroup_size: 1024
    .args:
"""
_ARGUMENT = "      - {{.size: 8, .offset: {offset}, .value_kind: global_buffer, .address_space: global}}\n"


def wave_size(arch: str) -> int:
    return 64 if arch.startswith("gfx9") else 32


def _zig(*command: str) -> None:
    done = subprocess.run([_ZIG, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def _link(assembly: Path, arch: str) -> CodeObject:
    target, linked = assembly.with_suffix(".o"), assembly.with_suffix(".hsaco")
    flags = ("-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", "-x", "assembler")
    _zig("clang", *flags, str(assembly), "-o", str(target))
    _zig("ld.lld", "-shared", "--no-undefined", str(target), "-o", str(linked))
    return CodeObject(linked)


def assemble(bodies: dict[str, str], arch: str, arguments: int = 2, lds: int = 0, scratch: int = 0) -> CodeObject:
    """A code object with one kernel per body."""
    wave = ".amdhsa_accum_offset 128" if arch.startswith("gfx9") else ".amdhsa_wavefront_size32 1"
    common = {"kernarg": 8 * arguments, "lds": lds, "scratch": scratch, "wave_size": wave_size(arch)}
    listed = "".join(_ARGUMENT.format(offset=8 * n) for n in range(arguments))
    text = "".join(_KERNEL.format(name=name, body=body, wave=wave, **common) for name, body in bodies.items())
    entries = "".join(_METADATA.format(name=name, **common) + listed for name in bodies)
    notes = f".amdgpu_metadata\namdhsa.version: [1, 2]\namdhsa.kernels:\n{entries}.end_amdgpu_metadata\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.s")
        source.write_text(text + notes)
        return _link(source, arch)


@cache
def compile_hip(source: str, arch: str, edit: tuple[tuple[str, str], ...] = ()) -> CodeObject:
    """HIP to a code object. `edit`: (old, new) replacements in the assembly between compiler and assembler."""
    with tempfile.TemporaryDirectory() as folder:
        hip, assembly = Path(folder, "kernel.hip"), Path(folder, "kernel.s")
        hip.write_text(source)
        _zig("clang", *HIP_FLAGS, f"--offload-arch={arch}", "-S", str(hip), "-o", str(assembly))
        text = assembly.read_text()
        for old, new in edit:
            if old not in text:
                raise ValueError(f"{old!r} is not in the assembly")
            text = text.replace(old, new)
        assembly.write_text(text)
        return _link(assembly, arch)


# ---- one instruction over a wave ----

_LOAD = """
  s_load_{quad} s[4:7], s[0:1], 0x0
  s_load_{pair} s[8:9], s[0:1], 0x10
  v_lshlrev_b32 v60, 6, v0
  v_lshlrev_b32 v61, 4, v0
  s_waitcnt lgkmcnt(0)
  s_load_{sixteen} s[16:31], s[8:9], 0x0
  global_load_{quad} v[0:3], v60, s[4:5]
  global_load_{quad} v[4:7], v60, s[4:5] offset:16
  global_load_{quad} v[8:11], v60, s[4:5] offset:32
  global_load_{quad} v[12:15], v60, s[4:5] offset:48
  s_waitcnt vmcnt(0) lgkmcnt(0)
"""
_SCALAR_RESULT = """
  s_cselect_b32 s34, 1, 0
  v_mov_b32 v12, s32
  v_mov_b32 v13, s33
  v_mov_b32 v14, s34
"""
_STORE = "\n  global_store_{quad} v61, v[12:15], s[6:7]\n"
_WIDTHS = {
    True: {"pair": "dwordx2", "quad": "dwordx4", "sixteen": "dwordx16"},
    False: {"pair": "b64", "quad": "b128", "sixteen": "b512"},
}
_LETTERS = {"A": 0, "B": 4, "C": 8, "D": 12}  # v0.., v4.., v8.., and the result v12..
_SCALARS = {"P": 16, "Q": 20, "R": 24, "S": 32}  # s16.., s20.., s24.., and the result s32..


def _registers(text: str) -> str:
    """A, B, C, D (vector) and P, Q, R, S (scalar) stand for registers; AA for a pair, AAAA for four."""

    def register(match: re.Match[str]) -> str:
        letter, count = match[1], len(match[0])
        file, first = ("v", _LETTERS[letter]) if letter in _LETTERS else ("s", _SCALARS[letter])
        return f"{file}{first}" if count == 1 else f"{file}[{first}:{first + count - 1}]"

    return re.sub(r"\b([ABCDPQRS])\1*\b", register, text)


class Wave:
    """Operand values of a wave: 16 bytes a lane, seen as whichever type is wanted."""

    def __init__(self, words: np.ndarray):
        self.words = np.ascontiguousarray(words, np.uint32)  # [lanes, 4]

    def view(self, dtype: str) -> np.ndarray:
        return self.words.view(dtype)[:, 0]

    def __getattr__(self, name: str) -> np.ndarray:
        kinds = {"u": "u", "i": "i", "f": "f"}
        return self.view(f"{kinds[name[0]]}{int(name[1:]) // 8}")


def run_instructions(arch: str, texts: list[str], operands: np.ndarray, scalars: np.ndarray) -> list[Wave]:
    """Run each text on the same operands: uint32 [lanes, 4, 4 words] for A, B, C, old D, and uint32 [16] for P, Q, R.

    Returns the result registers D of each; of a text without D: s32, s33, SCC in words 0 to 2 of every lane.
    """
    names = _WIDTHS[arch.startswith("gfx9")]
    bodies = {}
    for number, text in enumerate(texts):
        body = "\n".join("  " + _registers(line) for line in text.split(";"))
        scalar = re.search(r"\bD+\b", text) is None
        bodies[f"case{number}"] = (
            _LOAD.format(**names) + body + (_SCALAR_RESULT if scalar else "") + _STORE.format(**names)
        )
    code = assemble(bodies, arch, arguments=3)
    results = []
    for name in bodies:
        out = np.zeros((operands.shape[0], 4), np.uint32)
        launch(code, name, (1,), (operands.shape[0],), [operands, out, scalars])
        results.append(Wave(out))
    return results
