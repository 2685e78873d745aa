from bisect import bisect_right
from dataclasses import replace

import pytest

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.runtime.decode_plans import plans
from sglang_amd_quant.selection import Config, Epilogue, GemmProblem, kernel, legal
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.hopper_decode import least_lds
from sglang_amd_quant.selection.legality import unfused

MOE = GemmProblem("moe_gate_up", "w4a8", "gfx950", 256, 5760, 2880, e_local=128, e_total=128, top_k=4)
TILE = Config(16, 128, 256, num_warps=4, num_stages=2, nonkdim=16)
A8W4 = kernel("triton_moe_a8w4")
DENSE = GemmProblem("linear", "mxfp8", "gfx950", 8, 6144, 6144)
M3 = GemmProblem("moe_gate_up", "mxfp8", "gfx950", 4, 1536, 6144, e_local=128, e_total=128, top_k=4)
INT4 = GemmProblem(
    "moe_gate_up",
    "int4_w4a16",
    "gfx11",
    994,
    1024,
    2048,
    e_local=256,
    e_total=256,
    top_k=8,
    group=128,
    layout="exllama",
)


def rules(problem, kernel_name, config):
    return [refusal.rule for refusal in legal(problem, kernel(kernel_name), config)]


def test_a_plain_tile_is_legal():
    assert rules(MOE, "triton_moe_a8w4", TILE) == []


@pytest.mark.parametrize(
    ("problem", "config", "expected"),
    [
        pytest.param({"layout": "cdna4_scale"}, {"block_k": 128}, ["layout_block"], id="BLOCK_K 128 under the swizzle"),
        pytest.param({"layout": "cdna4_scale"}, {"block_n": 16}, ["layout_block"], id="BLOCK_N 16 under the swizzle"),
        pytest.param({"layout": "strided"}, {"block_k": 128}, [], id="BLOCK_K 128 strided"),
        pytest.param({"layout": "preshuffle"}, {}, ["layout"], id="a layout it does not read"),
        pytest.param({}, {"num_warps": 1}, ["scaled_mma"], id="one wave never gets scaled MFMA"),
        pytest.param({}, {"block_k": 64}, ["scaled_mma"], id="16x16x128 needs BLOCK_K 128"),
        pytest.param({}, {"block_k": 64, "nonkdim": 32}, [], id="32x32x64 needs BLOCK_K 64"),
        pytest.param({}, {"block_m": 32, "block_n": 256, "block_k": 512}, ["lds"], id="184308 B of LDS"),
        pytest.param({"block_m": 32}, {}, ["block_m"], id="routing has fixed another BLOCK_M"),
        pytest.param({}, {"block_n": 96}, ["config"], id="no power of two"),
        pytest.param({}, {"num_stages": 0}, ["config"], id="no stages"),
        pytest.param({}, {"num_warps": 16}, ["config"], id="1024 lanes of 64 are 16 waves, but no config has them"),
        pytest.param({}, {"num_warps": None}, ["config"], id="not stated"),
        pytest.param({}, {"params": (("depth", 4),)}, ["config"], id="not a parameter of this kernel"),
        pytest.param({"act": "bf16"}, {}, ["act"], id="bf16 activations"),
        pytest.param({"arch": "gfx1250", "cu_count": 0}, {}, ["covers"], id="another arch"),
    ],
)
def test_tiles_of_the_grouped_triton_gemm(problem, config, expected):
    found = legal(replace(MOE, **problem), A8W4, TILE._replace(**config))
    assert [refusal.rule for refusal in found] == expected
    assert [refusal.estimate for refusal in found] == [rule == "lds" for rule in expected]


def test_mx_output_needs_32_columns_after_gating():
    gated = replace(MOE, out_dtype="mxfp8", epilogue=Epilogue(activation="swigluoai"))
    assert rules(gated, "triton_moe_a8w4", TILE._replace(block_n=32)) == ["mx_out"]
    assert rules(gated, "triton_moe_a8w4", TILE._replace(block_n=64)) == []
    plain = replace(MOE, out_dtype="mxfp8")
    assert rules(plain, "triton_moe_a8w4", TILE._replace(block_n=16)) == ["mx_out"]
    assert rules(plain, "triton_moe_a8w4", TILE._replace(block_n=32)) == []


def test_what_a_kernel_does_not_fuse_is_the_ops():
    asked = replace(M3, out_dtype="mxfp8", epilogue=Epilogue(bias=True, activation="silu"))
    assert unfused(asked, kernel("hip_mxfp8_moe")) == ("bias", "activation", "quantize")
    assert unfused(asked, A8W4) == ()
    dense = replace(DENSE, epilogue=Epilogue(bias=True, activation="silu"))
    assert unfused(dense, kernel("triton_gemm_mx")) == ("activation",)
    assert unfused(replace(asked, out_dtype="mxfp4"), A8W4) == ("quantize",)


def test_fp32_output_is_refused_where_only_bf16_is_stored():
    assert rules(replace(DENSE, out_dtype="fp32"), "hip_mxfp8_gemv", Config(block_n=8)) == ["out_dtype"]
    assert rules(replace(DENSE, out_dtype="fp32"), "reference", Config()) == []


@pytest.mark.parametrize(
    ("name", "change", "config", "expected"),
    [
        pytest.param("hip_mxfp8_gemv", {}, Config(block_n=8), [], id="gemv"),
        pytest.param("hip_mxfp8_gemv", {"m": 17}, Config(block_n=8), ["m"], id="gemv M 17"),
        pytest.param("hip_mxfp8_gemv", {"m": 3}, Config(block_n=8), [], id="gemv pads M 3"),
        pytest.param("hip_mxfp8_gemv", {"n": 6148}, Config(block_n=8), ["n"], id="gemv N tail"),
        pytest.param("hip_mxfp8_gemv", {"k": 6144 + 32}, Config(block_n=8), [], id="gemv K % 32"),
        pytest.param("hip_mxfp8_mfma", {"k": 6144 + 32}, Config(split_k=1, params=(("n_sub", 1),)), ["k"], id="mfma K"),
        pytest.param("hip_mxfp8_mfma", {"m": 24}, Config(split_k=1, params=(("n_sub", 1),)), ["m"], id="mfma M 24"),
        pytest.param(
            "hip_mxfp8_mfma", {"k": 768}, Config(split_k=4, params=(("n_sub", 1),)), ["split_k"], id="6 steps"
        ),
        pytest.param("hip_mxfp8_mfma", {"k": 768}, Config(split_k=2, params=(("n_sub", 1),)), [], id="2 into 6"),
        pytest.param("hip_mxfp8_mfma", {}, Config(split_k=1), ["config"], id="n_sub not stated"),
        pytest.param("hip_mxfp8_gemv", {"n": 2**19, "k": 4096}, Config(block_n=8), ["index"], id="2 GiB weight"),
        pytest.param("hip_mxfp8_gemv", {"n": 2**19 - 8, "k": 4096}, Config(block_n=8), [], id="just below 2 GiB"),
    ],
)
def test_dense_hip_envelopes(name, change, config, expected):
    assert rules(replace(DENSE, **change), name, config) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, [], id="TP4 gate_up"),
        pytest.param({"op": "moe_down", "n": 6144, "k": 768}, [], id="TP4 down, K 768"),
        pytest.param({"op": "moe_down", "n": 6144, "k": 384}, ["k"], id="TP8 down, K 384: not supported by the seed"),
        pytest.param({"top_k": 5, "e_local": 129, "e_total": 129}, ["a_div"], id="fused shared expert: a_div 5"),
        pytest.param({"n": 3072, "e_local": 129, "e_total": 129, "top_k": 4}, ["index"], id="TP2, 129 experts: 2.43e9"),
        pytest.param({"n": 6144, "e_local": 64, "top_k": 4}, ["index"], id="EP2 unsharded: 2.42e9"),
        pytest.param({"n": 6144, "e_local": 32, "top_k": 4}, [], id="EP4 unsharded: 1.21e9"),
    ],
)
def test_grouped_hip_envelope(change, expected):
    problem = replace(M3, **change)
    spec = kernel("hip_mxfp8_moe")
    assert rules(problem, "hip_mxfp8_moe", spec.configure(problem)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"group": 32}, ["group"]),
        ({"n": 1024 + 128}, ["n"]),
        ({"layout": "strided"}, ["layout"]),
        ({"op": "moe_down", "n": 2048, "k": 512}, []),
        ({"op": "moe_down", "n": 2048 + 256, "k": 512}, ["n"]),
        ({"top_k": 4}, ["a_div"]),
    ],
)
def test_predicate_of_the_gfx11_prefill_kernel(change, expected):
    problem = replace(INT4, **change)
    assert rules(problem, "hip_moe_w4a16_wmma", kernel("hip_moe_w4a16_wmma").configure(problem)) == expected


@pytest.mark.parametrize(
    ("tile", "registers", "expected"),
    [((8, 128, 64), 64, []), ((16, 128, 64), 64, []), ((32, 128, 64), 64, ["registers"]),
     ((128, 128, 64), 128, ["registers"]), ((128, 128, 64), 0, [])],
)  # fmt: skip
def test_a_limit_of_registers_leaves_room_for_the_sums(tile, registers, expected):
    """A thread of four warps holds BLOCK_M BLOCK_N / 128 sums; ptxas refuses 128 x 128 at 80 registers."""
    problem = replace(MOE, arch="sm_90", cu_count=132, layout="hopper_e4m3")
    config = Config(*tile, num_warps=4, num_stages=4, params=(("max_registers", registers),))
    assert rules(problem, "triton_hopper_e4m3", config) == expected


def test_gfx942_has_no_scaled_matrix_unit_to_lose():
    assert rules(replace(MOE, arch="gfx942", cu_count=304), "triton_moe_a8w4", TILE._replace(num_warps=1)) == []


@pytest.mark.parametrize(
    ("scheme", "layout", "group"),
    [
        ("w4a16", "hopper_bf16", 0), ("mxfp8", "hopper_e4m3", 0), ("w4a8", "hopper_e4m3", 0),
        *(("int4_w4a16", "mma_int4+tile_group", group) for group in (32, 64, 128)),
    ],
)  # fmt: skip
def test_decode_is_legal_only_where_it_has_a_plan(scheme, layout, group):
    """Shared memory holds the activations of a cluster's share of K: legality knows without the planner."""
    spec, name = kernel("hip_decode" if scheme == "w4a16" else "hip_decode_e4m3"), scheme
    if group:
        spec, name = kernel("hip_decode_int4"), f"{scheme}_g{group}"
    for m in (1, 2, 3, 8, 9, 16, 17, 32, 64):
        for k in (128, 384, 2048, 16384, 28672, 65536):
            problem = GemmProblem("linear", scheme, "sm_90", m, 4096, k, layout=layout, group=group)
            if not legal(problem, spec, spec.configure(problem)):
                assert plans(name, m, 4096, k, 132)
            else:
                assert k > 16384
                with pytest.raises(ShapeError):
                    plans(name, m, 4096, 2 * k, 132)
    for m in (1, 4, 8):
        step = group or 32
        ks = range(step, 1 << 18, step)
        room = bisect_right(ks, ARCHES["sm_90"].lds_bytes, key=lambda k, m=m: least_lds(name, m, k))
        assert plans(name, m, 4096, ks[room - 1], 132)


def test_a_layout_of_another_arch_is_refused_by_name():
    layout = "rdna_int4+tile_group"
    problem = GemmProblem("linear", "int4_w4a16", "gfx942", m=64, n=512, k=1024, layout=layout, group=128)
    told = [refusal.text for refusal in legal(problem, kernel("triton_int4_gemm"), Config(64, 128, 128))]
    assert f"reads {layout} weights on gfx11, not on gfx942" in told
