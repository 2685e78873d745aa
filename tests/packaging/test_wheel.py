"""The wheel as an ecosystem meets it: its contents, and that it leaves an image's torch, triton and sglang alone."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from sglang_amd_quant.kernels.hip.manifest import AMD_ARCHS, CODE_OBJECTS

ROOT = Path(__file__).parents[2]
NEVER_REPLACED = {"torch", "triton", "sglang"}
IMAGE = {"torch": "2.9.1+rocm7.0", "triton": "3.5.1+rocm7.0", "sglang": "0.5.23"}
"""What a ROCm image brings, as stubs: versions that no index has."""
REST = {
    "numpy": "2.3.0",
    "safetensors": "0.6.0",
    "tqdm": "4.67",
    "packaging": "25.0",
    "psutil": "7.0",
    "ziglang": "0.17.0",
}


def without_nvcc() -> dict[str, str]:
    """The environment, but for what leads to nvcc."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not Path(f, "nvcc").exists()]
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    return kept | {"PATH": os.pathsep.join(folders)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree, by pip, with the build tools of this environment but for nvcc, which not every
    machine has and which would take longer than all else; once a run, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built_wheel"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
            command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
            done = subprocess.run(command, capture_output=True, text=True, env=without_nvcc())
            assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with stub distributions of what a serving image brings. Returns its Python."""
    folder = tmp_path_factory.mktemp("image")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for name, version in (IMAGE | REST).items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("image\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize("extras", ["", "[rocm]", "[build]"])
def test_installing_into_an_image_changes_nothing_there(wheel: Path, image: Path, tmp_path: Path, extras: str) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "--python", str(image), "install", "--dry-run", "--no-index", "-q"]
    subprocess.run([*command, "--report", str(report), f"{wheel}{extras}"], check=True, capture_output=True)
    planned = [entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]]
    assert planned == ["sglang-amd-quant"]


def test_no_extra_names_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    assert {r.name.lower() for r in requirements} & NEVER_REPLACED == set()
    assert {r.name for r in requirements if r.marker is None} == {"numpy", "safetensors", "tqdm", "packaging"}
    assert set(metadata.get_all("Provides-Extra")) >= {"cpu", "cuda", "rocm", "build", "test", "bench"}


def test_what_it_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "[sglang.srt.plugins]" in entry_points
    assert "sglang.srt.platforms" not in entry_points  # a distribution of its own: integration/cpu_platform.py
    assert {"sglang_amd_quant/py.typed", "sglang_amd_quant/configs/models/gpt-oss-120b.json"} <= names
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    tracked = subprocess.run(
        ["git", "ls-files", "sglang_amd_quant"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {n for n in tracked.stdout.split() if n.endswith(".py")} <= names
    packs = {f"sglang_amd_quant/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.csv")}
    assert packs <= names


def test_it_holds_every_amd_code_object_and_stays_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist() if "/code_objects/" in i.filename}
    expected = {f"{arch}/{c.name}.hsaco" for c in CODE_OBJECTS for arch in AMD_ARCHS if arch in c.archs}
    found = {n.removeprefix("sglang_amd_quant/kernels/code_objects/") for n in sizes}
    assert {n for n in found if n.endswith(".hsaco")} == expected
    assert all(size > 0 for size in sizes.values())
    assert wheel.stat().st_size < 16 << 20


SERVING = """
import sys
sys.modules["ziglang"] = None  # no compiler, and none on PATH
sys.path.insert(0, sys.argv[1])
from sglang_amd_quant.kernels.hip.manifest import CODE_OBJECTS
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.runtime.code_objects import code_object
from sglang_amd_quant.toolchain.compilers import find_compiler
assert find_compiler(arch_facts("gfx950")) is None
for c in CODE_OBJECTS:
    for entry in c.entry_points if "gfx950" in c.archs else ():
        file = code_object(entry.name, "gfx950")
        assert str(file).startswith(sys.argv[1]), file
        assert entry.name.encode() in file.read_bytes()
"""


def test_serving_needs_no_compiler(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ROCM_PATH", "CUDA_HOME", "CUDA_PATH")}
    command = [sys.executable, "-c", SERVING, str(tmp_path)]
    subprocess.run(command, check=True, env=clean | {"PATH": "/nowhere"}, cwd=tmp_path)


def test_a_source_distribution_holds_what_a_wheel_is_built_from(wheel: Path, tmp_path: Path) -> None:
    script = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if "dist-info/" not in n and "/code_objects/" not in n}
    for folder in ("kernels", "configs"):  # package-dir in pyproject.toml
        names = {
            n.removeprefix("sglang_amd_quant/") if n.startswith(f"sglang_amd_quant/{folder}/") else n for n in names
        }
    assert names | {"build_backend/amd_mx_backend.py", "setup.py", "pyproject.toml", "LICENSE"} <= held
    assert not {n for n in held if "/code_objects/" in n}


def test_only_wheels_need_the_compiler() -> None:
    """`make serve` on a fresh machine must not fetch 100 MB of compiler for an editable install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["requires"] == ["setuptools>=77"]
    (ziglang,) = project["project"]["optional-dependencies"]["build"]
    script = "import sys; sys.path.insert(0, 'build_backend'); import amd_mx_backend as b; print(b.get_requires_for_{})"
    needed = {}
    for kind in ("build_wheel", "build_editable"):
        done = subprocess.run(
            [sys.executable, "-c", script.format(f"{kind}()")], cwd=ROOT, check=True, capture_output=True, text=True
        )
        needed[kind] = done.stdout.splitlines()[-1]
    assert ziglang in needed["build_wheel"]
    assert "ziglang" not in needed["build_editable"]
