"""Everyday kernels of a model server, compiled by Triton for every architecture, executed, compared with numpy."""

import math

import numpy as np
import pytest
import torch
from emulator import REVERSED, random_schedule, uninitialised

pytest.importorskip("triton")
import triton_corpus as corpus
from triton_running import ARCHES, EPS, bf16_bits, bf16_values, run


@pytest.mark.parametrize("arch", ARCHES)
def test_histogram_by_atomics(arch):
    compiled = corpus.compile_kernel(corpus.histogram, arch, {"x": "*i32", "counts": "*i32", "n": "i32"}, {"B": 256})
    x = np.random.default_rng(10).integers(0, 17, 1000).astype(np.int32)
    counts = np.zeros(17, np.int32)
    run(compiled, (4,), [x, counts, 1000])
    assert np.array_equal(counts, np.bincount(x, minlength=17))


@pytest.mark.parametrize("arch", ARCHES)
def test_transpose(arch):
    compiled = corpus.compile_kernel(
        corpus.transpose, arch, {"x": "*bf16", "y": "*bf16", "N": "i32"}, {"BM": 64, "BN": 64}
    )
    x = np.random.default_rng(11).integers(0, 1 << 16, (64, 64)).astype(np.uint16)
    y = np.empty_like(x)
    run(compiled, (1,), [x, uninitialised(y), 64])
    assert np.array_equal(y, x.T)


CASTS = [
    ("fp32", "bf16"),
    ("fp32", "fp16"),
    ("fp32", "fp8e4nv"),
    ("fp32", "fp8e5"),
    ("bf16", "fp8e4nv"),
    ("fp8e4nv", "fp32"),
    ("fp8e4nv", "bf16"),
    ("fp8e5", "bf16"),
    ("fp32", "i32"),
    ("i8", "fp32"),
]
TORCH = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "i32": torch.int32,
    "i8": torch.int8,
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("source", "target"), CASTS)
def test_cast(arch, source, target):
    """Triton's conversions against torch's, bit for bit, on finite values that the target can hold."""
    compiled = corpus.compile_kernel(corpus.cast, arch, {"x": f"*{source}", "y": f"*{target}", "n": "i32"}, {"B": 512})
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(1000, generator=generator) * 16
    x = x.clamp(-100, 100).to(TORCH[source])
    x[:4] = torch.tensor([0.0, 1.0, -2.0, 0.5]).to(TORCH[source])
    expected = x.to(torch.float32).to(TORCH[target])
    raw = x.view(torch.uint8).numpy().copy()
    y = np.empty(1000 * expected.element_size(), np.uint8)
    run(compiled, (2,), [raw, uninitialised(y), 1000])
    assert np.array_equal(y, expected.view(torch.uint8).numpy())


@pytest.mark.parametrize("arch", ARCHES)
def test_layernorm(arch):
    signature = {"x": "*fp32", "w": "*fp32", "b": "*fp32", "y": "*fp32", "n": "i32", "eps": "fp32"}
    compiled = corpus.compile_kernel(corpus.layernorm, arch, signature, {"B": 512})
    rng = np.random.default_rng(13)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((3, 500), 500, 500))
    y = np.empty_like(x)
    run(compiled, (3,), [x, w, b, uninitialised(y), 500, 1e-5])
    wide = x.astype(np.float64)
    centred = wide - wide.mean(1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * w + b
    # Sums of 512 by a tree: 9 roundings; v_sqrt and v_rcp are good to an ulp.
    np.testing.assert_allclose(y, exact, rtol=32 * EPS, atol=32 * EPS * np.abs(w).max() * 4)


@pytest.mark.parametrize("arch", ARCHES)
def test_logsumexp(arch):
    compiled = corpus.compile_kernel(corpus.logsumexp, arch, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"B": 256})
    x = np.random.default_rng(14).standard_normal((4, 1000)).astype(np.float32) * 4
    y = np.empty(4, np.float32)
    run(compiled, (4,), [x, uninitialised(y), 1000])
    # exp rounds its argument in base 2; sums are a tree of 8 steps in each of 4 blocks; one logarithm
    np.testing.assert_allclose(y, np.log(np.exp(x.astype(np.float64)).sum(1)), rtol=32 * EPS)


@pytest.mark.parametrize("arch", ARCHES)
def test_silu_mul(arch):
    compiled = corpus.compile_kernel(corpus.silu_mul, arch, {"x": "*bf16", "y": "*bf16", "n": "i32"}, {"B": 512})
    x = bf16_bits(np.random.default_rng(15).standard_normal((3, 2 * 300)) * 2)
    y = np.empty((3, 300), np.uint16)
    run(compiled, (3,), [x, uninitialised(y), 300])
    gate, up = np.split(bf16_values(x), 2, axis=1)
    np.testing.assert_allclose(bf16_values(y), gate / (1 + np.exp(-gate)) * up, rtol=2.0**-8 + 64 * EPS)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp16", "i32"])
def test_extremes_of_rows_and_columns(arch, dtype):
    signature = {"x": f"*{dtype}", "top": f"*{dtype}", "bottom": f"*{dtype}"}
    compiled = corpus.compile_kernel(corpus.row_extremes, arch, signature, {"N": 128, "M": 16})
    kind = {"fp16": np.float16, "i32": np.int32}[dtype]
    x = (np.random.default_rng(16).standard_normal((16, 128)) * 1000).astype(kind)
    top, bottom = np.empty(16, kind), np.empty(128, kind)
    run(compiled, (1,), [x, uninitialised(top), uninitialised(bottom)])
    assert np.array_equal(top, x.max(1))
    assert np.array_equal(bottom, x.min(0))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "i32"])
def test_sort(arch, dtype):
    compiled = corpus.compile_kernel(corpus.sort_rows, arch, {"x": f"*{dtype}", "y": f"*{dtype}"}, {"N": 64, "M": 8})
    x = (np.random.default_rng(17).standard_normal((8, 64)) * 1000).astype({"fp32": np.float32, "i32": np.int32}[dtype])
    y = np.empty_like(x)
    run(compiled, (1,), [x, uninitialised(y)])
    assert np.array_equal(y, np.sort(x, 1))


@pytest.mark.parametrize("arch", ARCHES)
def test_gather(arch):
    signature = {"table": "*bf16", "rows": "*i64", "y": "*bf16", "n": "i32"}
    compiled = corpus.compile_kernel(corpus.gather_rows, arch, signature, {"B": 256})
    rng = np.random.default_rng(18)
    table, rows = rng.integers(0, 1 << 16, (50, 200)).astype(np.uint16), rng.integers(0, 50, 7)
    y = np.empty((7, 200), np.uint16)
    counters = run(compiled, (7,), [table, rows, uninitialised(y), 200])
    assert np.array_equal(y, table[rows])
    assert counters.traffic[0].loaded_distinct == 400 * len(set(rows.tolist()))


def philox(seed, counter):
    """First word of Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    word = 0xFFFFFFFF
    c = [counter.astype(np.uint64), *(np.zeros_like(counter, np.uint64) for _ in range(3))]
    k0, k1 = seed & word, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high0, high1 = (p >> np.uint64(32) for p in (p0, p1))
        low0, low1 = (p & np.uint64(word) for p in (p0, p1))
        c = [high1 ^ c[1] ^ np.uint64(k0), low1, high0 ^ c[3] ^ np.uint64(k1), low0]
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c[0].astype(np.uint32)


@pytest.mark.parametrize("arch", ARCHES)
def test_random_numbers(arch):
    compiled = corpus.compile_kernel(corpus.uniform, arch, {"y": "*fp32", "seed": "i64"}, {"B": 256})
    y = np.empty(512, np.float32)
    run(compiled, (2,), [uninitialised(y), 0x123456789AB])
    bits = philox(0x123456789AB, np.arange(512)).view(np.int32)
    expected = np.where(bits < 0, -(bits + 1), bits).astype(np.float32) * np.float32(4.6566127342e-10)
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["i16", "i32", "i64"])
def test_integer_arithmetic(arch, dtype):
    kind = {"i16": np.int16, "i32": np.int32, "i64": np.int64}[dtype]
    compiled = corpus.compile_kernel(corpus.integer_math, arch, dict.fromkeys("xzy", f"*{dtype}"), {"B": 128})
    rng, limits = np.random.default_rng(19), np.iinfo(kind)
    a = rng.integers(limits.min, limits.max, 128, dtype=kind)
    b = (rng.integers(1, limits.max, 128, dtype=kind) >> rng.integers(0, limits.bits - 2, 128).astype(kind)) | 1
    y = np.empty((4, 128), kind)
    run(compiled, (1,), [a, b.astype(kind), uninitialised(y)])
    quotient = np.array([_truncated(p, q) for p, q in zip(a, b, strict=True)])
    assert np.array_equal(y[0], quotient.astype(kind))
    with np.errstate(over="ignore"):
        assert np.array_equal(y[1], (a - quotient.astype(kind) * b).astype(kind))
        assert np.array_equal(y[2], a * b)
        assert np.array_equal(y[3], (a << (b & 15)) ^ (a >> (b & 15)))


@pytest.mark.parametrize("arch", ARCHES)
def test_functions(arch):
    compiled = corpus.compile_kernel(corpus.functions, arch, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"B": 512})
    x = (np.random.default_rng(20).standard_normal(500) * 5).astype(np.float32)
    y = np.empty((9, 500), np.float32)
    run(compiled, (1,), [x, uninitialised(y), 500])
    v = x.astype(np.float64)
    erf = np.array([math.erf(t) for t in v])
    exact = np.stack([np.exp(v), np.log(np.abs(v) + 1e-3), np.sqrt(np.abs(v)), np.sin(v), np.cos(v), erf, np.exp2(v)])
    # exp: an argument up to 25 in base 2, rounded; log, sin, cos and erf are within a few ulps, absolute near a zero.
    np.testing.assert_allclose(y[:7], exact, rtol=64 * EPS, atol=8 * EPS)
    assert np.array_equal(y[2], np.sqrt(np.abs(x)))  # correctly rounded
    assert np.array_equal(y[7], np.floor(x))
    square = x * x + np.float32(1)
    fused = (v * v + 1).astype(np.float32)  # whether x * x + 1 is contracted is the compiler's choice
    assert np.all((y[8] == x / square) | (y[8] == x / fused))


@pytest.mark.parametrize("arch", ARCHES)
def test_running_maximum(arch):
    compiled = corpus.compile_kernel(corpus.running_maximum, arch, {"x": "*i32", "y": "*i32", "n": "i32"}, {"B": 1024})
    x = np.random.default_rng(21).integers(-(1 << 20), 1 << 20, 1000).astype(np.int32)
    y = np.empty_like(x)
    run(compiled, (1,), [x, uninitialised(y), 1000])
    assert np.array_equal(y, np.maximum.accumulate(x))


@pytest.mark.parametrize("arch", ARCHES)
def test_rearrangement(arch):
    compiled = corpus.compile_kernel(corpus.rearrange, arch, {"x": "*u8", "y": "*u8"}, {"B": 1024})
    x = np.random.default_rng(22).integers(0, 256, 1024, dtype=np.uint8)
    y = np.empty_like(x)
    run(compiled, (1,), [x, uninitialised(y)])
    assert np.array_equal(y, x.reshape(-1, 2)[:, ::-1].reshape(4, 256).T.reshape(-1)[::-1])


@pytest.mark.parametrize("arch", ARCHES)
def test_block_quantization(arch):
    signature = {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "n": "i32"}
    compiled = corpus.compile_kernel(corpus.quantize, arch, signature, {"B": 512})
    x = bf16_bits(np.random.default_rng(23).standard_normal((2, 480)) * 3)
    codes, scales = np.empty((2, 480), np.int8), np.empty((2, 15), np.float32)
    run(compiled, (2,), [x, uninitialised(codes), uninitialised(scales), 480])
    blocks = bf16_values(x).reshape(2, 15, 32)
    np.testing.assert_allclose(scales, np.abs(blocks).max(2) / 127, rtol=4 * EPS)
    error = np.abs(codes.reshape(2, 15, 32) - blocks / scales.astype(np.float64)[:, :, None])
    assert error.max() <= 0.5 + 512 * EPS  # of a quotient up to 127


@pytest.mark.parametrize("arch", ARCHES)
def test_extreme_atomics(arch):
    signature = dict.fromkeys(("x", "top", "bottom", "bits", "last"), "*i32") | {"n": "i32"}
    compiled = corpus.compile_kernel(corpus.extreme_atomics, arch, signature, {"B": 256})
    # No negative numbers: on gfx9 Triton 3.6 reduces what a wave has for one address by v_max_u32, signed or not.
    x = np.random.default_rng(24).integers(1, 5000, 1000).astype(np.int32)
    first = {}
    for schedule in (None, REVERSED, random_schedule(3)):
        results = [np.full(1, start, np.int32) for start in (0, 1 << 30, 0, 0)]
        run(compiled, (4,), [x, *results, 1000], **({"schedule": schedule} if schedule else {}))
        top, bottom, bits, last = (int(r[0]) for r in results)
        assert (top, bottom, bits) == (x.max(), x.min(), np.bitwise_or.reduce(x))
        first[schedule] = last
    assert first[None] == 1
    assert first[REVERSED] == 4  # the block that ran first


@pytest.mark.parametrize("arch", ARCHES)
def test_split_k(arch):
    signature = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    compiled = corpus.compile_kernel(corpus.gemm_split_k, arch, signature, {"BM": 32, "BN": 32, "BK": 64})
    rng = np.random.default_rng(25)
    a, b = (rng.standard_normal((32, 256)).astype(np.float16) for _ in range(2))
    c = np.zeros((32, 32), np.float32)
    run(compiled, (4,), [a, b, c, 32, 32, 256])
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert np.all(np.abs(c - wide_a @ wide_b.T) <= 257 * EPS * (np.abs(wide_a) @ np.abs(wide_b).T))


@pytest.mark.parametrize("arch", ARCHES)
def test_gemm_with_bias_and_gelu(arch):
    signature = {"a": "*bf16", "b": "*bf16", "bias": "*bf16", "c": "*bf16", "M": "i32", "N": "i32", "K": "i32"}
    tile = {"BM": 32, "BN": 64, "BK": 32}
    compiled = corpus.compile_kernel(corpus.gemm_bias_gelu, arch, signature, tile, num_warps=8)
    rng = np.random.default_rng(26)
    a, b, bias = (bf16_bits(rng.standard_normal(s) / 4) for s in ((21, 96), (50, 96), 50))
    c = np.empty((21, 50), np.uint16)
    run(compiled, (1,), [a, b, bias, uninitialised(c), 21, 50, 96])
    x, w = bf16_values(a), bf16_values(b)
    total, size = x @ w.T + bf16_values(bias), np.abs(x) @ np.abs(w).T + np.abs(bf16_values(bias))
    exact = 0.5 * total * (1 + np.array([math.erf(t) for t in (total / math.sqrt(2)).ravel()]).reshape(total.shape))
    # gelu' is at most 1.13; erf is good to a few ulps of 1; one rounding to bf16.
    bound = 1.13 * 98 * EPS * size + 8 * EPS * np.abs(total) + 2.0**-8 * np.abs(exact)
    assert np.all(np.abs(bf16_values(c) - exact) <= bound)


def _truncated(p, q):
    quotient = abs(int(p)) // int(q)
    return -quotient if p < 0 else quotient
