"""What `bench.quant_mx` counts, and what it refuses; it measures on a GPU only."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("triton")
from sglang_amd_quant.kernels.triton.quant_mx import NO_FRONT, Front

from bench import quant_mx


@pytest.mark.parametrize(
    ("front", "element", "out", "an_element"),
    [
        (NO_FRONT, "e4m3", "mx", 2 + 1 + 1 / 32), (NO_FRONT, "e2m1", "mx", 2 + 1 / 2 + 1 / 32),
        (Front("rmsnorm"), None, "row", 2 + 1), (Front("silu"), "e4m3", "bf16", 4 + 2),
        (Front("swigluoai"), "e2m1", "mx", 4 + 1 / 2 + 1 / 32),
    ],
)  # fmt: skip
def test_bytes_that_must_move(front: Front, element: str | None, out: str, an_element: float) -> None:
    assert quant_mx.bytes_of(10, 320, front, element, out) == pytest.approx(3200 * an_element)


def test_only_behind_a_front_may_codes_differ() -> None:
    assert quant_mx.allowed(NO_FRONT) == 0
    assert 0 < quant_mx.allowed(Front("silu")) <= 0.01


def test_columns_that_are_no_blocks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.quant_mx", "--k", "2048,100"])
    with pytest.raises(SystemExit, match="2"):
        quant_mx.main()
    assert "--k 100: write multiples of 32" in capsys.readouterr().err
