"""`amd-mx explain`, run as users do but in this process."""

from __future__ import annotations

import json

import pytest

from sglang_amd_quant import shapes
from sglang_amd_quant.cli.main import main
from sglang_amd_quant.errors import AmdMxError
from sglang_amd_quant.runtime import detect
from sglang_amd_quant.selection import SOURCES

Out = pytest.CaptureFixture[str]

ISSUE = "--arch gfx950 --op moe_gate_up --scheme w4a8 --m 64 --n 5760 --k 2880 --experts 128 --top-k 4"


def run(capsys: Out, line: str) -> tuple[int, str, str]:
    try:
        code = main(["explain", *line.split()])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_choice_its_config_its_source_and_what_this_build_has(capsys: Out) -> None:
    code, out, _ = run(capsys, ISSUE)
    assert code == 0
    assert "planned  triton_moe_a8w4   source: borrowed" in out
    assert "block_m=16 block_n=128 block_k=256" in out
    assert "here     triton_moe would run (heuristic): no kernel binary of triton_moe_a8w4 in this build" in out


def test_a_kernel_that_was_not_built_is_not_promised(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx1101 is of a family that is served, but nothing is compiled for it: Triton is what is left."""
    line = "--op linear --scheme w4a16 --m 2 --n 2048 --k 4096 --arch "
    _, out, _ = run(capsys, line + "gfx1101")
    assert "planned  hip_decode_gfx11_e2m1   source: rule" in out
    assert "here     triton_e2m1_gemm would run (heuristic)" in out
    assert "hip_decode_gfx11_e2m1 cannot be launched here: nothing is compiled for gfx1101" in out
    monkeypatch.setattr(detect, "find_spec", lambda name: None)
    detect.launchable.cache_clear()
    detect.missing.cache_clear()
    _, out, _ = run(capsys, line + "gfx1101")
    assert "here     reference would run (reference)" in out
    assert "triton_e2m1_gemm cannot be launched here: triton is not installed" in out
    detect.launchable.cache_clear()
    detect.missing.cache_clear()


def test_int4_has_the_group_that_serving_gives_it(capsys: Out) -> None:
    line = "--arch gfx942 --op linear --scheme int4_w4a16 --m 2 --n 2048 --k 4096"
    code, out, _ = run(capsys, line)
    assert code == 0
    assert out.startswith("linear int4_w4a16 gfx942 M=2 N=2048 K=4096 group=128\n")
    assert "K=4096 group=32\n" in run(capsys, line + " --group 32")[1]
    assert "K=2880 group=64\n" in run(capsys, line.replace("4096", "2880"))[1]
    assert "planned  hip_decode_gfx942_int4   source: rule" in out


def test_json_says_the_same(capsys: Out) -> None:
    code, out, _ = run(capsys, ISSUE + " --json")
    data = json.loads(out)
    assert code == 0
    assert data["planned"]["kernel"] == "triton_moe_a8w4"
    assert data["planned"]["config"]["block_n"] == 128
    assert (data["planned"]["in_build"], data["here"]["kernel"]) == (False, "triton_moe")
    assert data["problem"]["e_local"] == 128
    assert all(refused["why"] for refused in data["here"]["refused"])


def test_ep_divides_the_experts(capsys: Out) -> None:
    assert "E=16/128" in run(capsys, ISSUE + " --tp 8 --ep 8")[1]
    code, _, err = run(capsys, ISSUE + " --ep 3")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--k 360", "K must be whole groups of 32"),
        ("--m -1", "below its least value"),
        ("--n 3000000000", "a dimension is above 2147483647"),
        ("--group 7", "scheme w4a8 group 7: no scale group of it; use one of 32"),
        ("--layout zigzag", "'zigzag' is unknown"),
        ("--arch gfx9000", "'gfx9000' is unknown"),
        ("--scheme fp5", "invalid choice"),
        ("--activation tanh", "invalid choice: tanh (choose from silu, swigluoai, gelu, gelu_tanh, relu2)"),
        ("--act int8", "invalid choice: int8 (choose from e2m1, e4m3, fp8_static, bf16)"),
        ("--out-dtype fp64", "invalid choice: fp64 (choose from bf16, fp16, fp32, mxfp8, mxfp4, fp8_static)"),
        ("--top-k 200", "more local experts or top_k than experts"),
    ],
)
def test_what_is_no_problem_is_said_in_one_line(capsys: Out, change: str, said: str) -> None:
    code, out, err = run(capsys, f"{ISSUE} {change}")
    assert (code, out) == (2, "")
    unquoted = err.splitlines()[-1].replace("'", "")  # argparse's quotes depend on Python
    assert said.replace("'", "") in unquoted


def test_every_gemm_of_every_card_and_parallelism_is_explained(capsys: Out) -> None:
    seen = set()
    for card in shapes.cards():
        facts = shapes.load(card)
        for tp in (1, 2, 4, 8):
            for ep in (1, 2, 4, 8):
                try:
                    gemms = shapes.plan(facts, tp, ep, "w4a8")
                except AmdMxError:
                    continue
                seen |= {(g.op, g.N, g.K, g.E_total, g.top_k, tp, ep) for g in gemms if g.scheme != "bf16"}
    for op, n, k, e, top_k, tp, ep in sorted(seen)[::5]:
        ep = ep if e % ep == 0 else 1
        line = f"--arch gfx942 --op {op} --scheme w4a8 --m 16 --n {n} --k {k} --experts {e} --top-k {top_k}"
        line += f" --tp {tp} --ep {ep}"
        code, out, err = run(capsys, line + " --json")
        assert (code, err) == (0, ""), line
        assert json.loads(out)["planned"]["source"] in SOURCES
