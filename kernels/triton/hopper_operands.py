"""Packed weights from shared memory to wgmma's left operand: layouts of registers, and codes made into values there."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def fragments(groups, warps, wide):
    """Registers that hold a [groups, 512 bytes] tile of packed weights, `groups` of 16 rows each: 16 bytes a lane."""
    own = [[0, 1], [0, 2], [0, 4]] + ([] if wide else [[0, 8]])
    lanes = [[0, (8 if wide else 16) << i] for i in range(5)]
    rows = [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    of_warps = warps.bit_length() - 1
    width = 256 if wide else 512
    return gl.DistributedLinearLayout(own + rows[of_warps:], lanes, rows[:of_warps], [], [groups, width])


@gluon.constexpr_function
def scale_fragments(groups, warps, width):
    """Registers that hold the scales of `groups` groups, `width` words each: lane 4 g + t has word g, of 8 for rows g
    and g + 8 together; of 16, which int4 has, word g + 8 too. Of 4 they hold 16 bytes each, lane 4 g + t byte
    2 g + t // 2: of both rows, and its own block."""
    rows = [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    of_warps = warps.bit_length() - 1
    lanes = [[0, 0], [0, 1], [0, 2], [0, 4], [0, 8]] if width == 4 else [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]]
    own = ([[0, 8]] if width == 16 else []) + rows[of_warps:]
    return gl.DistributedLinearLayout(own, lanes, rows[:of_warps], [], [groups, 16 if width == 4 else width])


@gluon.jit
def larger(bits, values):
    """The larger of magnitudes' bits so far and those of bf16 or fp16 values, all uint16; of NaN largest of all."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 magnitude; and.b32 magnitude, $2, 0x7FFF7FFF; max.u16x2 $0, $1, magnitude; }",
        "=r,r,r",
        [bits, values],
        dtype=gl.uint16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def codes_to_e4m3(packed, low, high):
    """[R, C] bytes, four of which hold eight codes, and the e4m3 of magnitudes 0..3 and of 4..7 under the scale of all
    in a row, four in an int32 [R, 1].

    Returns two [R, C] e4m3: the first and the second four codes of each word.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 pick, sign;
        and.b32 pick, $2, 0x77777777;
        and.b32 sign, $2, 0x80808080;
        prmt.b32 $0, $3, $7, pick;
        or.b32 $0, $0, sign;
        shr.u32 pick, pick, 16;
        shl.b32 sign, $2, 4;
        and.b32 sign, sign, 0x80808080;
        prmt.b32 $1, $3, $7, pick;
        or.b32 $1, $1, sign;
        }
        """,
        "=&r,=&r,r,r,r,r,r,r,r,r,r",
        [packed, low, high],
        dtype=(gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def codes_to_bf16(packed, first, second):
    """[R, C] uint16, two of which hold eight codes, and 2^126 times the scale of the two blocks, twice a word.

    Returns four [R, C] bf16, two of each block.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 code, sign;
        and.b32 code, $4, 0x81C081C0;
        mul.rn.bf16x2 $0, code, $5;
        shl.b32 code, $4, 3;
        and.b32 code, code, 0x01C001C0;
        shl.b32 sign, $4, 2;
        and.b32 sign, sign, 0x80008000;
        or.b32 code, code, sign;
        mul.rn.bf16x2 $1, code, $5;
        shl.b32 code, $4, 6;
        and.b32 code, code, 0x81C081C0;
        mul.rn.bf16x2 $2, code, $7;
        shr.u32 code, $4, 4;
        and.b32 code, code, 0x01C001C0;
        shl.b32 sign, $4, 1;
        and.b32 sign, sign, 0x80008000;
        or.b32 code, code, sign;
        mul.rn.bf16x2 $3, code, $7;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [packed, first, second],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def words_of(w_part, BLOCK_N: gl.constexpr, OWN: gl.constexpr, operand: gl.constexpr, registers: gl.constexpr):
    """Packed weights [BLOCK_N / 16, 512 bytes] -> the same registers as [BLOCK_N, 8 OWN], wgmma's left operand."""
    words = w_part.load(registers).reshape((BLOCK_N // 16, 8, 4, 2, 2, OWN)).permute((0, 4, 1, 3, 2, 5))
    return gl.convert_layout(words.reshape((BLOCK_N, 8 * OWN)), operand, assert_trivial=True)


@gluon.jit
def e4m3_of(w_part, s_part, BLOCK_N: gl.constexpr, operand: gl.constexpr, w_registers: gl.constexpr,
            s_registers: gl.constexpr):  # fmt: skip
    """Codes [BLOCK_N / 16, 512 bytes] and their steps -> two e4m3 [BLOCK_N, 32], wgmma's left operand.

    In between rows are [group, r, g, block]: a block's table is one number to all that a lane has of a row.
    """
    words = w_part.load(w_registers).reshape((BLOCK_N // 16, 8, 2, 2, 2, 2, 4)).permute((0, 5, 1, 2, 3, 4, 6))
    words = words.reshape((2 * BLOCK_N, 16))
    LAYOUT: gl.constexpr = words.type.layout
    low, high = tables_of(s_part, BLOCK_N, LAYOUT, s_registers)
    first, second = codes_to_e4m3(words, low, high)
    return blocks_side_by_side(first, BLOCK_N, operand), blocks_side_by_side(second, BLOCK_N, operand)


@gluon.jit
def tables_of(s_part, BLOCK_N: gl.constexpr, layout: gl.constexpr, registers: gl.constexpr):
    """Steps [BLOCK_N / 16, 16], four bits of row g and four of g + 8 in a byte -> the e4m3 of magnitudes 0..3 and of
    4..7 of each row's two blocks, four in an int32 [2 BLOCK_N, 1]."""
    steps = s_part.load(registers).to(gl.int32)
    steps = gl.join(steps & 15, steps >> 4).permute((0, 2, 1)).reshape((2 * BLOCK_N,))
    steps = gl.expand_dims(gl.convert_layout(steps, gl.SliceLayout(1, layout), assert_trivial=True), 1)
    return steps * 0x08080800 + 0x14100800, steps * 0x08080808 + 0x24201C18


@gluon.jit
def blocks_side_by_side(values, BLOCK_N: gl.constexpr, operand: gl.constexpr):
    """[2 BLOCK_N, 16], rows [group, r, g, block] and columns [t % 2, h, e] -> [BLOCK_N, 32], columns [h, t, e]."""
    values = values.reshape((BLOCK_N, 2, 2, 2, 4)).permute((0, 3, 1, 2, 4)).reshape((BLOCK_N, 32))
    return gl.convert_layout(values, operand, assert_trivial=True)


@gluon.jit
def scales_of(s_part, BLOCK_N: gl.constexpr, operand: gl.constexpr, registers: gl.constexpr):
    """Bytes of the scales of two blocks, [BLOCK_N, 1] each."""
    words = s_part.load(registers)
    rows = gl.join(words & 0xFFFF, (words >> 16) & 0xFFFF).permute((0, 2, 1)).reshape((BLOCK_N,))
    rows = gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, operand), assert_trivial=True), 1)
    return rows & 0xFF, rows >> 8


@gluon.jit
def int4_words_of(w_part, BLOCK_N: gl.constexpr, registers: gl.constexpr):
    """Tiles of `mma_int4` [BLOCK_N / 16, 256 halves of words] -> the words of either 32-block, [BLOCK_N, 8] each."""
    words = w_part.load(registers).reshape((BLOCK_N // 16, 8, 4, 2, 2, 2)).permute((0, 4, 1, 2, 5, 3))
    first, second = gl.split(words)
    return first.reshape((BLOCK_N, 8)), second.reshape((BLOCK_N, 8))


@gluon.jit
def int4_scales_of(s_part, HALF: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr, registers: gl.constexpr):
    """Words of scale and zero point z of a group [BLOCK_N / 16, 16] -> what makes values of its rows' codes, both twice
    in an int32 [BLOCK_N, 1]: the scale in fp16 if HALF, else bf16; and 1024 + z, or 128 + z."""
    words = s_part.load(registers).reshape((BLOCK_N,))
    words = gl.expand_dims(gl.convert_layout(words, gl.SliceLayout(1, layout), assert_trivial=True), 1)
    scale = (words & -16).to(gl.float32, bitcast=True).to(gl.float16 if HALF else gl.bfloat16)
    scale = scale.to(gl.uint16, bitcast=True).to(gl.int32)
    return scale * 0x00010001, ((words & 15) | (0x6400 if HALF else 0x4300)) * 0x00010001


@gluon.constexpr_function
def int4_instructions(half):
    """PTX of `int4_steps`: a code becomes the last bits of 1024 (fp16) or 128 (bf16)."""
    kind, exponent = ("f16x2", "0x64006400") if half else ("bf16x2", "0x43004300")
    lines = [
        f"""
        shr.u32 code, $4, {4 * pair};
        lop3.b32 code, code, 0x000F000F, {exponent}, 0xEA;
        sub.rn.{kind} code, code, $7;
        mul.rn.{kind} ${pair}, code, $5;
        """
        for pair in range(4)
    ]
    return "{ .reg .b32 code; " + "".join(lines) + "}"


@gluon.jit
def int4_steps(words, s_part, HALF: gl.constexpr, BLOCK_N: gl.constexpr, operand: gl.constexpr,
               registers: gl.constexpr):  # fmt: skip
    """[BLOCK_N, 8] uint16, two of which are a word of eight codes q, and the words of their group -> (q - z) times the
    scale, rounded once, of two steps of 16 along K: wgmma's left operands [BLOCK_N, 16]."""
    LAYOUT: gl.constexpr = words.type.layout
    scale, near = int4_scales_of(s_part, HALF, BLOCK_N, LAYOUT, registers)
    a, b, c, d = gl.inline_asm_elementwise(
        int4_instructions(HALF),
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [words, scale, near],
        dtype=(gl.uint16, gl.uint16, gl.uint16, gl.uint16),
        is_pure=True,
        pack=2,
    )
    return step_of(a, b, HALF, BLOCK_N, operand), step_of(c, d, HALF, BLOCK_N, operand)


@gluon.jit
def step_of(low, high, HALF: gl.constexpr, BLOCK_N: gl.constexpr, operand: gl.constexpr):
    """Bits of the lower and the upper 8 of 16 along K, [BLOCK_N, 8] each -> wgmma's left operand [BLOCK_N, 16]."""
    both = gl.join(low, high).reshape((BLOCK_N, 4, 2, 2)).permute((0, 3, 1, 2)).reshape((BLOCK_N, 16))
    both = gl.convert_layout(both, operand, assert_trivial=True)
    return both.to(gl.float16 if HALF else gl.bfloat16, bitcast=True)
