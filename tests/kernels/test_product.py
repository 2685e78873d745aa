"""Every HIP kernel of the project, for every AMD architecture: no spills, LDS within the cap, claims kept, and no
instruction that the emulator does not know."""

from __future__ import annotations

import pytest
from sglang_amd_quant.kernels.hip.manifest import AMD_ARCHS, CODE_OBJECTS, CodeObject

from sglang_amd_quant.toolchain.build import build

pytest.importorskip("ziglang")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")

EVERYTHING = [(c, arch) for c in CODE_OBJECTS for arch in AMD_ARCHS if arch in c.archs]


@pytest.mark.parametrize(("code_object", "arch"), EVERYTHING, ids=[f"{c.name}-{arch}" for c, arch in EVERYTHING])
def test_a_code_object(code_object: CodeObject, arch: str) -> None:
    from emulator.code_object import CodeObject as Loaded
    from emulator.decode import decode

    (built,) = build([arch], code_objects=(code_object,))
    assert {r.kernel: r.problems for r in built.reports} == {e.name: [] for e in code_object.entry_points}
    loaded = Loaded(built.path)
    assert loaded.kernels.keys() == {e.name for e in code_object.entry_points}
    for kernel in loaded.kernels.values():
        decode(kernel.code, kernel.address, arch, kernel.wave_size)
