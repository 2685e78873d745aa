"""What bench.moe does around its measurements: the search, and the packs it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from sglang_amd_quant.kernels.triton.hopper import HopperConfig

from bench import moe
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


def measured(kernel: str, us: float, m: int) -> dict[str, Any]:
    return {
        "shape": "gpt-oss-120b-tp8", "kernel": kernel, "M": m, "scheme": "w4a8", "active": 4.0, "us": us,
        "weight_bytes": 1e6, "flops": 1e9, "error": 1e-3,
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [False, True])
def test_a_run_is_written_printed_and_shown_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, wrong: bool
) -> None:
    def run_jobs(jobs, measure, logs):
        yield {"shape": "gpt-oss-120b-tp8", "kernel": "humming", "M": None, "why": "it crashed"}
        yield measured("a peer x bf16", 30.0, 4)
        yield {"shape": "gpt-oss-120b-tp8", "scheme": "w4a8", "M": 4, "errors": {"gate_up": 1e-3, "whole": 2e-3}}
        yield measured("ours w4a8", 10.0, 4)
        if wrong:
            yield {"shape": "gpt-oss-120b-tp8", "scheme": "w4a8", "M": 4, "wrong": "down: 7 x bound"}

    monkeypatch.setattr(moe, "run_jobs", run_jobs)
    monkeypatch.setattr(moe, "gpu", lambda ordinal: None)
    monkeypatch.setattr(moe, "read_bandwidth", lambda: 3e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bench.moe", *words])
        return moe.main(), capsys.readouterr().out

    asked = ("--shapes", "gpt-oss-120b-tp8", "--schemes", "w4a8", "--m", "4")
    code, out = run(*asked, "--json", "--out", str(tmp_path))
    report = json.loads(out)
    assert code == int(wrong)
    assert report == json.loads((tmp_path / "moe.json").read_text())
    assert report["command"] == " ".join(["python -m bench.moe", *asked])
    assert [row["kernel"] for row in report["rows"]] == ["ours w4a8", "a peer x bf16"]
    assert report["rows"][0]["x_best_peer"] == 3.0
    assert (tmp_path / "moe.png").stat().st_size > 0
    code, table = run("--show", str(tmp_path / "moe.json"))
    assert code == int(wrong)
    assert table == run(*asked)[1]
    assert table.startswith("a GPU, ")
    assert "it crashed" in table
    assert ("down: 7 x bound" in table) == wrong
