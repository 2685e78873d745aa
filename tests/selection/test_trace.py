import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.selection import GemmProblem, choose, kernels
from sglang_amd_quant.selection.choose import Selector, process_selector
from sglang_amd_quant.selection.trace import read_choices, read_problems, to_tune, untuned_line, write_untuned

MISS = GemmProblem("linear", "w4a8", "gfx950", 5, 2048, 4096)
EVERY = frozenset(kernels())


@pytest.fixture(autouse=True)
def _fresh_selectors():
    process_selector.cache_clear()
    yield
    process_selector.cache_clear()


def test_a_miss_is_logged_once_per_shape_to_tune(caplog, tmp_path):
    """aiter#5267: only one op said that it had missed. Ms that one entry would serve are one shape."""
    with caplog.at_level(logging.INFO):
        for m in (5, 5, 6, 7, 8, 9):
            choose(replace(MISS, m=m), EVERY)
        choose(replace(MISS, n=4096), EVERY)
        choose(GemmProblem("linear", "mxfp8", "gfx950", 1, 2304, 6144), EVERY)  # tuned: no miss
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    log = tmp_path / "server.log"
    log.write_text("".join(f"[2026-11-21 10:00:00 TP0] {message}\n" for message in ("starting", *messages)))
    assert read_problems(log) == [to_tune(MISS), to_tune(replace(MISS, m=9)), to_tune(replace(MISS, n=4096))]
    assert [problem.m for problem in read_problems(log)] == [8, 16, 8]


def test_an_entry_at_the_logged_m_is_found_by_the_problems_that_missed(packs_of):
    wanted = to_tune(MISS)
    row = {
        "op": "linear", "scheme": "w4a8", "N": 2048, "K": 4096, "M": wanted.m, "kernel": "triton_gemm_mx",
        "block_m": 16, "block_n": 64, "block_k": 256, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    select = Selector(packs_of(row))
    assert [select(replace(MISS, m=m)).source for m in (5, 6, 8)] == ["padded_m", "padded_m", "exact"]


def test_the_reference_has_nothing_to_tune(caplog):
    with caplog.at_level(logging.INFO):
        choose(replace(MISS, arch="cpu", cu_count=0), EVERY)
        choose(replace(MISS, n=64), frozenset())  # this device can launch nothing
        choose(replace(MISS, m=0), EVERY)
    assert not caplog.records


def test_trace_records_every_distinct_choice_and_is_read_back(tmp_path, monkeypatch):
    path = tmp_path / "choices.jsonl"
    monkeypatch.setenv("SGLANG_AMD_MX_TRACE", str(path))
    problems = [replace(MISS, m=m) for m in (1, 2, 64)]
    made = [choose(problem, EVERY) for problem in (*problems, *problems)][:3]
    assert len(path.read_text().splitlines()) == 3
    assert [problem for problem, _ in read_choices(path)] == problems
    for (_, read), choice in zip(read_choices(path), made, strict=True):
        assert (read.kernel, read.config, read.source, read.layout) == (
            choice.kernel, choice.config, choice.source, choice.layout,
        )  # fmt: skip


def test_several_processes_write_one_trace(tmp_path):
    path = tmp_path / "choices.jsonl"
    code = (
        "from sglang_amd_quant.selection import *\n"
        "for m in range(1, 151): choose(GemmProblem('linear', 'w4a8', 'gfx950', m, 2048, 4096), frozenset(kernels()))"
    )
    env = {**os.environ, "SGLANG_AMD_MX_TRACE": str(path)}
    for process in [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]:
        assert process.wait() == 0
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 300
    assert len(read_choices(path)) == 150


def test_a_trace_that_cannot_be_written_is_said_once_and_serving_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SGLANG_AMD_MX_TRACE", str(tmp_path / "no" / "such" / "folder.jsonl"))
    with caplog.at_level(logging.WARNING):
        assert choose(MISS).kernel == "hip_decode_gfx950_e2m1"
        choose(replace(MISS, m=6))
    assert ["cannot be written" in record.message for record in caplog.records] == [True]


def test_missing_entries_are_written_once_each(tmp_path):
    path = tmp_path / "untuned.jsonl"
    assert write_untuned(path, [(replace(MISS, m=m), "heuristic") for m in (5, 6, 7, 9)]) == 2
    assert [problem.m for problem in read_problems(path)] == [8, 16]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing of the kind\n", "holds no problem"),
        (untuned_line(MISS, "default")[:-20], ":1: no problem"),
        ('{"problem": 3}\n', ":1: .*not an object"),
        ('{"problem":{"op":"linear"},"choice":{}}\n', ":1: no problem"),
        ('{"problem":3,"choice":{}}\n', ":1: no problem"),
        (untuned_line(MISS, "guessed"), ":1: no problem .source 'guessed': unknown; use one of exact, "),
        pytest.param('{"problem":' + "[" * 100_000, ":1: no problem .maximum recursion depth", id="nested deeply"),
    ],
)
def test_a_broken_file_is_named_by_line(tmp_path, text, reason):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ShapeError, match=reason):
        read_problems(path)
    with pytest.raises(ShapeError, match="cannot be read"):
        read_problems(tmp_path / "nowhere")
