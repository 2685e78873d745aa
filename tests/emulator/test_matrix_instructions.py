"""Every matrix instruction on random operands, through its lane layout.

The layouts are written here a second time, as where element (i, k) of an operand lies, so that a slip in either shows.
That the layouts are the hardware's is what test_triton_kernels.py is for.
"""

import numpy as np
import pytest
from assembling import assemble, wave_size
from emulator import KernelFault, launch

_LOADS = """
  s_load_{quad} s[4:7], s[0:1], 0x0
  v_mul_u32_u24 v100, 0x180, v0
  v_lshlrev_b32 v101, 7, v0
  s_waitcnt lgkmcnt(0)
"""


def execute(arch, text, registers):
    """Execute `text` with v0..v95 = registers[lanes, 96]; returns v16..v47 afterwards, uint32 [lanes, 32]."""
    quad = "dwordx4" if arch.startswith("gfx9") else "b128"
    body = _LOADS.format(quad=quad)
    loads = "".join(f"  global_load_{quad} v[{n}:{n + 3}], v100, s[4:5] offset:{4 * n}\n" for n in range(0, 96, 4))
    stores = "".join(
        f"  global_store_{quad} v101, v[{n}:{n + 3}], s[6:7] offset:{4 * (n - 16)}\n" for n in range(16, 48, 4)
    )
    code = assemble({"k": f"{body}{loads}  s_waitcnt vmcnt(0)\n  {text}\n{stores}"}, arch)
    out = np.zeros((wave_size(arch), 32), np.uint32)
    launch(code, "k", (1,), (wave_size(arch),), [np.ascontiguousarray(registers, np.uint32), out])
    return out


def place(codes, bits, lane_of, position_of, lanes=64, words=32):
    """Registers [lanes, words] with codes[i, k] at element position_of(i, k) of lane lane_of(i, k)."""
    stream = np.zeros((lanes, words * 32), np.uint8)
    for i, k in np.ndindex(codes.shape):
        at = position_of(i, k) * bits
        for bit in range(bits):
            stream[lane_of(i, k), at + bit] = int(codes[i, k]) >> bit & 1
    return np.packbits(stream, axis=1, bitorder="little").view(np.uint32)


# element type -> bits, decoder of codes
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def decode_float(exponent_bits, mantissa_bits, bias):
    def decode(codes):
        codes = codes.astype(int)
        mantissa = codes & (1 << mantissa_bits) - 1
        exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
        sign = np.where(codes >> (exponent_bits + mantissa_bits) & 1, -1.0, 1.0)
        scaled = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
        return sign * scaled * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)

    return decode


TYPES = {
    "f32": (32, lambda c: c.astype(np.uint32).view(np.float32).astype(float)),
    "xf32": (32, lambda c: c.astype(np.uint32).view(np.float32).astype(float)),
    "f64": (64, lambda c: c.view(np.float64)),
    "f16": (16, lambda c: c.astype(np.uint16).view(np.float16).astype(float)),
    "bf16": (16, lambda c: (c.astype(np.uint32) << 16).view(np.float32).astype(float)),
    "i8": (8, lambda c: c.astype(np.uint8).view(np.int8).astype(float)),
    "fp8": (8, decode_float(4, 3, 7)),
    "bf8": (8, decode_float(5, 2, 15)),
    "fp6": (6, decode_float(2, 3, 1)),
    "bf6": (6, decode_float(3, 2, 3)),
    "fp4": (4, decode_float(2, 1, 1)),
}


def random_codes(rng, kind, shape):
    if kind in ("f32", "xf32"):
        return rng.standard_normal(shape).astype(np.float32).view(np.uint32)
    if kind == "f64":
        return rng.standard_normal(shape).view(np.uint64)
    if kind == "f16":
        return rng.standard_normal(shape).astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits = TYPES[kind][0]
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint64)
    if kind in ("fp8", "bf8"):  # no NaN, no infinity
        codes &= ~np.uint64(0x40)
    return codes


def registers_of(count, first):
    return f"v[{first}:{first + count - 1}]" if count > 1 else f"v{first}"


MFMA = [  # text, M, K, blocks, type of A, type of B, architectures
    ("v_mfma_f32_32x32x1_2b_f32", 32, 1, 2, "f32", "f32", "gfx942"),
    ("v_mfma_f32_16x16x1_4b_f32", 16, 1, 4, "f32", "f32", "gfx950"),
    ("v_mfma_f32_4x4x1_16b_f32", 4, 1, 16, "f32", "f32", "gfx950"),
    ("v_mfma_f32_32x32x2_f32", 32, 2, 1, "f32", "f32", "gfx950"),
    ("v_mfma_f32_16x16x4_f32", 16, 4, 1, "f32", "f32", "gfx950"),
    ("v_mfma_f32_16x16x8_xf32", 16, 8, 1, "xf32", "xf32", "gfx942"),
    ("v_mfma_f64_16x16x4_f64", 16, 4, 1, "f64", "f64", "gfx950"),
    ("v_mfma_f32_32x32x4_2b_bf16", 32, 4, 2, "bf16", "bf16", "gfx942"),
    ("v_mfma_f32_16x16x4_4b_f16", 16, 4, 4, "f16", "f16", "gfx942"),
    ("v_mfma_f32_4x4x4_16b_f16", 4, 4, 16, "f16", "f16", "gfx950"),
    ("v_mfma_f32_32x32x8_bf16", 32, 8, 1, "bf16", "bf16", "gfx942"),
    ("v_mfma_f32_16x16x16_f16", 16, 16, 1, "f16", "f16", "gfx942"),
    ("v_mfma_f32_32x32x16_bf16", 32, 16, 1, "bf16", "bf16", "gfx950"),
    ("v_mfma_f32_16x16x32_f16", 16, 32, 1, "f16", "f16", "gfx950"),
    ("v_mfma_f32_32x32x16_fp8_bf8", 32, 16, 1, "fp8", "bf8", "gfx950"),
    ("v_mfma_f32_16x16x32_bf8_fp8", 16, 32, 1, "bf8", "fp8", "gfx950"),
    ("v_mfma_i32_32x32x4_2b_i8", 32, 4, 2, "i8", "i8", "gfx950"),
    ("v_mfma_i32_16x16x32_i8", 16, 32, 1, "i8", "i8", "gfx942"),
    ("v_mfma_i32_32x32x32_i8", 32, 32, 1, "i8", "i8", "gfx950"),
    ("v_mfma_i32_16x16x64_i8", 16, 64, 1, "i8", "i8", "gfx950"),
]


def result(out, m, blocks, double=False):
    """D[blocks, M, M] from v16.. of every lane."""
    d = np.zeros((blocks, m, m), np.uint64 if double else np.uint32)
    for lane in range(64):
        for r in range(m * m * blocks // 64):
            block, row = {
                4: (lane // 4, r),
                16: (r // 4, 4 * (lane // 16) + r % 4),
                32: (r // 16, 8 * (r % 16 // 4) + 4 * (lane // 32) + r % 4),
            }[m]
            if double:
                block, row = 0, 4 * r + lane // 16
                d[0, row, lane % m] = int(out[lane, 2 * r]) | int(out[lane, 2 * r + 1]) << 32
            else:
                d[block, row, lane % m] = out[lane, r]
    return d


@pytest.mark.parametrize(("name", "m", "k", "blocks", "a_type", "b_type", "arch"), MFMA)
def test_mfma(name, m, k, blocks, a_type, b_type, arch):
    rng = np.random.default_rng(len(name) + m)
    held = k * m * blocks // 64
    codes = [random_codes(rng, t, (blocks, m, k)) for t in (a_type, b_type)]
    registers = np.zeros((64, 96), np.uint32)
    words = []
    for operand, (kind, first) in enumerate(((a_type, 0), (b_type, 8))):
        bits = TYPES[kind][0]
        for block in range(blocks):
            placed = place(
                codes[operand][block],
                bits,
                lambda i, kk, block=block: i + m * (block + blocks * (kk // held)),
                lambda i, kk: kk % held,
                words=8,
            )
            registers[:, first : first + 8] |= placed
        words.append(-(-held * bits // 32))
    double, integer = a_type == "f64", a_type == "i8"
    size = m * m * blocks // 64 * (2 if double else 1)
    c = rng.standard_normal((64, 32)).astype(np.float32).view(np.uint32)
    c = rng.integers(-1000, 1000, (64, 32)).astype(np.int32).view(np.uint32) if integer else c
    c = rng.standard_normal((64, 16)).view(np.uint32) if double else c
    registers[:, 48:80] = c
    operands = (registers_of(n, at) for n, at in ((size, 16), (words[0], 0), (words[1], 8), (size, 48)))
    text = f"{name} {', '.join(operands)}"
    values = [TYPES[t][1](x.ravel()).reshape(x.shape) for t, x in zip((a_type, b_type), codes, strict=True)]
    exact = np.einsum("bik,bjk->bij", *values)
    got = result(execute(arch, text, registers), m, blocks, double)
    accumulator = result(c, m, blocks, double)
    if integer:
        assert np.array_equal(got.view(np.int32), exact.astype(np.int64) + accumulator.view(np.int32))
        return
    kind = np.float64 if double else np.float32
    exact = exact + accumulator.view(kind)
    # The emulator adds in fp64 and rounds once: half an ulp of fp32; in fp64 the sums differ by their order alone.
    np.testing.assert_allclose(got.view(kind), exact, rtol=1e-12 if double else 2.0**-23, atol=1e-30)


SCALED = [("fp8", "fp4"), ("fp4", "fp6"), ("bf6", "bf8"), ("fp6", "fp6"), ("fp4", "fp4")]


@pytest.mark.parametrize("m", [16, 32])
@pytest.mark.parametrize(("a_type", "b_type"), SCALED)
def test_scaled_mfma(m, a_type, b_type):
    """Formats of 6 bits, which Triton does not use, the byte of the scale register, and op_sel."""
    rng = np.random.default_rng(m)
    k, formats = (128 if m == 16 else 64), ["fp8", "bf8", "fp6", "bf6", "fp4"]
    groups = 64 // m
    registers = np.zeros((64, 96), np.uint32)
    values, scales = [], []
    for operand, kind in enumerate((a_type, b_type)):
        codes = random_codes(rng, kind, (m, k))
        bits = TYPES[kind][0]
        run = 16 if bits == 8 else 32  # elements of K that follow each other in a lane; 8 bits: two runs of them
        registers[:, 8 * operand : 8 * operand + 8] = place(
            codes,
            bits,
            lambda i, kk, run=run: i + m * (kk % (run * groups) // run),
            lambda i, kk, run=run: kk % run + run * (kk // (run * groups)),
            words=8,
        )
        values.append(TYPES[kind][1](codes))
        codes = rng.integers(120, 134, (m, k // 32))
        scales.append(np.repeat(2.0 ** (codes - 127), 32, axis=1))
        byte = (1, 2)[operand]
        for i, block in np.ndindex(codes.shape):
            registers[i + m * block, 80 + operand] = int(codes[i, block]) << 8 * byte | 0x7F00007F & ~(255 << 8 * byte)
    size = m * m // 64
    words = {8: 8, 6: 6, 4: 4}
    a, b = (registers_of(words[TYPES[t][0]], 8 * n) for n, t in enumerate((a_type, b_type)))
    shape = "16x16x128" if m == 16 else "32x32x64"
    text = f"v_mfma_scale_f32_{shape}_f8f6f4 {registers_of(size, 16)}, {a}, {b}, 0, v80, v81"
    text += " op_sel:[1,0,0] op_sel_hi:[0,1,0]"  # byte 1 of v80, byte 2 of v81
    text += f" cbsz:{formats.index(a_type)} blgp:{formats.index(b_type)}"
    got = result(execute("gfx950", text, registers), m, 1)[0].view(np.float32)
    exact = (values[0] * scales[0]) @ (values[1] * scales[1]).T
    bound = (np.abs(values[0] * scales[0]) @ np.abs(values[1] * scales[1]).T) * 2.0**-23
    assert np.all(np.abs(got - exact) <= bound + 1e-30)


WMMA = [  # name, type of A and B, bits, type of D
    ("v_wmma_f32_16x16x16_f16", "f16", "f32"),
    ("v_wmma_f32_16x16x16_bf16", "bf16", "f32"),
    ("v_wmma_f16_16x16x16_f16", "f16", "f16"),
    ("v_wmma_bf16_16x16x16_bf16", "bf16", "bf16"),
    ("v_wmma_i32_16x16x16_iu8", "i8", "i32"),
]


def wmma_registers(rng, kind):
    bits = TYPES[kind][0]
    codes = [random_codes(rng, kind, (16, 16)) for _ in range(2)]
    registers = np.zeros((32, 96), np.uint32)
    for operand in range(2):
        half = place(codes[operand], bits, lambda i, k: i, lambda i, k: k, lanes=32, words=8)
        registers[:, 8 * operand : 8 * operand + 8] = half + np.roll(half, 16, axis=0)
    return codes, registers


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1151"])
@pytest.mark.parametrize(("name", "kind", "d_type"), WMMA)
def test_wmma(arch, name, kind, d_type):
    rng = np.random.default_rng(5)
    codes, registers = wmma_registers(rng, kind)
    words = 16 * TYPES[kind][0] // 32
    text = f"{name} v[16:23], {registers_of(words, 0)}, {registers_of(words, 8)}, v[48:55]"
    values = [TYPES[kind][1](c.ravel()).reshape(16, 16) for c in codes]
    if kind == "i8":
        text += " neg_lo:[1,0,0]"  # A signed, B unsigned
        values[1] = codes[1].astype(float)
    out = execute(arch, text, registers)[:, :8]
    d = np.zeros((16, 16), np.uint32)
    for lane in range(32):
        for r in range(8):
            d[2 * r + lane // 16, lane % 16] = out[lane, r]
    exact = values[0] @ values[1].T
    if d_type == "i32":
        assert np.array_equal(d.view(np.int32), exact)
    elif d_type == "f32":
        np.testing.assert_allclose(d.view(np.float32), exact, rtol=2.0**-23, atol=1e-30)
    else:
        got = TYPES[d_type][1]((d & 0xFFFF).ravel().astype(np.uint16)).reshape(16, 16)
        np.testing.assert_allclose(got, exact, rtol=2.0 ** (-10 if d_type == "f16" else -8), atol=1e-6)


def test_wmma_operand_that_is_not_replicated():
    """The upper 16 lanes must repeat the lower: what the hardware does otherwise is not defined."""
    _, registers = wmma_registers(np.random.default_rng(6), "f16")
    registers[20, 3] ^= 1
    with pytest.raises(KernelFault, match="register v3 differs between lanes 4 and 20"):
        execute("gfx1100", "v_wmma_f32_16x16x16_f16 v[16:23], v[0:7], v[8:15], v[48:55]", registers)
