"""What bench.moe does around its measurements: the search, and the packs it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from sglang_amd_quant.kernels.triton.hopper import HopperConfig

from bench.moe_pack import pack_entries
from bench.moe_problem import SHAPES
from bench.moe_tune import candidates, tune
from sglang_amd_quant.selection.pack_tools import lint


def test_the_search_goes_by_the_time_of_the_whole() -> None:
    """gate_up is best with 128 of K a step, down then with 6 stages; a pair of another block_m is faster still."""
    space = candidates(256, 4, 128, "bf16", "e2m1")
    assert set(space) == {8, 16, 32}
    start = (HopperConfig(16), HopperConfig(16))

    def time(pair: tuple[HopperConfig, HopperConfig]) -> float:
        return 9 - 2 * (pair[0].block_k == 128) - (pair[1].num_stages == 6) - (pair[0].block_m == 32)

    found = tune(time, space, start)
    assert (found.configs[0].block_m, found.configs[0].block_k, found.configs[1].num_stages) == (32, 128, 6)
    assert found.configs[1].block_m == 32
    assert found.timed > 2 * len(space[16])


def test_measured_configs_become_pack_entries_that_lint(tmp_path: Path) -> None:
    config: dict[str, Any] = {"block_m": 32, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 4,
                              "group_m": 8, "max_registers": 80}  # fmt: skip
    row: dict[str, Any] = {
        "shape": "gpt-oss-120b-tp8", "kernel": "ours w4a8", "scheme": "w4a8", "M": 64, "us": 8.04, "x_format": "e4m3",
        "config13": config, "config2": config | {"num_stages": 12}, "configs_timed": 20,
    }  # fmt: skip
    peer = {"shape": "gpt-oss-120b-tp8", "kernel": "humming x fp8", "M": 64, "us": 12.0}
    result = {
        "device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-26", "rows": [row, peer],
        "errors": {"gpt-oss-120b-tp8 w4a8 M=5": {"gate_up": 1.7e-3, "down": 1.6e-3}},
    }  # fmt: skip
    (name, text), *rest = pack_entries(result, SHAPES).items()
    assert not rest
    folder = tmp_path / "sm_90" / "w4a8"
    folder.mkdir(parents=True)
    (folder / name.removeprefix("w4a8-")).write_text(text)
    assert ",moe_gate_up,w4a8,768,2880,128,4,8,1,64," in text
    assert text.count(",32,128,64,") == 2
    assert ",group_m=8;max_registers=80,8.0,1.7e-03,12.0," in text
    assert lint([tmp_path]) == ([], 2)
    row |= {"configs_timed": 0, "configs": "exact"}  # measured anew with the entry that there is
    assert pack_entries(result, SHAPES) == {name: text}
    row["configs"] = "default"  # nobody searched: no entry
    assert pack_entries(result, SHAPES) == {}
