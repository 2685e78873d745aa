"""Kernels compiled by Triton for every architecture, executed and compared with numpy.

This is where the lane layouts of core/matrix.c are confirmed: Triton's lowering knows the hardware's layouts from AMD,
ours come from the ISA documents, and they meet only through the machine code.
"""

import numpy as np
import pytest
import torch
from emulator import CodeObject, launch, uninitialised

corpus = pytest.importorskip("triton_corpus", reason="needs triton")

ARCHES = ("gfx950", "gfx942", "gfx1100", "gfx1151")
MNK = {"M": "i32", "N": "i32", "K": "i32"}
POINTER = {"e2m1": "*u8", "e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
EPS = 2.0**-24  # unit roundoff of fp32


def run(compiled, grid, args):
    """Launch a Triton kernel; the two trailing arguments are Triton's scratch pointers, which these kernels ignore."""
    code = CodeObject(compiled.hsaco)
    kernel = code.kernel(compiled.name)
    block = (compiled.num_warps * kernel.wave_size,)
    explicit = sum(not a.kind.startswith("hidden") for a in kernel.arguments)
    args = [*args, *[None] * (explicit - len(args))]
    return launch(code, kernel.name, grid, block, args, lds_bytes=compiled.lds_bytes)


def bf16_bits(x):
    return torch.tensor(x, dtype=torch.float32).to(torch.bfloat16).view(torch.uint16).numpy()


def bf16_values(bits):
    return torch.tensor(bits).view(torch.bfloat16).double().numpy()


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
    if dtype in ("fp32", "i8") and arch == "gfx1151":
        pytest.skip("the same code as gfx1100")
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


# ---- the rest ----


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


@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx1100"])
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
