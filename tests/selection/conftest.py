"""Helpers for selection's tests: problems and packs in one line each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_amd_quant.selection import trace
from sglang_amd_quant.selection.pack_csv import COLUMNS, VERSION_LINE, load_file
from sglang_amd_quant.selection.packs import Packs

PUBLISHED = {"source": "published", "note": "test"}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_AMD_MX_PACKS", raising=False)
    monkeypatch.delenv("SGLANG_AMD_MX_TRACE", raising=False)
    monkeypatch.setattr(trace, "_missed", set())
    monkeypatch.setattr(trace, "_broken", set())


@pytest.fixture
def write_pack(tmp_path: Path) -> Callable[..., Path]:
    """write_pack(name, row, ...) -> path; a row is a dict of columns, those not given empty or as published."""

    def write(name: str, *rows: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [VERSION_LINE, ",".join(COLUMNS)]
        for row in rows:
            full = {"arch": "gfx950", **PUBLISHED, **row}
            assert set(full) <= set(COLUMNS), set(full) - set(COLUMNS)
            lines.append(",".join(str(full.get(column, "")) for column in COLUMNS))
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def packs_of(write_pack: Callable[..., Path]) -> Callable[..., Packs]:
    """packs_of(row, ...) -> Packs holding just these."""
    return lambda *rows: Packs(load_file(write_pack("own.csv", *rows)))
