import subprocess
import sys
from dataclasses import replace

import pytest

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.selection import kernel, kernels, register, shipped, specs


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(specs, "_SPECS", dict(kernels()))


def test_registering_the_same_again_does_nothing():
    spec = kernel("hip_mxfp8_gemv")
    assert register(replace(spec)) is spec
    assert kernel("hip_mxfp8_gemv") is spec


def test_a_conflicting_registration_raises_and_names_what_differs():
    with pytest.raises(UnsupportedError, match="different m_max"):
        register(replace(kernel("hip_mxfp8_gemv"), m_max=32))
    assert kernel("hip_mxfp8_gemv").m_max == 16


def test_a_shipped_kernel_becomes_available_and_a_published_one_does_not():
    register(replace(kernel("hip_mxfp8_gemv"), name="own_gemv", status="shipped"))
    assert "own_gemv" in shipped()
    assert "hip_mxfp8_gemv" not in shipped()


def test_an_unknown_name_offers_similar_ones():
    with pytest.raises(UnsupportedError, match="did you mean hip_mxfp8_gemv"):
        kernel("hip_mxfp8_gem")
    with pytest.raises(UnsupportedError, match="shipped or published"):
        replace(kernel("reference"), status="planned")


def test_every_family_states_its_origin_and_defaults_within_its_space():
    for spec in kernels().values():
        assert spec.origin
        assert spec.triton == (spec.name.split("_")[0] == "triton")
        assert set(spec.required) <= set(spec.space)


def test_importing_selection_loads_neither_torch_nor_triton_nor_numpy():
    parts = ("", ".explain", ".coverage", ".pack_tools", ".heatmap")
    code = f"import sys, {', '.join(f'sglang_amd_quant.selection{part}' for part in parts)}\n"
    code += "print([m for m in ('torch', 'triton', 'numpy', 'sglang') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
