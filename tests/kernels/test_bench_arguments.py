"""Arguments that benches cannot use are refused before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench.arguments import command, earlier, file, matrices, names
from sglang_amd_quant.cli.arguments import wholes

read = names(["w4a8", "w4a16", "mxfp8"])


def test_names_and_patterns_of_them_come_in_the_order_given() -> None:
    assert read("mxfp8,w4*,w4a8") == ["mxfp8", "w4a8", "w4a16"]
    assert read("none") == []
    assert read("") == []


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="fp4: not among w4a8, w4a16, mxfp8"):
        read("w4a8,fp4")
    with pytest.raises(argparse.ArgumentTypeError, match=r"gone[.]json: no such file"):
        file(str(tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("# no JSON", "no JSON; name the report that --out wrote"),
        ("[]", "has no rows, so it is no report of this bench"),
        ('{"device": "x"}', "has no rows"), ('{"rows": [{"us": 1}]}', "has no device"),
        ('{"device": "x", "rows": [{"M": 1}]}', "has no us"), ('{"device": "x", "rows": [1]}', "has no rows"),
        ('{"device": "x", "rows": 7}', "has no rows"),
    ],
)  # fmt: skip
def test_what_no_bench_wrote_is_refused(tmp_path: Path, text: str, why: str) -> None:
    report = tmp_path / "report.json"
    report.write_text(text)
    with pytest.raises(argparse.ArgumentTypeError, match=why):
        earlier(("device",), ("us",))(str(report))


def test_a_report_of_a_bench_is_read(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"device": "x", "rows": [{"us": 1}]}')
    assert earlier(("device",), ("us",))(str(report))["rows"] == [{"us": 1}]


def test_a_report_says_what_measures_it_again() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemes", type=read, default="w4a8")
    parser.add_argument("--shapes", type=matrices, default="64x32")
    parser.add_argument("--m", type=wholes, default="1")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--out", type=Path)

    def again(*words: str) -> str:
        return command("bench.x", parser.parse_args(words), parser)

    assert again("--out", "here") == "python -m bench.x"
    asked = ("--schemes", "w4a16,mxfp8", "--shapes", "64x32,8192x28672", "--m", "1,16", "--no-check")
    assert again(*asked) == " ".join(["python -m bench.x", *asked])
    assert again("--schemes", "none") == "python -m bench.x --schemes none"
