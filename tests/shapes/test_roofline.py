"""Floors and limits."""

from __future__ import annotations

import random

import pytest

from sglang_amd_quant import shapes
from sglang_amd_quant.layouts.names import STRIDED
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.shapes.planner import Gemm, weight_bytes
from sglang_amd_quant.shapes.roofline import OFFSET_LIMIT, active_experts, bytes_moved


def only(card: str, layer: str, tp: int, scheme: str, **options: object) -> Gemm:
    gemms = shapes.plan(shapes.load(card), tp, scheme=scheme, **options)  # type: ignore[arg-type]
    return next(g for g in gemms if g.layer == layer)


def test_floor_of_the_qkv_that_aiter_3783_measures() -> None:
    """[2304, 6144] MXFP8 at M=1: 14.6 MB, 1.8 us at 8 TB/s."""
    qkv = only("MiniMax-M3", "self_attn.qkv_proj", 4, "mxfp8")
    assert qkv.bytes == 2304 * 6144 + 2304 * 6144 // 32
    assert shapes.floor_us(qkv, 1, 8.0) == pytest.approx(1.8, abs=0.05)


@pytest.mark.parametrize(
    ("scheme", "bytes_"),
    [("bf16", 2 * 64 * 256), ("mxfp8", 64 * 256 + 64 * 8), ("w4a8", 64 * 128 + 64 * 8), ("mxfp4", 64 * 128 + 64 * 8),
     ("int4_w4a16", 64 * 128 + 64 * 8 * 4)],
)  # fmt: skip
def test_weight_bytes_count_scales(scheme: str, bytes_: int) -> None:
    assert weight_bytes(scheme, 64, 256) == bytes_
    assert weight_bytes(scheme, 3, 64, 256) == 3 * bytes_
    assert scheme == "bf16" or STRIDED.nbytes(64, 256, SCHEMES[scheme]) == bytes_


@pytest.mark.parametrize("m", [1, 3, 40])
def test_active_experts_is_the_expectation_of_a_draw(m: int) -> None:
    """Against 4,000 draws of top_k distinct experts a token; 5 standard errors, the spread of a draw being below 4."""
    gemm = only("gpt-oss-120b", "mlp.experts.down_proj", 1, "w4a8")
    rng = random.Random(0)
    draws = [len({e for _ in range(m) for e in rng.sample(range(128), 4)}) for _ in range(4000)]
    assert active_experts(gemm, m) == pytest.approx(sum(draws) / len(draws), abs=5 * 4 / 4000**0.5)


def test_one_token_reads_top_k_experts_and_a_crowd_reads_all() -> None:
    up = only("DeepSeek-V3", "mlp.experts.gate_up_proj", 8, "w4a8")
    assert (up.E_local, up.top_k, up.shared) == (257, 9, 1)
    assert active_experts(up, 1) == pytest.approx(9)
    assert active_experts(up, 100_000) == pytest.approx(257)
    gemms = {g.layer: g for g in shapes.plan(shapes.load("DeepSeek-V3"), 8, 8, "w4a8")}
    assert active_experts(gemms["mlp.experts.gate_up_proj"], 1) == pytest.approx(8 / 8 + 1)


def test_bytes_moved_are_weights_activations_and_outputs() -> None:
    o = only("gpt-oss-120b", "self_attn.o_proj", 8, "w4a8")
    assert bytes_moved(o, 32) == o.bytes + 32 * 512 * (1 + 1 / 32) + 32 * 2880 * 2
    down = only("gpt-oss-120b", "mlp.experts.down_proj", 8, "mxfp4")
    weights = down.bytes * active_experts(down, 2) / 128
    assert bytes_moved(down, 2) == pytest.approx(weights + 2 * 4 * (384 * (0.5 + 1 / 32) + 2880 * 2))
    assert shapes.floor_us(down, 2, 5.3) == pytest.approx(bytes_moved(down, 2) / 5.3e6)


def test_limits_are_named() -> None:
    up = only("Kimi-K2", "mlp.experts.gate_up_proj", 1, "mxfp8")
    assert shapes.limits(up) == [f"{up.data_bytes / OFFSET_LIMIT:.2f} x 2^31 bytes: 64-bit offsets"]
    assert shapes.limits(only("Kimi-K2", "mlp.experts.gate_up_proj", 8, "mxfp8")) == []
    down, last = (only("gpt-oss-120b", "mlp.experts.down_proj", 8, "w4a8", rank=r) for r in (0, 7))
    assert shapes.limits(down, last) == ["last rank uses 192 of 384"]
    assert shapes.limits(down) == []
