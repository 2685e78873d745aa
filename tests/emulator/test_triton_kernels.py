"""Kernels compiled by Triton for every architecture, executed and compared with numpy.

This is where the lane layouts of core/matrix.c are confirmed: Triton's lowering knows the hardware's layouts from AMD,
ours come from the ISA documents, and they meet only through the machine code.
"""

import numpy as np
import pytest
import torch
from emulator import uninitialised
from packaging.version import Version

pytest.importorskip("triton")
import triton
import triton_corpus as corpus
from triton_running import ARCHES, EPS, bf16_bits, bf16_values, run

MNK = {"M": "i32", "N": "i32", "K": "i32"}
POINTER = {"e2m1": "*u8", "e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_mx(rng, element, rows, k):
    """Random codes [rows, k or k/2] and their values [rows, k]."""
    if element == "e2m1":
        codes = rng.integers(0, 256, (rows, k // 2), dtype=np.uint8)
        return codes, np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).reshape(rows, k)
    codes = rng.integers(0, 256, (rows, k), dtype=np.uint8)
    values = torch.tensor(codes).view(FP8[element]).double().numpy()
    codes[~np.isfinite(values)] = 0x31
    return codes, torch.tensor(codes).view(FP8[element]).double().numpy()


def random_scales(rng, rows, k):
    codes = rng.integers(120, 134, (rows, k // 32), dtype=np.uint8)
    return codes, np.repeat(2.0 ** (codes.astype(int) - 127), 32, axis=1)


def assert_product(c, a, b, roundings=0.0):
    """|c - a b^T| within the bound gamma_K |a| |b|^T that holds for fp32 sums in any order, plus relative roundings."""
    exact = a @ b.T
    bound = (a.shape[1] + 1) * EPS * (np.abs(a) @ np.abs(b).T) + roundings * np.abs(exact) + 1e-30
    assert np.all(np.abs(c - exact) <= bound), np.max(np.abs(c - exact) / bound)


# ---- matrix products ----


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "i8"])
def test_gemm(arch, dtype):
    out = "*i32" if dtype == "i8" else "*fp32"
    tile = {"BM": 32, "BN": 32, "BK": 64 if dtype != "fp32" else 32}
    compiled = corpus.compile_kernel(corpus.gemm, arch, {"a": f"*{dtype}", "b": f"*{dtype}", "c": out} | MNK, tile)
    rng = np.random.default_rng(1)
    m, n, k = 64, 32, 2 * tile["BK"]
    if dtype == "i8":
        a, b = (rng.integers(-128, 128, (rows, k), dtype=np.int8) for rows in (m, n))
        c = np.empty((m, n), np.int32)
        run(compiled, (2, 1), [a, b, uninitialised(c), m, n, k])
        assert np.array_equal(c, a.astype(np.int32) @ b.astype(np.int32).T)
        return
    a, b = (rng.standard_normal((rows, k)).astype(np.float32) for rows in (m, n))
    convert = {"bf16": bf16_bits, "fp16": lambda x: x.astype(np.float16), "fp32": lambda x: x}[dtype]
    values = bf16_values if dtype == "bf16" else lambda x: x.astype(np.float64)
    a, b = convert(a), convert(b)
    c = np.empty((m, n), np.float32)
    counters = run(compiled, (2, 1), [a, b, uninitialised(c), m, n, k])
    # Triton's default for fp32 operands is TF32, which gfx942 serves with XF32 (10 bits of mantissa).
    assert_product(c, values(a), values(b), roundings=0)
    assert dtype == "fp32" or counters.matrix > 0


@pytest.mark.parametrize("arch", ["gfx950", "gfx942"])
@pytest.mark.parametrize("instruction", [16, 32])
def test_gemm_transposing_read(arch, instruction):
    """b stored [K, N]: on gfx950 Triton reads it from LDS with ds_read_b64_tr_b16."""
    compiled = corpus.compile_kernel(
        corpus.gemm_kn,
        arch,
        {"a": "*bf16", "b": "*bf16", "c": "*fp32"} | MNK,
        {"BM": 64, "BN": 64, "BK": 64},
        matrix_instr_nonkdim=instruction,
    )
    rng = np.random.default_rng(2)
    a, b = bf16_bits(rng.standard_normal((64, 128))), bf16_bits(rng.standard_normal((128, 64)))
    c = np.empty((64, 64), np.float32)
    counters = run(compiled, (1, 1), [a, b, uninitialised(c), 64, 64, 128])
    assert_product(c, bf16_values(a), bf16_values(b).T)
    assert arch != "gfx950" or counters.by_mnemonic.get("ds_read_b64_tr_b16", 0) > 0


def test_gemm_transposing_read_of_bytes():
    """The same for fp8, hence ds_read_b64_tr_b8."""
    compiled = corpus.compile_kernel(
        corpus.gemm_kn, "gfx950", {"a": "*fp8e5", "b": "*fp8e5", "c": "*fp32"} | MNK, {"BM": 64, "BN": 64, "BK": 64}
    )
    rng = np.random.default_rng(3)
    a, a_values = random_mx(rng, "e5m2", 64, 128)
    b, b_values = random_mx(rng, "e5m2", 128, 64)
    c = np.empty((64, 64), np.float32)
    counters = run(compiled, (1, 1), [a, b, uninitialised(c), 64, 64, 128])
    assert_product(c, a_values, b_values.T)
    assert counters.by_mnemonic["ds_read_b64_tr_b8"] > 0


@pytest.mark.parametrize("instruction", [16, 32])
@pytest.mark.parametrize("b_format", ["e2m1", "e4m3", "e5m2"])
@pytest.mark.parametrize("a_format", ["e2m1", "e4m3", "e5m2"])
def test_scaled_product_native(a_format, b_format, instruction):
    """v_mfma_scale of gfx950 with every pair of formats, both shapes, random scales and a ragged M."""
    check_scaled("gfx950", a_format, b_format, 128, instruction)


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1151"])
@pytest.mark.parametrize(
    ("a_format", "b_format"), [("e2m1", "e2m1"), ("e2m1", "e4m3"), ("e4m3", "e2m1"), ("e5m2", "e2m1")]
)
def test_scaled_product_decomposed(arch, a_format, b_format):
    """Without scaled matrix instructions Triton converts to bf16 and uses WMMA."""
    check_scaled(arch, a_format, b_format, 64, None)


def test_scaled_product_on_gfx942():
    """Triton 3.6 cannot lower it there ("Unsupported DotScaleOp"); newer versions decompose it to bf16 as on gfx11."""
    if Version(triton.__version__) >= Version("3.9"):
        check_scaled("gfx942", "e4m3", "e2m1", 64, None)
        return
    with pytest.raises(RuntimeError, match="PassManager::run failed"):
        check_scaled("gfx942", "e4m3", "e2m1", 64, None)


def check_scaled(arch, a_format, b_format, block_k, instruction):
    options = {"matrix_instr_nonkdim": instruction} if instruction else {}
    compiled = corpus.compile_kernel(
        corpus.gemm_scaled,
        arch,
        {"a": POINTER[a_format], "b": POINTER[b_format], "c": "*fp32", "sa": "*u8", "sb": "*u8"} | MNK,
        {"BM": 32, "BN": 32, "BK": block_k, "AF": a_format, "BF": b_format},
        num_warps=2,
        divisible=("a", "b", "c", "sa", "sb", "N", "K"),
        **options,
    )
    rng = np.random.default_rng(4)
    m, n, k = 45, 64, 2 * block_k
    a, a_values = random_mx(rng, a_format, m, k)
    b, b_values = random_mx(rng, b_format, n, k)
    sa, a_scales = random_scales(rng, m, k)
    sb, b_scales = random_scales(rng, n, k)
    c = np.empty((m, n), np.float32)
    counters = run(compiled, (2, 2), [a, b, uninitialised(c), sa, sb, m, n, k])
    assert_product(c, a_values * a_scales, b_values * b_scales)
    native = {name for name in counters.by_mnemonic if name.startswith("v_mfma_scale")}
    shape = {16: "16x16x128", 32: "32x32x64"}.get(instruction)
    assert native == ({f"v_mfma_scale_f32_{shape}_f8f6f4"} if instruction else set())


@pytest.mark.parametrize("arch", ARCHES)
def test_bf16_by_mxfp4(arch):
    tile = {"BM": 16, "BN": 64, "BK": 128} if arch.startswith("gfx9") else {"BM": 16, "BN": 32, "BK": 64}
    compiled = corpus.compile_kernel(
        corpus.gemm_a16w4,
        arch,
        {"a": "*bf16", "b": "*u8", "c": "*bf16", "sb": "*u8"} | MNK,
        tile,
        divisible=("a", "b", "c", "sb", "N", "K"),
    )
    rng = np.random.default_rng(5)
    m, n, k = 13, 2 * tile["BN"], 2 * tile["BK"]
    a = bf16_bits(rng.standard_normal((m, k)))
    b, b_values = random_mx(rng, "e2m1", n, k)
    sb, b_scales = random_scales(rng, n, k)
    c = np.empty((m, n), np.uint16)
    run(compiled, (1, 2), [a, b, uninitialised(c), sb, m, n, k])
    assert_product(bf16_values(c), bf16_values(a), b_values * b_scales, roundings=2.0**-8)


# ---- reductions ----


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_softmax(arch, dtype):
    compiled = corpus.compile_kernel(
        corpus.softmax, arch, {"x": f"*{dtype}", "y": f"*{dtype}", "n": "i32"}, {"B": 1024}
    )
    rng = np.random.default_rng(6)
    x = rng.standard_normal((3, 777)).astype(np.float32) * 3
    x = bf16_bits(x) if dtype == "bf16" else x
    y = np.empty_like(x)
    run(compiled, (3,), [x, uninitialised(y), 777])
    x, y = (bf16_values(v) if dtype == "bf16" else v.astype(np.float64) for v in (x, y))
    exact = np.exp(x - x.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    # exp of an argument up to 30 that carries one rounding: 30 x 1.44 EPS; a tree sum of 1024: 10 EPS; a division.
    np.testing.assert_allclose(y, exact, rtol=64 * EPS + (2.0**-8 if dtype == "bf16" else 0), atol=1e-30)


@pytest.mark.parametrize("arch", ARCHES)
def test_rmsnorm(arch):
    signature = {"x": "*bf16", "w": "*fp32", "y": "*bf16", "n": "i32", "eps": "fp32"}
    compiled = corpus.compile_kernel(corpus.rmsnorm, arch, signature, {"B": 1024})
    rng = np.random.default_rng(7)
    x, w = bf16_bits(rng.standard_normal((2, 1000))), rng.standard_normal(1000).astype(np.float32)
    y = np.empty_like(x)
    run(compiled, (2,), [x, w, uninitialised(y), 1000, 1e-6])
    v = bf16_values(x)
    exact = v / np.sqrt((v * v).mean(1, keepdims=True) + 1e-6) * w
    np.testing.assert_allclose(bf16_values(y), exact, rtol=2.0**-8 + 64 * EPS)  # one bf16 rounding


@pytest.mark.parametrize("arch", ARCHES)
def test_column_sums(arch):
    compiled = corpus.compile_kernel(
        corpus.column_sums, arch, {"x": "*fp32", "y": "*fp32", "N": "i32"}, {"BM": 64, "BN": 32}
    )
    x = np.random.default_rng(8).standard_normal((64, 96)).astype(np.float32)
    y = np.empty(96, np.float32)
    counters = run(compiled, (3,), [x, uninitialised(y), 96])
    assert np.all(np.abs(y - x.astype(np.float64).sum(0)) <= 64 * EPS * np.abs(x).sum(0))
    assert counters.traffic[0].loaded == counters.traffic[0].loaded_distinct == x.nbytes
    assert counters.lds_stored > 0


@pytest.mark.parametrize("arch", ARCHES)
def test_argmax_and_cumulative_sum(arch):
    signature = {"x": "*fp32", "best": "*i32", "total": "*fp32", "n": "i32"}
    compiled = corpus.compile_kernel(corpus.argmax_cumsum, arch, signature, {"B": 512})
    x = np.random.default_rng(9).standard_normal((2, 500)).astype(np.float32)
    best, total = np.empty(2, np.int32), np.empty_like(x)
    run(compiled, (2,), [x, uninitialised(best), uninitialised(total), 500])
    assert np.array_equal(best, x.argmax(1))
    assert np.all(np.abs(total - x.astype(np.float64).cumsum(1)) <= 512 * EPS * np.abs(x).cumsum(1))
