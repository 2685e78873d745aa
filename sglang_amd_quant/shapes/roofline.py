"""The floor of a GEMM's time, and the limits it is near to. Modelled, never measured; no torch."""

from __future__ import annotations

from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.shapes.planner import Gemm, data_bytes

BANDWIDTH_TBPS: dict[str, float] = {
    "gfx950": 8.0,
    "gfx942": 5.3,
    "gfx1151": 0.256,
    "sm_90": 4.8,
}
"""Peak memory bandwidth in TB/s from the vendors' data sheets: MI355X, MI300X, Ryzen AI Max 395, H200."""

OFFSET_LIMIT = 2**31
"""Byte offsets of a raw-buffer load are signed 32 bit: weights this large need 64-bit addressing (aiter #3783)."""

NEAR = 0.9
"""Share of a limit from which on it is worth a word."""


def active_experts(gemm: Gemm, m: int) -> float:
    """Experts of this rank that m tokens reach, expected under uniform routing; fused shared ones always.

    A routed expert stays idle with probability (1 - top_k/E)^m: a token's top_k experts are distinct.
    """
    routed, top_k = gemm.E_total - gemm.shared, gemm.top_k - gemm.shared
    return (gemm.E_local - gemm.shared) * (1 - (1 - top_k / routed) ** m) + gemm.shared


def bytes_moved(gemm: Gemm, m: int) -> float:
    """Bytes that must cross the memory bus at least once for m tokens on this rank's group.

    Weights and scales of the active experts, the activations in (quantized as the scheme says) and bf16 out. Gate and
    up are taken as fused with the activation function where kernels may do that, so half of N is written.
    """
    moe = gemm.op != "linear"
    weights = gemm.bytes * (active_experts(gemm, m) / gemm.E_local if moe else 1.0)
    local = (gemm.E_local - gemm.shared) / max(1, gemm.E_total - gemm.shared)
    rows = m * ((gemm.top_k - gemm.shared) * local + gemm.shared) if moe else float(m)
    rows_in = rows if gemm.op == "moe_down" else min(rows, float(m))
    columns_out = gemm.N // 2 if gemm.op == "moe_gate_up" or gemm.activated else gemm.N
    return weights + rows_in * gemm.K * _act_bytes(gemm.scheme) + rows * columns_out * 2


def _act_bytes(scheme: str) -> float:
    """Bytes an activation element takes, its share of a scale included."""
    act = SCHEMES[scheme].act if scheme in SCHEMES else "bf16"
    return {"bf16": 2.0, "fp8_static": 1.0, "e4m3": 1 + 1 / 32, "e2m1": 0.5 + 1 / 32}[act]


def floor_us(gemm: Gemm, m: int, bandwidth_tbps: float) -> float:
    """Microseconds that one such GEMM takes at least: `bytes_moved` over the bandwidth."""
    return bytes_moved(gemm, m) / (bandwidth_tbps * 1e6)


def limits(gemm: Gemm, last: Gemm | None = None) -> list[str]:
    """What is near or over a limit, in words.

    Args:
        gemm: on any rank.
        last: the same on the last rank, to tell its remainder.
    """
    found = []
    if last is not None and (last.N_used, last.K_used) != (last.N, last.K):
        used, stored = (last.K_used, last.K) if last.K_used != last.K else (last.N_used // 2, last.N // 2)
        found.append(f"last rank uses {used} of {stored}" if used else f"last rank uses none of {stored}")
    if gemm.data_bytes >= OFFSET_LIMIT:
        found.append(f"{gemm.data_bytes / OFFSET_LIMIT:.2f} x 2^31 bytes: 64-bit offsets")
    elif gemm.data_bytes >= NEAR * OFFSET_LIMIT:
        found.append(f"{gemm.data_bytes / OFFSET_LIMIT:.1%} of 2^31 bytes")
    n, k = gemm.padded(256)
    if gemm.data_bytes < OFFSET_LIMIT <= data_bytes(gemm.scheme, gemm.E_local * n * k):
        found.append("over 2^31 bytes once padded to 256")
    return found
