"""The kernel families that selection knows today: the seeds' published ones, and the torch reference.

An envelope states what its source states. `published` families have no binary here (see `KernelSpec.status`); a kernel
of this project registers a spec of its own, under its own name, with the envelope that it really has.
"""

from __future__ import annotations

from sglang_amd_quant.selection.buckets import routed_block_m
from sglang_amd_quant.selection.problem import OUT_DTYPES, Config, GemmProblem
from sglang_amd_quant.selection.specs import PUBLISHED, SHIPPED, KernelSpec, register

_TILE = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256, 512),
    "block_k": (64, 128, 256, 512, 1024),
    "split_k": (1,),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "waves_per_eu": (0, 1, 2, 3, 4, 6, 8),
    "nonkdim": (16, 32),
    "kpack": (1, 2),
}

_CDNA4 = ("cdna4_scale", "cdna4_scale_256")


def _tile(block_m: int) -> Config:
    """aiter #3580's conservative default, its last resort before giving up."""
    return Config(block_m, 128, 256, 1, num_warps=4, num_stages=2, waves_per_eu=0, nonkdim=16)


def _moe_tile(problem: GemmProblem) -> Config:
    return _tile(routed_block_m(problem))


def _gemv(problem: GemmProblem) -> Config:
    """aiter #3783: BLOCK_N 8, but 4 where K >= 6144 and M <= 8."""
    return Config(block_n=4 if problem.k >= 6144 and problem.m <= 8 else 8)


def _mfma(problem: GemmProblem) -> Config:
    """aiter #3783: n_sub 1, and the larger of 4 and 2 that divides the K steps of 128."""
    steps = problem.k // 128
    return Config(split_k=next((s for s in (4, 2) if steps % s == 0), 1), params=(("n_sub", 1),))


def _moe_gemv(problem: GemmProblem) -> Config:
    """aiter #3783: BLOCK_N 16 for the down GEMM (8-13 % over 8), 8 for gate_up."""
    return Config(block_m=routed_block_m(problem), block_n=16 if problem.op == "moe_down" else 8)


def _wmma(problem: GemmProblem) -> Config:
    """ROCm/vllm #1015: BLOCK_M 32 for both GEMMs; tile N 256 and K step 32, or 512 and 64 where top_k is 1."""
    return Config(32, 256, 32) if problem.a_div == 8 else Config(32, 512, 64)


FAMILIES = (
    KernelSpec(
        "hip_mxfp8_gemv",
        PUBLISHED,
        "aiter #3783 smallm_mxfp8_gemv",
        archs=("gfx950",),
        schemes=("mxfp8",),
        ops=("linear",),
        space={"block_n": (4, 8)},
        configure=_gemv,
        m_max=16,
        k_multiple=32,
        n_whole=True,
        index_bits=32,
    ),
    KernelSpec(
        "hip_mxfp8_mfma",
        PUBLISHED,
        "aiter #3783 smallm_mxfp8_mfma",
        archs=("gfx950",),
        schemes=("mxfp8",),
        ops=("linear",),
        space={"split_k": (1, 2, 4, 8), "n_sub": (1, 2, 4)},
        configure=_mfma,
        m_values=(8, 16, 32, 64),
        k_multiple=128,
        n_whole=True,
        index_bits=32,
    ),
    KernelSpec(
        "hip_mxfp8_moe",
        PUBLISHED,
        "aiter #3783 smallm_mxfp8_moe_grouped_gemm",
        archs=("gfx950",),
        schemes=("mxfp8",),
        ops=("moe_gate_up", "moe_down"),
        space={"block_m": (4, 8, 16, 32, 64, 128), "block_n": (8, 16)},
        configure=_moe_gemv,
        k_multiple=1024,
        k_also=(768,),
        n_whole=True,
        a_divs=(1, 4, 8),
        block_m_multiple=4,
        index_bits=32,
    ),
    KernelSpec(
        "triton_moe_a8w4",
        PUBLISHED,
        "aiter #3580 moe_op_gemm_a8w4",
        archs=("gfx950", "gfx942", "gfx11", "sm_90"),
        schemes=("w4a8",),
        ops=("moe_gate_up", "moe_down"),
        layouts=("strided", *_CDNA4),
        space=_TILE,
        configure=_moe_tile,
        triton=True,
        acts=("e4m3", "fp8_static"),
        out_dtypes=("bf16", "fp16", "fp32", "mxfp8", "fp8_static"),
        fuses=("bias", "activation", "quantize"),
    ),
    KernelSpec(
        "triton_moe_mxfp8",
        PUBLISHED,
        "sglang 0.5.23 kernels/ops/moe/mxfp8_moe_amd_gfx95.py",
        archs=("gfx950",),
        schemes=("mxfp8",),
        ops=("moe_gate_up", "moe_down"),
        space=_TILE,
        configure=_moe_tile,
        triton=True,
        out_dtypes=("bf16", "fp16"),
    ),
    KernelSpec(
        "triton_gemm_mx",
        PUBLISHED,
        "Triton dot_scaled, the baseline of aiter #3783",
        archs=("gfx950", "gfx942", "gfx11", "sm_90"),
        schemes=("mxfp8", "w4a8", "mxfp4", "w4a16"),
        ops=("linear",),
        space=_TILE,
        configure=_moe_tile,
        triton=True,
        out_dtypes=("bf16", "fp16", "fp32"),
        fuses=("bias",),
    ),
    KernelSpec(
        "hip_moe_w4a16_wmma",
        PUBLISHED,
        "ROCm/vllm #1015 moe_gemm_w4a16",
        archs=("gfx11",),
        schemes=("int4_w4a16",),
        ops=("moe_gate_up", "moe_down"),
        layouts=("exllama",),
        space={"block_m": (32,), "block_n": (256, 512), "block_k": (32, 64)},
        configure=_wmma,
        groups=(128,),
        k_multiple=128,
        n_whole=True,
        a_divs=(1, 8),
        block_n_for=((8, 256), (1, 512)),
        block_m_multiple=32,
        index_bits=32,  # not stated by the source: the narrower reading is the safe one
    ),
    KernelSpec(
        "triton_moe_w4a16",
        PUBLISHED,
        "vLLM fused_moe_kernel_gptq_awq, the fallback of ROCm/vllm #1015",
        archs=("gfx11", "gfx942", "gfx950"),
        schemes=("int4_w4a16",),
        ops=("moe_gate_up", "moe_down"),
        layouts=("exllama", "strided"),
        space=_TILE,
        configure=_moe_tile,
        triton=True,
        out_dtypes=("bf16", "fp16"),
    ),
    KernelSpec(
        "reference",
        SHIPPED,
        "torch: dequantize the same bits, accumulate in fp32",
        layouts=(),
        out_dtypes=OUT_DTYPES,
        fuses=("bias", "activation", "quantize"),
    ),
)

for _spec in FAMILIES:
    register(_spec)
