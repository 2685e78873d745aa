"""Compiles the HIP kernels into the wheel, so that a serving machine needs no compiler. All else is in
pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithKernels(build_py):
    """`build_py`, then the code objects beside the Python files.

    A wheel holds all AMD targets, or is not built; sm_90 if this machine has nvcc. What `amd-mx build` has left in the
    source tree and is up to date is taken over. An editable install compiles nothing.
    """

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        # Kept between builds, with files that exist no more.
        shutil.rmtree(Path(self.build_lib) / "sglang_amd_quant", ignore_errors=True)
        super().run()
        sys.path.insert(0, str(ROOT))
        import sglang_amd_quant

        sglang_amd_quant.__path__.append(str(ROOT))  # kernels/ is sglang_amd_quant.kernels, see package-dir
        from sglang_amd_quant.kernels.hip.manifest import AMD_ARCHS, ARCHS

        from sglang_amd_quant.toolchain.build import available_archs, build

        archs = [*AMD_ARCHS, *available_archs([a for a in ARCHS if a not in AMD_ARCHS])]
        out = Path(self.build_lib) / "sglang_amd_quant/kernels/code_objects"
        for built in build(archs, out=out, reuse=ROOT / "kernels/code_objects"):
            problems = [f"{r.kernel} for {r.arch} {p}" for r in built.reports for p in r.problems]
            if problems:
                raise SystemExit("; ".join(problems))
            self.announce(f"{built.path}, {built.path.stat().st_size} bytes, {built.compiler}", level=2)


setup(cmdclass={"build_py": BuildWithKernels})
