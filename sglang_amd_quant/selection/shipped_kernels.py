"""The kernels that this package brings, with the envelopes that they really have.

What launches each is in `ops/hip.py` and `ops/triton_mx.py`, under the same name; which of them a device can launch is
`runtime/detect.py`'s to find out.
"""

from __future__ import annotations

from sglang_amd_quant.selection.buckets import routed_block_m
from sglang_amd_quant.selection.problem import Config, GemmProblem
from sglang_amd_quant.selection.specs import SHIPPED, KernelSpec, register

GPUS = ("gfx950", "gfx942", "gfx11", "sm_90")

_TILE = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (64, 128, 256, 512),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "nonkdim": (16, 32),
    "group_m": (1, 2, 4, 8, 16),
}


def _nonkdim(arch: str, block_m: int) -> int | None:
    """The 16 x 16 matrix instruction where a tile is one of them high; elsewhere Triton chooses."""
    return 16 if arch.startswith("gfx9") and block_m == 16 else None


def _dense_tile(problem: GemmProblem) -> Config:
    block_m = 16 if problem.m <= 16 else 64
    return Config(block_m, 64, 128, num_warps=4, num_stages=2, nonkdim=_nonkdim(problem.arch, block_m))


def _grouped_tile(problem: GemmProblem) -> Config:
    block_m = routed_block_m(problem)
    return Config(block_m, 64, 128, num_warps=4, num_stages=2, nonkdim=_nonkdim(problem.arch, block_m))


def _mx_gemm(name: str, ops: tuple[str, ...]) -> KernelSpec:
    return KernelSpec(
        name,
        SHIPPED,
        "kernels/triton/mx_gemm.py",
        archs=GPUS,
        schemes=("mxfp8", "w4a8", "mxfp4", "w4a16"),
        ops=ops,
        space=_TILE,
        configure=_dense_tile if ops == ("linear",) else _grouped_tile,
        triton=True,
        acts=("e4m3", "e2m1", "bf16", "fp8_static"),
        out_dtypes=("bf16", "fp16", "fp32"),
        fuses=("bias",),
        x_dtypes=("bf16",),
        dequantizes=True,
        k_multiple=32,
    )


SHIPPED_KERNELS = (
    KernelSpec(
        "gemv_mxfp4",
        SHIPPED,
        "kernels/hip/gemv_mxfp4.hip",
        archs=GPUS,
        schemes=("w4a16",),
        ops=("linear",),
        out_dtypes=("bf16", "fp32"),
        fuses=("bias",),
        x_dtypes=("bf16",),
        code_objects=("gemv_mxfp4",),
        m_max=4,
        k_multiple=32,
    ),
    _mx_gemm("triton_mx_gemm", ("linear",)),
    _mx_gemm("triton_mx_moe", ("moe_gate_up", "moe_down")),
)

for _spec in SHIPPED_KERNELS:
    register(_spec)
