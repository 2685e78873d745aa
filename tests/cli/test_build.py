"""`amd-mx build`: its command line; tests/toolchain has the building."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_amd_quant.cli import build
from sglang_amd_quant.cli.main import main


def test_an_arch_counts_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []

    def nothing(archs: list[str], **_: Any) -> list[Any]:
        asked.append(archs)
        return []

    monkeypatch.setattr(build, "build", nothing)
    assert main(["build", "--arch", "gfx950,sm_90,gfx950"]) == 0
    assert asked == [["gfx950", "sm_90"]]
