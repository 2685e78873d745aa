"""Which kernels an installation can launch on an architecture, and what it says of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_amd_quant.runtime import detect
from sglang_amd_quant.runtime.arch import ARCH_FACTS, arch_facts
from sglang_amd_quant.runtime.code_objects import code_object_path
from sglang_amd_quant.runtime.detect import launchable, missing
from sglang_amd_quant.selection import kernels, shipped
from sglang_amd_quant.selection.arch import canonical


@pytest.fixture(autouse=True)
def _forget():
    yield
    launchable.cache_clear()
    missing.cache_clear()


def built(root: Path, arch: str) -> None:
    """Files where the code objects of the kernels made for an arch would lie."""
    for name in shipped():
        for code_object in kernels()[name].code_objects:
            path = code_object_path(code_object, arch_facts(arch), root)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


@pytest.mark.parametrize("arch", [*ARCH_FACTS, "gfx950:sramecc+:xnack-"])
def test_with_everything_built_everything_made_for_it_is_launchable(tmp_path, arch):
    built(tmp_path, arch.partition(":")[0])
    found = launchable(arch.partition(":")[0], tmp_path)
    assert found == {
        name for name in shipped() if not kernels()[name].archs or canonical(arch) in kernels()[name].archs
    }
    assert missing(arch.partition(":")[0], tmp_path) == {}


@pytest.mark.parametrize("arch", ["cpu", "gfx90a", "nonsense"])
def test_elsewhere_only_the_reference(arch):
    assert launchable(arch) == {"reference"}
    assert missing(arch) == {}


def test_code_objects_that_were_not_built_are_named_with_the_remedy(tmp_path):
    assert "gemv_mxfp4" not in launchable("gfx1151", tmp_path)
    assert missing("gfx1151", tmp_path)["gemv_mxfp4"] == (
        "code object gemv_mxfp4 for gfx1151 was not built; run `amd-mx build --arch gfx1151`"
    )
    assert "triton_mx_gemm" in launchable("gfx1151", tmp_path)


def test_a_family_has_what_all_its_members_have(tmp_path):
    built(tmp_path, "gfx1100")
    assert "gemv_mxfp4" not in launchable("gfx11", tmp_path)
    assert "gemv_mxfp4 for gfx1151" in missing("gfx11", tmp_path)["gemv_mxfp4"]
    launchable.cache_clear()
    missing.cache_clear()
    built(tmp_path, "gfx1151")
    assert "gemv_mxfp4" in launchable("gfx11", tmp_path)


def test_a_member_that_nothing_is_compiled_for(tmp_path):
    assert "nothing is compiled for gfx1101" in missing("gfx1101", tmp_path)["gemv_mxfp4"]


def test_without_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "find_spec", lambda name: None)
    built(tmp_path, "gfx950")
    assert not any(name.startswith("triton") for name in launchable("gfx950", tmp_path))
    assert "triton is not installed" in missing("gfx950", tmp_path)["triton_mx_gemm"]


def test_every_code_object_of_a_spec_is_in_the_manifest_for_its_archs():
    from sglang_amd_quant.kernels.hip.manifest import CODE_OBJECTS

    archs: dict[str, set[str]] = {}
    for c in CODE_OBJECTS:
        archs.setdefault(c.name, set()).update(map(canonical, c.archs))
    for name in shipped():
        spec = kernels()[name]
        for code_object in spec.code_objects:
            assert set(spec.archs) <= archs[code_object], name
