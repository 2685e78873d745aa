import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from sglang_amd_quant import shapes
from sglang_amd_quant.selection import SOURCES, GemmProblem, Selector, shipped
from sglang_amd_quant.selection.choose import REFERENCE
from sglang_amd_quant.selection.coverage import coverage, problem_of, recorded
from sglang_amd_quant.selection.explain import explain
from sglang_amd_quant.selection.heatmap import COLOURS, LETTERS, MEANING, html
from sglang_amd_quant.selection.packs import Packs

MS = (1, 64, 8192)


@pytest.fixture(scope="module")
def report():
    return coverage(shapes.load("gpt-oss-120b"), "gfx950", 4, 1, "w4a8", MS)


def test_every_quantized_gemm_of_the_plan_has_a_cell_for_every_m(report):
    gemms = [g for g in shapes.plan(shapes.load("gpt-oss-120b"), 4, 1, "w4a8") if g.scheme != "bf16"]
    assert sum(row.count for row in report.rows) == sum(g.count for g in gemms)
    assert {problem_of(g, "gfx950", 1, 4, 1) for g in gemms} == {
        replace(row.problem, layout=None) for row in report.rows
    }
    assert all(tuple(row.choices) == MS for row in report.rows)
    assert set(report.bf16) == {"mlp.router", "lm_head"}
    assert sum(report.totals().values()) == len(report.choices) == len(report.rows) * len(MS)


def test_figures_follow_from_the_cells(report):
    exact = [choice for choice in report.choices if choice.source == "exact"]
    assert report.totals()["exact"] == len(exact) == 2  # gate_up and down at M=8192: #3580's BLOCK_M 128
    assert report.tuned_percent == pytest.approx(100 * 2 / len(report.choices))
    assert len(report.misses()) == len(report.choices) - 2
    # Linears are planned on kernels of this package, on the layout of its decode kernels; experts on published ones.
    assert report.without_binary == sum(len(row.choices) for row in report.rows if row.problem.moe)
    here = coverage(
        shapes.load("gpt-oss-120b"), "gfx950", 4, 1, "w4a8", MS, Selector(available=shipped())
    )  # fmt: skip
    decode = len(report.rows)  # at M=1, dense and grouped
    rest = len(report.choices) - decode
    assert here.totals() == {**dict.fromkeys(SOURCES, 0), "rule": decode, "heuristic": rest}
    assert here.without_binary == 0


@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx1100", "sm_90"])
def test_a_dense_gate_up_is_one_gemm_with_silu_where_kernels_do_it(arch):
    def of(layer, selector=None):
        report = coverage(shapes.load("Llama-3.1-8B"), arch, 1, 1, "w4a8", MS, selector)
        return next(row for row in report.rows if layer in row.layers)

    gate_up = of("mlp.gate_up_proj")
    assert gate_up.problem.epilogue.activation == "silu"
    assert gate_up.label.endswith(" + silu")
    assert all("activation" not in choice.unfused for choice in gate_up.choices.values())
    assert of("mlp.down_proj").problem.epilogue.activation is None
    assert of("mlp.gate_up_proj", Selector(available=frozenset({REFERENCE}))).problem.epilogue.activation is None


def test_a_report_without_cells_is_fully_tuned():
    report = coverage(shapes.load("Llama-3.1-8B"), "gfx950", 1, 1, "bf16", MS)
    assert (report.rows, report.tuned_percent) == ((), 100.0)
    assert "<svg" in html(report)


def test_the_heat_map_is_one_well_formed_self_contained_file(report):
    text = html(report)
    assert text.startswith("<!doctype html>")
    assert "http" not in text.replace("http://www.w3.org", "")
    body = ET.fromstring(text.partition("<!doctype html>\n")[2].replace('<meta charset="utf-8">', ""))
    cells = body.findall(".//g/title")
    assert len(cells) == len(report.choices)
    assert sum("exact: triton_moe_a8w4" in (cell.text or "") for cell in cells) == 2
    legend = "".join(body.find(".//table").itertext())
    assert all(source in legend and MEANING[source] in legend for source in SOURCES)


def test_sources_can_be_told_apart():
    """Letters and colours differ; letters on their colours reach the 4.5 : 1 of WCAG AA."""
    assert len(set(LETTERS.values())) == len(set(COLOURS.values())) == len(SOURCES)

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    from sglang_amd_quant.selection.heatmap import _DARK

    for source, colour in COLOURS.items():
        high, low = sorted((luminance(colour), 1.0 if source in _DARK else luminance("#1b1f24")), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, source


def test_recorded_report_shows_what_ran():
    problem = GemmProblem("linear", "w4a8", "gfx950", 1, 2048, 4096)
    select = Selector(Packs([]))
    report = recorded([(replace(problem, m=m), select(replace(problem, m=m))) for m in (64, 1)], "trace")
    assert (report.ms, len(report.rows), report.recorded) == ((1, 64), 1, True)
    assert [choice.source for choice in report.choices] == ["rule", "heuristic"]
    assert "recorded" in html(report)


def test_explain_says_plan_build_and_every_refusal():
    problem = GemmProblem("linear", "mxfp8", "gfx950", 100, 2304, 6144, layout="strided")
    explanation = explain(problem)
    assert explanation.planned.choice.kernel == "triton_gemm_mx"
    assert explanation.here.choice.kernel == "triton_mx_gemm"
    text = explanation.text()
    assert "no kernel binary of triton_gemm_mx in this build" in text
    for kernel in ("hip_mxfp8_gemv", "hip_mxfp8_mfma"):
        assert kernel in text
    assert "M=100 is none of 8, 16, 32, 64" in text


def test_explain_names_kernels_that_nothing_speaks_for():
    strided = GemmProblem("linear", "mxfp8", "gfx950", 32, 2048, 4096, layout="strided")
    others = {other.kernel: other for other in explain(strided).others}
    assert set(others) >= {"hip_mxfp8_mfma", "hip_decode_e4m3", "triton_mx_gemm"}
    assert others["hip_mxfp8_mfma"].why == ("legal here, but no entry, rule or heuristic speaks for it",)
    assert others["triton_mx_gemm"].why == ("legal here, but the lookup took an earlier candidate",)
    others = explain(GemmProblem("linear", "mxfp8", "sm_90", 32, 2048, 4096)).others
    published = [other for other in others if other.kernel.startswith("hip_mxfp8")]
    assert {other.kernel for other in published} == {"hip_mxfp8_gemv", "hip_mxfp8_mfma"}
    assert all("not mxfp8 linear sm_90" in other.why[0] for other in published)


def test_explain_says_what_cannot_be_launched():
    problem = GemmProblem("linear", "w4a16", "gfx950", 1, 2048, 4096, layout="strided")
    missing = {"gemv_mxfp4": "code object gemv_mxfp4 was not built", "triton_mx_moe": "another op's"}
    explanation = explain(problem, here=Selector(available={"triton_mx_gemm"}), lacking=missing)
    assert explanation.planned.choice.kernel == "gemv_mxfp4"
    assert explanation.here.choice.kernel == "triton_mx_gemm"
    assert "gemv_mxfp4 cannot be launched here: code object gemv_mxfp4 was not built" in explanation.text()
    assert explanation.to_json()["lacking"] == {"gemv_mxfp4": missing["gemv_mxfp4"]}


def test_explain_agrees_with_coverage(report):
    for row in report.rows:
        for m, choice in row.choices.items():
            explanation = explain(replace(row.problem, m=m, layout=None))
            assert explanation.planned.choice == choice
            assert explanation.planned.layout.layout == row.layout.layout
