"""`amd-mx packs`, run as users do but in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sglang_amd_quant.cli.main import main
from sglang_amd_quant.selection.pack_csv import load_file, write_file
from sglang_amd_quant.selection.packs import shipped_dir

Out = pytest.CaptureFixture[str]
SHIPPED = shipped_dir() / "gfx950" / "mxfp8" / "minimax-m3.csv"


def run(capsys: Out, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(["packs", *argv])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def measured(path: Path, us: float) -> Path:
    rows = [
        row._replace(us=us, err=0.001, device="MI355X", versions="x", date="2026-11-21", source="measured")
        for row in load_file(SHIPPED)[:2]
    ]
    write_file(path, rows)
    return path


def test_lint_of_the_shipped_packs(capsys: Out) -> None:
    code, out, _ = run(capsys, "lint")
    assert code == 0
    assert out.endswith("no findings\n")


def test_lint_exits_1_and_names_places(capsys: Out, tmp_path: Path) -> None:
    copy = tmp_path / "copy.csv"
    write_file(copy, load_file(SHIPPED)[:3])
    code, out, _ = run(capsys, "lint", str(SHIPPED), str(copy))
    assert code == 1
    assert f"{copy}:3: duplicate: this shape is owned by {SHIPPED}:3" in out
    code, out, _ = run(capsys, "lint", str(SHIPPED), str(copy), "--json")
    assert code == 1
    assert [f["kind"] for f in json.loads(out)["findings"]] == ["duplicate"] * 3
    code, _, err = run(capsys, "lint", str(tmp_path / "nowhere"))
    assert (code, err.count("\n")) == (2, 1)


def test_diff(capsys: Out, tmp_path: Path) -> None:
    assert run(capsys, "diff", str(SHIPPED), str(SHIPPED)) == (0, "no differences\n", "")
    one, two = measured(tmp_path / "one.csv", 8.0), measured(tmp_path / "two.csv", 6.0)
    code, out, _ = run(capsys, "diff", str(one), str(two))
    assert code == 1
    assert "us 8.0 -> 6.0, -25.0 % time" in out
    assert [c["kind"] for c in json.loads(run(capsys, "diff", str(one), str(two), "--json")[1])] == ["changed"] * 2


def test_a_folder_without_packs(capsys: Out, tmp_path: Path) -> None:
    """Mistyped, most likely: what OUT holds already is worth more."""
    (tmp_path / "empty").mkdir()
    out = measured(tmp_path / "out.csv", 8.0)
    before = out.read_bytes()
    for argv in (("merge", str(out), str(tmp_path / "empty")), ("diff", str(tmp_path / "empty"), str(SHIPPED))):
        code, _, err = run(capsys, *argv)
        assert code == 2
        assert err == f"amd-mx packs: {tmp_path / 'empty'}: holds no *.csv; name packs, or a folder of them\n"
    assert out.read_bytes() == before


def test_merge_into_a_link(capsys: Out, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    link, file = tmp_path / "out.csv", tmp_path / "shared" / "all.csv"
    link.symlink_to(file)
    for _ in range(2):  # it may point to what is not there yet
        assert run(capsys, "merge", str(link), str(SHIPPED))[0] == 0
        assert link.is_symlink()
        assert len(load_file(file)) == len(load_file(SHIPPED))


def test_merge_into_a_pipe(capsys: Out, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run(capsys, "merge", str(pipe), str(measured(tmp_path / "one.csv", 8.0)))[0] == 0
    assert pipe.is_fifo()
    assert os.read(reader, 1 << 16) == (tmp_path / "one.csv").read_bytes()
    os.close(reader)


def test_merge(capsys: Out, tmp_path: Path) -> None:
    one, two, out = measured(tmp_path / "one.csv", 8.0), measured(tmp_path / "two.csv", 6.0), tmp_path / "out.csv"
    code, text, _ = run(capsys, "merge", str(out), str(one), str(two))
    assert code == 1
    assert "undecided" in text
    assert not out.exists()
    assert run(capsys, "merge", str(out), str(SHIPPED), str(one), str(two), "--prefer", "faster")[0] == 0
    rows = load_file(out)
    assert len(rows) == len(load_file(SHIPPED))
    assert sorted(row.us for row in rows if row.source == "measured") == [6.0, 6.0]
    code, _, err = run(capsys, "merge", "/no/such/folder/out.csv", str(one))
    assert (code, err.count("\n")) == (2, 1)
