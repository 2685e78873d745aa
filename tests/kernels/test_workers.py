"""One compiling process an architecture: an abort is an exception, and what was compiled for one architecture does not
change what is compiled for another."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from sglang_amd_quant.cli.main import main
from sglang_amd_quant.toolchain import triton_aot
from sglang_amd_quant.toolchain.compilers import BuildError
from sglang_amd_quant.toolchain.workers import ProcessAborted, Worker


def abort_saying(text: str) -> None:
    """As LLVM ends a process."""
    os.write(2, text.encode())
    ctypes.CDLL(None).abort()


def test_an_abort_is_an_exception_and_the_next_call_is_answered() -> None:
    worker = Worker()
    assert worker.result(worker.submit(max, 3, 4)) == 4
    with pytest.raises(ProcessAborted, match="^LLVM ERROR: cannot select$"):
        worker.result(worker.submit(abort_saying, "note\nLLVM ERROR: cannot select\nStack dump:\n"))
    assert worker.result(worker.submit(max, 5, 4)) == 5
    with pytest.raises(ProcessAborted, match="without a word"):
        worker.result(worker.submit(os._exit, 3))
    with pytest.raises(ValueError, match="arg is an empty"):  # what the function raises comes as it is
        worker.result(worker.submit(max, ()))
    worker.close()


def test_each_architecture_gets_its_own_instructions_whatever_was_compiled_before() -> None:
    corpus = pytest.importorskip("triton_corpus")  # tests/emulator, which conftest.py puts on the path
    made = {}
    for arch in ("gfx950", "gfx942", "gfx950"):
        block = 512 if arch not in made else 256  # another kernel, so that it is compiled
        signature = {"x": "*fp32", "y": "*fp8e4nv", "n": "i32"}
        made[arch] = corpus.compile_kernel(corpus.cast, arch, signature, {"B": block}).assembly
    assert "v_cvt_scalef32_pk_fp8_f32" in made["gfx950"]
    assert "v_cvt_scalef32_pk_fp8_f32" not in made["gfx942"]


def test_an_abort_while_compiling_names_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = pytest.importorskip("sglang_amd_quant.kernels.triton.manifest")
    variant = next(v for v in manifest.variants() if v.arch == "gfx942")
    monkeypatch.setattr(triton_aot, "_compile", _aborting)
    with pytest.raises(BuildError, match=f"{variant.name} for gfx942: LLVM ERROR: gone; see kernels/triton"):
        triton_aot.compile_variant(variant)


def _aborting(variant: object) -> None:
    abort_saying("LLVM ERROR: gone\n")


def test_without_triton_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith("sglang_amd_quant.kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("sglang_amd_quant.cli.build.build", lambda *_, **__: [])
    assert main(["build", "--arch", "gfx942", "--triton"]) == 2
    assert "pip install triton==3.6.0" in capsys.readouterr().err
