"""Arguments that benches cannot use are refused before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench.arguments import file, names

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
