"""`amd-mx doctor`: what it reports here, and what it finds missing."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from sglang_amd_quant.cli import doctor
from sglang_amd_quant.cli.main import main
from sglang_amd_quant.integration import versions
from sglang_amd_quant.runtime.detect import launchable
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import GemmProblem, Selector
from sglang_amd_quant.selection.choose import process_selector
from sglang_amd_quant.selection.explain import view


def test_this_environment_can_serve(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "serves on cpu" in text
    assert "no problems found" in text
    assert "--attention-backend torch_native" in text
    assert "linear: reference (reference): mxfp4, mxfp8, w4a8, w4a16, int4_w4a16 at M 1, 64, 2048" in text
    assert "experts down: reference" in text


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arch"] == "cpu"
    assert {row["scheme"] for row in found["kernels"]} == {"mxfp4", "mxfp8", "w4a8", "w4a16", "int4_w4a16"}
    assert found["problems"] == []


@pytest.fixture
def without_code_objects(monkeypatch, tmp_path):
    """An installation whose HIP kernels were not built."""
    from sglang_amd_quant.runtime import detect

    for function in (detect.launchable, detect.missing):
        monkeypatch.setattr(function.__wrapped__, "__defaults__", (tmp_path,))
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in (detect.launchable, detect.missing):
        function.cache_clear()


def test_another_arch(capsys):
    assert main(["doctor", "--arch", "gfx950"]) == 0
    text = capsys.readouterr().out
    assert "serves on gfx950 (asked for)" in text
    assert "--attention-backend aiter or triton" in text
    assert "linear: triton_mx_gemm (heuristic)" in text
    assert "experts gate_up: triton_moe (heuristic)" in text


@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx11", "sm_90"])
def test_linears_run_what_explain_says_runs_here(arch):
    """On weights as load time lays them out, which not every kernel reads."""
    selector = Selector(available=launchable(arch))
    for row in doctor.diagnose(arch).kernels:
        if row["op"] == "linear":
            group = SCHEMES[row["scheme"]].served_block(doctor.LINEAR["k"])
            problem = GemmProblem(scheme=row["scheme"], arch=arch, m=row["M"], group=group, **doctor.LINEAR)
            assert row["kernel"] == view(problem, selector).choice.kernel, row


def test_experts_run_on_weights_as_they_are_laid_out():
    (row,) = (
        row
        for row in doctor.diagnose("sm_90").kernels
        if (row["scheme"], row["op"], row["M"]) == ("mxfp8", "experts down", 2048)
    )
    assert row["kernel"] == "triton_hopper_e4m3"


def test_kernels_that_were_not_built(without_code_objects, capsys):
    assert main(["doctor", "--arch", "gfx950", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "amd-mx build --arch gfx950" in found["not_launched"]["gemv_mxfp4"]
    w4a16 = {"triton_e2m1_bf16_gemm", "triton_e2m1_bf16_moe"}
    triton = {"triton_mx_gemm", "triton_moe", "triton_int4_gemm", "triton_int4_moe", *w4a16}
    assert {row["kernel"] for row in found["kernels"]} == triton
    assert main(["doctor", "--arch", "gfx950"]) == 0
    assert "gemv_mxfp4: code object" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["torch", "sglang", "triton"])
def test_missing_package(monkeypatch, capsys, missing):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == missing else real(name))
    if missing == "sglang":
        monkeypatch.setattr(versions, "sglang_version", lambda: None)
    assert main(["doctor"]) == 1
    assert f"PROBLEM: {missing} is not installed; install" in capsys.readouterr().out


def test_untested_sglang(monkeypatch, capsys):
    monkeypatch.setattr(versions, "sglang_version", lambda: versions.Version("0.6.0"))
    assert main(["doctor"]) == 1
    assert "PROBLEM: sglang 0.6.0 was not tested" in capsys.readouterr().out
    monkeypatch.setenv(versions.OVERRIDE, "1")
    assert main(["doctor"]) == 0


def test_plugin_left_out_by_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert main(["doctor"]) == 1
    assert "set SGLANG_PLUGINS=other,amd_mx" in capsys.readouterr().out


def test_no_cpu_platform(monkeypatch, capsys):
    real = importlib.metadata.entry_points
    hidden = lambda **query: [] if query["group"] == "sglang.srt.platforms" else real(**query)
    monkeypatch.setattr(importlib.metadata, "entry_points", hidden)
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert main(["doctor"]) == 1
    assert "no CPU platform is installed; pip install sglang-amd-quant-cpu" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["SGLANG_AMD_MX_RECIPE", "SGLANG_AMD_MX_PACKS"])
def test_settings_that_a_server_would_refuse(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "/nowhere")
    process_selector.cache_clear()
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "serves on cpu" in text
    assert "PROBLEM: /nowhere: " in text
