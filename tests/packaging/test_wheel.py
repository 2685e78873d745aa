"""The wheel as an ecosystem meets it: its contents, and that it leaves an image's torch, triton and sglang alone."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
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
