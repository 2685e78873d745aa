"""`amd-mx coverage`, run as users do but in this process."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

from sglang_amd_quant import shapes
from sglang_amd_quant.cli.main import main
from sglang_amd_quant.selection import SOURCES, GemmProblem, choose, kernels
from sglang_amd_quant.selection.choose import process_selector
from sglang_amd_quant.selection.trace import read_problems

Out = pytest.CaptureFixture[str]


def run(capsys: Out, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(["coverage", *argv])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_card_and_parallelism_answers(capsys: Out) -> None:
    for card in shapes.cards():
        for tp in ("1", "2", "4", "8"):
            for ep in ("1", "2", "4", "8"):
                argv = (card, "--tp", tp, "--ep", ep, "--scheme", "w4a8", "--m", "1,64,4096")
                code, out, err = run(capsys, *argv, "--arch", "gfx950")
                assert code in (0, 2)
                if code:
                    assert (out, err.count("\n")) == ("", 1)
                else:
                    assert "cells tuned for their GEMM" in out


def test_table(capsys: Out) -> None:
    code, out, _ = run(capsys, "gpt-oss-120b", "--tp", "4", "--scheme", "w4a8", "--m", "1,8192")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("gpt-oss-120b in bf16 on gfx950, TP 4 EP 1")
    (gate_up,) = [line for line in lines if "moe_gate_up" in line]
    assert gate_up.split()[-4:] == ["B*", "E*", "strided", "mlp.experts.gate_up_proj"]
    assert any("cells plan a published mechanism of which this build has no kernel binary" in line for line in lines)


def test_a_folder_whose_name_is_no_utf8(capsys: Out, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"m\xff")
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    report = tmp_path / "report.html"
    assert run(capsys, str(folder), "--m", "1", "--html", "-o", str(report))[0] == 0
    assert "m\\udcff" in report.read_text()


def test_json_csv_and_html_tell_the_same(capsys: Out, tmp_path: Path) -> None:
    argv = ("MiniMax-M3", "--tp", "4", "--scheme", "mxfp8", "--m", "1,4,64")
    data = json.loads(run(capsys, *argv, "--json")[1])
    cells = sum(len(gemm["choices"]) for gemm in data["gemms"])
    assert list(data["totals"]) == list(SOURCES)
    assert sum(data["totals"].values()) == data["cells"] == cells
    rows = list(csv.DictReader(io.StringIO(run(capsys, *argv, "--csv")[1])))
    assert len(rows) == cells
    assert {s: sum(row["source"] == s for row in rows) for s in SOURCES} == data["totals"]
    file = tmp_path / "map.html"
    code, out, _ = run(capsys, *argv, "--html", "-o", str(file))
    assert (code, out) == (0, "")
    assert file.read_text().count("<title>") == cells + 1


def test_int4_groups(capsys: Out) -> None:
    """ROCm/vllm #1015's model and kernel: groups of 128 only, decode (M <= 5) left to another."""
    argv = ("Qwen3.6-35B-A3B", "--arch", "gfx1151", "--scheme", "int4_w4a16", "--m", "1,994", "--json")
    for group, kernels_ in (("32", ["triton_moe_w4a16"] * 2), ("128", ["triton_moe_w4a16", "hip_moe_w4a16_wmma"])):
        data = json.loads(run(capsys, *argv, "--group", group)[1])
        (gate_up,) = [gemm for gemm in data["gemms"] if gemm["problem"]["op"] == "moe_gate_up"]
        assert [choice["kernel"] for choice in gate_up["choices"].values()] == kernels_
    assert run(capsys, *argv, "--group", "48")[0] == 2
    data = json.loads(run(capsys, "gpt-oss-120b", *argv[1:])[1])
    experts = [gemm["problem"] for gemm in data["gemms"] if gemm["problem"]["op"] != "linear"]
    assert [problem["group"] for problem in experts] == [64, 64]  # K = 2880


def test_a_model_in_fp16_gets_what_reads_it(capsys: Out) -> None:
    """Its activations are not rounded to bf16, so of decode kernels only those of int4 serve it."""
    argv = ("gpt-oss-120b", "--arch", "gfx950", "--m", "1,64", "--kernels", "shipped", "--json")
    for scheme, dtype, linear, experts in (
        ("w4a16", "bf16", "hip_decode_gfx950_e2m1", "hip_moe_decode_gfx950_e2m1"),
        ("w4a16", "fp16", "triton_e2m1_fp16_gemm", "triton_e2m1_fp16_moe"),
        ("int4_w4a16", "fp16", "hip_decode_gfx950_int4", "hip_moe_decode_gfx950_int4"),
        ("w4a8", "fp32", "triton_mx_gemm", "triton_mx_moe"),
    ):
        data = json.loads(run(capsys, *argv, "--scheme", scheme, "--out-dtype", dtype)[1])
        assert data["title"].startswith(f"gpt-oss-120b in {dtype} on gfx950")
        assert {gemm["problem"].get("out_dtype", "bf16") for gemm in data["gemms"]} == {dtype}
        chosen = {(gemm["problem"]["op"], gemm["choices"]["1"]["kernel"]) for gemm in data["gemms"]}
        assert chosen == {("linear", linear), ("moe_gate_up", experts), ("moe_down", experts)}
    table = run(capsys, *argv[:-1], "--scheme", "w4a16", "--out-dtype", "fp16")[1]
    assert table.count(" fp16  ") == table.count("preshuffle") == 4
    rows = csv.DictReader(io.StringIO(run(capsys, *argv[:-1], "--csv", "--out-dtype", "fp16")[1]))
    assert {row["out_dtype"] for row in rows} == {"fp16"}


@pytest.mark.parametrize("group", ["32", "64", "128"])
@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx1100", "sm_90"])
def test_this_build_has_kernels_for_int4(capsys: Out, arch: str, group: str) -> None:
    argv = (
        "Qwen3-30B-A3B",
        "--arch",
        arch,
        "--scheme",
        "int4_w4a16",
        "--group",
        group,
        "--json",
        "--kernels",
        "shipped",
    )
    data = json.loads(run(capsys, *argv)[1])
    choices = [choice for gemm in data["gemms"] for choice in gemm["choices"].values()]
    assert choices
    assert all("int4" in choice["kernel"] and choice["in_build"] for choice in choices)


def test_fail_under(capsys: Out) -> None:
    argv = ("gpt-oss-120b", "--tp", "4", "--scheme", "w4a8", "--m", "8192")
    assert run(capsys, *argv, "--fail-under", "50")[0] == 0
    code, _, err = run(capsys, *argv, "--fail-under", "50.1")
    assert code == 1
    assert "50.00 % tuned is under 50.1 %" in err
    assert run(capsys, *argv, "--fail-under", "1", "--kernels", "shipped")[0] == 1
    assert run(capsys, *argv, "--fail-under", "150")[0] == 2


def test_missing_entries_are_what_the_tuner_reads(capsys: Out, tmp_path: Path) -> None:
    file = tmp_path / "untuned.jsonl"
    code, _, err = run(
        capsys, "gpt-oss-120b", "--tp", "4", "--scheme", "w4a8", "--m", "5,7,8192", "--missing", str(file)
    )
    assert code == 0
    problems = read_problems(file)
    assert err == f"{len(problems)} shapes to tune written to {file}\n"
    assert {p.m for p in problems} == {8, 8192}
    assert {(p.op, p.n, p.k) for p in problems if p.m == 8} >= {("moe_gate_up", 1472, 2880), ("moe_down", 2880, 736)}


def test_from_trace(capsys: Out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "choices.jsonl"
    monkeypatch.setenv("SGLANG_AMD_MX_TRACE", str(trace))
    process_selector.cache_clear()
    for m in (1, 100):
        choose(GemmProblem("linear", "mxfp8", "gfx950", m, 2304, 6144), frozenset(kernels()))
        choose(GemmProblem("linear", "mxfp8", "gfx950", m, 2304, 6144), frozenset())
    monkeypatch.delenv("SGLANG_AMD_MX_TRACE")
    code, out, _ = run(capsys, "--from-trace", str(trace), "--json")
    data = json.loads(out)
    assert (code, data["recorded"], data["m"]) == (0, True, [1, 100])
    assert data["totals"]["reference"] == 2  # as recorded last: what this build ran
    assert run(capsys, "--from-trace", str(trace))[0] == 0
    assert run(capsys, "--from-trace", str(trace), "--html")[0] == 0
    process_selector.cache_clear()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "MODEL: not given"),
        (("nosuchmodel",), "nosuchmodel"),
        (("gpt-oss-120b", "--tp", "3"), "TP 3"),
        (("gpt-oss-120b", "--tp", "2", "--ep", "4"), "TP 2, EP 4"),
        (("gpt-oss-120b", "--out-dtype", "fp64"), "invalid choice"),
        (("gpt-oss-120b", "--m", "0"), "write whole numbers of at least 1"),
        (("gpt-oss-120b", "--arch", "gfx1"), "'gfx1' is unknown"),
        (("gpt-oss-120b", "--from-trace", "x"), "two different reports"),
        (("--from-trace", "nowhere.jsonl"), "cannot be read"),
        (("gpt-oss-120b", "--missing", "/no/such/folder/x"), "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(capsys: Out, argv: tuple[str, ...], said: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
