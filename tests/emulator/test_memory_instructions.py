"""Memory instructions, one kernel each, against numpy."""

import numpy as np
import pytest
from assembling import assemble, wave_size
from emulator import launch, uninitialised
from wave_data import ARCHES, is_gfx9

RNG = np.random.default_rng(21)
DATA = RNG.integers(0, 256, 64 * 64, dtype=np.uint8)

# v60: 16 x lane, v61: lane; s[4:5]: input, s[6:7]: output; the result is v[12:15], poisoned before.
_PROLOGUE = """
  s_load_{quad} s[4:7], s[0:1], 0x0
  v_lshlrev_b32 v60, 4, v0
  v_mov_b32 v61, v0
  v_mov_b32 v12, 0x11223344
  v_mov_b32 v13, 0
  v_mov_b32 v14, 0
  v_mov_b32 v15, 0
  v_mov_b32 v20, v60
  s_waitcnt lgkmcnt(0)
"""
_WAIT = {True: "s_waitcnt vmcnt(0) lgkmcnt(0)", False: "s_waitcnt vmcnt(0) lgkmcnt(0)\n  s_waitcnt_vscnt null, 0x0"}
_NAMES = {  # gfx9 name -> gfx11 name, where they differ
    "dwordx4": "b128", "dwordx3": "b96", "dwordx2": "b64", "dword": "b32",
    "load_ubyte_d16_hi": "load_d16_hi_u8", "load_ubyte": "load_u8", "load_sbyte": "load_i8", "load_ushort": "load_u16",
    "load_sshort": "load_i16", "load_short_d16_hi": "load_d16_hi_b16", "load_short_d16": "load_d16_b16",
    "store_byte": "store_b8", "store_short_d16_hi": "store_d16_hi_b16", "store_short": "store_b16",
    "ds_read2st64": "ds_load_2addr_stride64", "ds_read2": "ds_load_2addr", "ds_read": "ds_load",
    "ds_write2st64": "ds_store_2addr_stride64", "ds_write2": "ds_store_2addr", "ds_write": "ds_store",
    "atomic_add ": "atomic_add_u32 ", "atomic_umax": "atomic_max_u32", "atomic_smin": "atomic_min_i32",
    "atomic_cmpswap": "atomic_cmpswap_b32", "atomic_or": "atomic_or_b32", "atomic_swap": "atomic_swap_b32",
    "ds_wrxchg": "ds_storexchg", "ds_cmpst": "ds_cmpstore",
}  # fmt: skip


def translate(text, arch):
    if is_gfx9(arch):
        return text
    for old, new in _NAMES.items():
        text = text.replace(old, new)
    return text.replace(" sc0", " glc")


def run_all(arch, bodies, output_bytes=None, lds=0, scratch=0):
    """For each body: the bytes its kernel leaves in its output, [lanes, 16] unless told otherwise, and the counters."""
    lanes, wait = wave_size(arch), _WAIT[is_gfx9(arch)]
    quad = "dwordx4" if is_gfx9(arch) else "b128"
    texts = {}
    for number, body in enumerate(bodies):
        text = _PROLOGUE.format(quad=quad) + "\n".join("  " + translate(line, arch) for line in body.split(";"))
        if output_bytes is None:
            text += f"\n  WAIT\n  global_store_{quad} v60, v[12:15], s[6:7]\n"
        texts[f"k{number}"] = text.replace("WAIT", wait)
    code = assemble(texts, arch, lds=lds, scratch=scratch)
    results = []
    for name in texts:
        out = np.zeros((lanes, 16) if output_bytes is None else output_bytes, np.uint8)
        results.append((out, launch(code, name, (1,), (lanes,), [DATA, out])))
    return results


def run(arch, body, **options):
    return run_all(arch, [body], **options)[0]


def rows(arch, width, step=16):
    """Bytes [lanes, width] that lanes load from `step` x lane."""
    lanes = wave_size(arch)
    return DATA[np.arange(lanes)[:, None] * step + np.arange(width)]


LOADS = [  # name, bytes, what a register holds given the raw bytes [lanes, n] and its old value
    ("ubyte", 1, lambda b: b[:, 0].astype(np.uint32)),
    ("sbyte", 1, lambda b: b.view(np.int8)[:, 0].astype(np.int32).view(np.uint32)),
    ("ushort", 2, lambda b: b.view(np.uint16)[:, 0].astype(np.uint32)),
    ("sshort", 2, lambda b: b.view(np.int16)[:, 0].astype(np.int32).view(np.uint32)),
    ("short_d16", 2, lambda b: b.view(np.uint16)[:, 0] | np.uint32(0x11220000)),
    ("short_d16_hi", 2, lambda b: (b.view(np.uint16)[:, 0].astype(np.uint32) << 16) | 0x3344),
    ("ubyte_d16_hi", 1, lambda b: (b[:, 0].astype(np.uint32) << 16) | 0x3344),
]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("space", ["global", "flat", "buffer"])
def test_loads(arch, space):
    resource = "s_mov_b32 s8, s4; s_mov_b32 s9, s5; s_mov_b32 s10, -1; s_mov_b32 s11, 0x27000;"
    address = (
        "v_mov_b32 v62, s4; v_add_co_u32 v62, vcc, v62, v60; v_mov_b32 v63, s5; v_addc_co_u32 v63, vcc, 0, v63, vcc;"
    )
    if not is_gfx9(arch):
        address = address.replace("vcc", "vcc_lo").replace("addc_co", "add_co_ci")
    before = {"global": "", "flat": address, "buffer": resource}[space]
    buffer = "v60, s[8:11], 0 offen offset:4"
    where = {"global": "v60, s[4:5] offset:4", "flat": "v[62:63] offset:4", "buffer": buffer}[space]
    narrow = run_all(arch, [f"{before} {space}_load_{name} v12, {where}" for name, _, _ in LOADS])
    for (name, size, expected), (out, _) in zip(LOADS, narrow, strict=True):
        raw = np.ascontiguousarray(rows(arch, 4 + size)[:, 4:])
        assert np.array_equal(out.view(np.uint32)[:, 0], expected(raw)), name
    wide = {"dword": "v12", "dwordx2": "v[12:13]", "dwordx3": "v[12:14]", "dwordx4": "v[12:15]"}
    results = run_all(arch, [f"{before} {space}_load_{name} {target}, {where}" for name, target in wide.items()])
    for size, (out, counters) in zip((4, 8, 12, 16), results, strict=True):
        assert np.array_equal(out[:, :size], rows(arch, 4 + size)[:, 4:]), size
        assert counters.traffic[0].loaded == wave_size(arch) * size


STORES = [  # name, bytes, first byte of the data register that is stored
    ("byte", 1, 0),
    ("short", 2, 0),
    ("short_d16_hi", 2, 2),
    ("dword", 4, 0),
    ("dwordx2", 8, 0),
    ("dwordx3", 12, 0),
    ("dwordx4", 16, 0),
]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("space", ["global", "buffer"])
def test_stores(arch, space):
    lanes = wave_size(arch)
    before = "global_load_dwordx4 v[12:15], v60, s[4:5]; WAIT; v_lshlrev_b32 v59, 4, v61;"
    if space == "buffer":
        before += "s_mov_b32 s8, s6; s_mov_b32 s9, s7; s_mov_b32 s10, -1; s_mov_b32 s11, 0x27000;"
    bodies = []
    for name, size, _ in STORES:
        data = f"v[12:{11 + size // 4}]" if size > 4 else "v12"
        where = f"v59, {data}, s[6:7]" if space == "global" else f"{data}, v59, s[8:11], 0 offen"
        bodies.append(f"{before} {space}_store_{name} {where}")
    results = run_all(arch, bodies, output_bytes=16 * lanes)
    for (name, size, first), (out, counters) in zip(STORES, results, strict=True):
        expected = np.zeros((lanes, 16), np.uint8)
        expected[:, :size] = rows(arch, 16)[:, first : first + size]
        assert np.array_equal(out.reshape(lanes, 16), expected), name
        assert counters.traffic[1].stored == counters.traffic[1].stored_distinct == lanes * size


@pytest.mark.parametrize("arch", ARCHES)
def test_buffer_range(arch):
    """Beyond num_records a buffer load gives 0 and a store does nothing: hardware's own bounds check, no finding."""
    before = "s_mov_b32 s8, s4; s_mov_b32 s9, s5; s_movk_i32 s10, 0x84; s_mov_b32 s11, 0x27000;"
    out, counters = run(arch, before + "buffer_load_dword v12, v60, s[8:11], 0 offen")
    expected = rows(arch, 4).copy()
    expected[np.arange(wave_size(arch)) * 16 + 4 > 0x84] = 0
    assert np.array_equal(out[:, :4], expected)
    assert counters.traffic[0].loaded == 4 * 9
    # structured: index x stride + offset, the index checked against num_records
    before = (
        "s_mov_b32 s8, s4; s_mov_b32 s9, 0x00080000; s_or_b32 s9, s9, s5; s_mov_b32 s10, 5; s_mov_b32 s11, 0x27000;"
    )
    out, _ = run(arch, before + "buffer_load_dword v12, v61, s[8:11], 0 idxen offset:4")
    expected = rows(arch, 8, step=8)[:, 4:].copy()
    expected[5:] = 0
    assert np.array_equal(out[:, :4], expected)


@pytest.mark.parametrize("arch", ARCHES)
def test_scalar_loads(arch):
    names = ("dword", "dwordx2", "dwordx4", "dwordx8", "dwordx16")
    if not is_gfx9(arch):
        names = ("b32", "b64", "b128", "b256", "b512")
    bodies = []
    for name, words in zip(names, (1, 2, 4, 8, 16), strict=True):
        last = 15 + words
        target = f"s[16:{last}]" if words > 1 else "s16"
        load = f"s_movk_i32 s12, 0x10; s_load_{name} {target}, s[4:5], s12 offset:0x8; WAIT;"
        bodies.append(load + f"v_mov_b32 v12, s16; v_mov_b32 v13, s{last}")
    for words, (out, _) in zip((1, 2, 4, 8, 16), run_all(arch, bodies), strict=True):
        assert np.array_equal(out[0, :8], np.concatenate([DATA[24:28], DATA[20 + 4 * words : 24 + 4 * words]])), words


LOCAL = "global_load_dwordx4 v[20:23], v60, s[4:5]; WAIT;"


@pytest.mark.parametrize("arch", ARCHES)
def test_lds_widths(arch):
    """Every lane writes 16 bytes and reads them back at each width."""
    lanes = wave_size(arch)
    fill = LOCAL + "ds_write_b128 v60, v[20:23]; WAIT;"
    raw = rows(arch, 16)
    reads = [
        ("u8", 1, lambda b: b[:, 0].astype(np.uint32)),
        ("i8", 1, lambda b: b.view(np.int8)[:, 0].astype(np.int32).view(np.uint32)),
        ("u16", 2, lambda b: b.view(np.uint16)[:, 0].astype(np.uint32)),
        ("u16_d16_hi", 2, lambda b: (b.view(np.uint16)[:, 0].astype(np.uint32) << 16) | 0x3344),
        ("b32", 4, lambda b: b.view(np.uint32)[:, 0]),
    ]
    results = run_all(arch, [fill + f"ds_read_{name} v12, v60 offset:4" for name, _, _ in reads], lds=16 * lanes)
    for (name, size, expected), (out, _) in zip(reads, results, strict=True):
        piece = np.ascontiguousarray(raw[:, 4 : 4 + size])
        assert np.array_equal(out.view(np.uint32)[:, 0], expected(piece)), name
    bodies = [fill + f"ds_read_b{32 * words} v[12:{11 + words}], v60" for words in (2, 3, 4)]
    for words, (out, counters) in zip((2, 3, 4), run_all(arch, bodies, lds=16 * lanes), strict=True):
        assert np.array_equal(out[:, : 4 * words], raw[:, : 4 * words]), words
        assert (counters.lds_stored, counters.lds_loaded) == (16 * lanes, 4 * words * lanes)
    narrow = LOCAL + "v_mov_b32 v12, 0; ds_write_b128 v60, v[12:15]; ds_write_b8 v60, v20 offset:1;"
    narrow += "ds_write_b16 v60, v21 offset:4; ds_write_b16_d16_hi v60, v22 offset:8; WAIT; ds_read_b128 v[12:15], v60"
    out, _ = run(arch, narrow, lds=16 * lanes)
    expected = np.zeros((lanes, 16), np.uint8)
    expected[:, 1], expected[:, 4:6], expected[:, 8:10] = raw[:, 0], raw[:, 4:6], raw[:, 10:12]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("arch", ARCHES)
def test_lds_pairs(arch):
    """The two-address forms: offsets count elements, or 64 elements."""
    lanes = wave_size(arch)
    raw = rows(arch, 16)
    base = "v_lshlrev_b32 v59, 2, v61;" + LOCAL
    near = base + "ds_write2_b32 v59, v20, v21 offset0:0 offset1:64; WAIT; ds_read2st64_b32 v[12:13], v59 offset1:1"
    out, _ = run(arch, near, lds=1024)
    assert np.array_equal(out[:, :8], raw[:, :8])
    base = "v_lshlrev_b32 v59, 3, v61;" + LOCAL
    far = (
        base
        + "ds_write2st64_b64 v59, v[20:21], v[22:23] offset0:0 offset1:1; WAIT; ds_read2_b64 v[12:15], v59 offset1:64"
    )
    out, counters = run(arch, far, lds=8 * 64 + 8 * lanes)
    assert np.array_equal(out, raw)
    assert counters.lds_accesses == 4


ATOMICS = [  # gfx9 names in global memory and LDS, what memory holds after one more lane acted
    ("add", "add_u32", lambda m, x: np.uint32((int(m) + int(x)) & 0xFFFFFFFF)),
    ("umax", "max_u32", lambda m, x: max(m, x)),
    ("smin", "min_i32", lambda m, x: min(m.view(np.int32), x.view(np.int32)).view(np.uint32)),
    ("or", "or_b32", lambda m, x: m | x),
    ("swap", "wrxchg_rtn_b32", lambda m, x: x),
]
WORD = "v_lshlrev_b32 v59, 2, v61; v_and_b32 v59, 12, v59;"  # lanes share four words, at v59
CLEAR_LDS = "v_mov_b32 v58, 0; v_mov_b32 v12, 0; ds_write_b128 v58, v[12:15]; WAIT;"


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("place", ["global", "lds"])
def test_atomics(arch, place):
    lanes = wave_size(arch)
    data = rows(arch, 4).copy().view(np.uint32)[:, 0]
    if place == "global":
        bodies = [f"{LOCAL} {WORD} global_atomic_{name} v12, v59, v20, s[6:7] sc0; WAIT" for name, _, _ in ATOMICS]
        words = [out.view(np.uint32) for out, _ in run_all(arch, bodies, output_bytes=16)]
    else:
        old = {name: "v13, " if "rtn" in name else "" for _, name, _ in ATOMICS}
        bodies = [
            f"{LOCAL} {WORD} {CLEAR_LDS} ds_{name} {old[name]}v59, v20; WAIT; ds_read_b128 v[12:15], v58"
            for _, name, _ in ATOMICS
        ]
        words = [out[0].view(np.uint32) for out, _ in run_all(arch, bodies, lds=64)]
    for (name, _, operation), got in zip(ATOMICS, words, strict=True):
        expected = np.zeros(4, np.uint32)
        for lane in range(lanes):
            expected[lane % 4] = operation(expected[lane % 4], data[lane])
        assert np.array_equal(got, expected), name


@pytest.mark.parametrize("arch", ARCHES)
def test_compare_and_swap(arch):
    """Lane l swaps in its data where the word holds 0: only the first of the lanes that share a word succeeds."""
    lanes = wave_size(arch)
    add = "v_add_u32" if is_gfx9(arch) else "v_add_nc_u32"
    body = f"{WORD} {add} v20, 0x100, v61; v_mov_b32 v21, 0;"
    out, _ = run(arch, body + "global_atomic_cmpswap v59, v[20:21], s[6:7]; WAIT", output_bytes=16)
    assert np.array_equal(out.view(np.uint32), [0x100, 0x101, 0x102, 0x103])
    pair = "v21, v20" if is_gfx9(arch) else "v20, v21"  # LDS: comparand first on gfx9, new value first on gfx11
    out, _ = run(arch, f"{body} {CLEAR_LDS} ds_cmpst_b32 v59, {pair}; WAIT; ds_read_b128 v[12:15], v58", lds=64)
    assert np.array_equal(out[lanes - 1].view(np.uint32), [0x100, 0x101, 0x102, 0x103])


@pytest.mark.parametrize("arch", ARCHES)
def test_float_atomics(arch):
    body = WORD + "v_cvt_f32_u32 v20, v61;"
    out, _ = run(arch, body + "global_atomic_add_f32 v59, v20, s[6:7]; WAIT", output_bytes=16)
    lanes = np.arange(wave_size(arch), dtype=np.float32)
    assert np.array_equal(out.view(np.float32), [lanes[k::4].sum() for k in range(4)])
    if is_gfx9(arch):
        body = "v_and_b32 v59, 0, v61; v_mov_b32 v20, 0x3f803f80;"  # two bf16 ones
        out, _ = run(arch, body + "global_atomic_pk_add_bf16 v59, v20, s[6:7]; WAIT", output_bytes=4)
        assert np.array_equal(out.view(np.uint16), [0x4280, 0x4280])  # 64


@pytest.mark.parametrize("arch", ARCHES)
def test_buffer_atomics(arch):
    """The form that returns puts what memory held into the register of its data."""
    before = "s_mov_b32 s8, s6; s_mov_b32 s9, s7; s_mov_b32 s10, -1; s_mov_b32 s11, 0x27000; v_mov_b32 v20, v61;"
    lane = np.arange(wave_size(arch), dtype=np.uint32)
    own = "v_lshlrev_b32 v59, 2, v61;"
    add = "buffer_atomic_add v20, v59, s[8:11], 0 offen"
    out, _ = run(arch, f"{before} {own} {add}; {add}; WAIT", output_bytes=4 * len(lane))
    assert np.array_equal(out.view(np.uint32), 2 * lane)
    returning = f"{add}; WAIT; v_mov_b32 v20, 5; {add} sc0; WAIT; v_lshlrev_b32 v20, 8, v20; {add}; WAIT"
    out, _ = run(arch, f"{before} {own} {returning}", output_bytes=4 * len(lane))
    assert np.array_equal(out.view(np.uint32), lane + 5 + (lane << 8))
    body = f"{before} {WORD} v_cvt_f32_u32 v20, v61; buffer_atomic_add_f32 v20, v59, s[8:11], 0 offen; WAIT"
    out, _ = run(arch, body, output_bytes=16)
    assert np.array_equal(out.view(np.float32), [lane[k::4].sum() for k in range(4)])


@pytest.mark.parametrize("arch", ARCHES)
def test_crossbar(arch):
    lanes = wave_size(arch)
    lane = np.arange(lanes)
    data = rows(arch, 4).copy().view(np.uint32)[:, 0]
    load = LOCAL + "v_lshlrev_b32 v58, 2, v61;"
    out, _ = run(arch, load + "v_xor_b32 v58, 20, v58; ds_bpermute_b32 v12, v58, v20; WAIT")
    assert np.array_equal(out.view(np.uint32)[:, 0], data[lane ^ 5])
    out, _ = run(arch, load + "v_xor_b32 v58, 12, v58; ds_permute_b32 v12, v58, v20; WAIT")
    assert np.array_equal(out.view(np.uint32)[:, 0], data[lane ^ 3])
    swizzles = {
        "swizzle(SWAP,4)": lane ^ 4,
        "swizzle(REVERSE,8)": lane ^ 7,
        "swizzle(BROADCAST,8,3)": lane & ~7 | 3,
        "swizzle(QUAD_PERM,3,0,1,2)": lane & ~3 | (lane - 1) % 4,
        'swizzle(BITMASK_PERM,"01pi1")': lane & ~31 | 0b01001 | lane & 0b00100 | ~lane & 0b00010,
    }
    results = run_all(arch, [load + f"ds_swizzle_b32 v12, v20 offset:{pattern}; WAIT" for pattern in swizzles])
    for (pattern, source), (out, _) in zip(swizzles.items(), results, strict=True):
        assert np.array_equal(out.view(np.uint32)[:, 0], data[source]), pattern


@pytest.mark.parametrize("arch", ARCHES)
def test_scratch(arch):
    store = "scratch_store_dword off, v61, off offset:4; v_mov_b32 v59, 8; scratch_store_dword v59, v60, off;"
    load = "WAIT; scratch_load_dwordx2 v[12:13], off, off offset:4"
    out, _ = run(arch, store + load, scratch=64)
    lane = np.arange(wave_size(arch))
    assert np.array_equal(out.view(np.uint32)[:, :2], np.stack([lane, 16 * lane], 1))


@pytest.mark.parametrize(
    ("arch", "suffix", "size"), [("gfx950", "dwordx4", 16), ("gfx950", "dword", 4), ("gfx942", "dword", 4)]
)
def test_load_to_lds(arch, suffix, size):
    body = f"s_mov_b32 m0, 0x20; v_mul_u32_u24 v59, {size}, v61; global_load_lds_{suffix} v59, s[4:5] offset:16; WAIT;"
    body += f"v_add_u32 v58, 0x30, v59; ds_read_b{8 * size} v{'[12:15]' if size == 16 else '12'}, v58"
    out, counters = run(arch, body, lds=0x30 + 64 * size)
    assert np.array_equal(out[:, :size], DATA[16 : 16 + 64 * size].reshape(64, size))
    assert counters.by_class["load_to_lds"] == 1
    assert counters.lds_stored == 64 * size


def test_load_to_lds_from_a_buffer():
    before = "s_mov_b32 s8, s4; s_mov_b32 s9, s5; s_mov_b32 s10, -1; s_mov_b32 s11, 0x27000; s_mov_b32 m0, 0;"
    out, _ = run(
        "gfx950", before + "buffer_load_dwordx4 v60, s[8:11], 0 offen lds; WAIT; ds_read_b128 v[12:15], v60", lds=1024
    )
    assert np.array_equal(out, DATA[:1024].reshape(64, 16))


@pytest.mark.parametrize(("bits", "suffix"), [(16, "b64_tr_b16"), (8, "b64_tr_b8"), (4, "b64_tr_b4"), (6, "b96_tr_b6")])
def test_transposing_read(bits, suffix):
    """Each 16 lanes read a matrix with 16 columns, piece by piece along its rows, and hold one column each."""
    size = 12 if bits == 6 else 8
    per_lane = 8 * size // bits
    body = f"v_mul_u32_u24 v59, {size}, v61; {LOCAL} ds_write_b64 v59, v[20:21]; "
    if size == 12:
        body = f"v_mul_u32_u24 v59, {size}, v61; {LOCAL} ds_write_b96 v59, v[20:22]; "
    body += f"WAIT; ds_read_{suffix} v[12:{11 + size // 4}], v59"
    out, _ = run("gfx950", body, lds=64 * size)

    def elements(raw):  # [lanes, bytes] -> [lanes, elements]
        stream = np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little").reshape(len(raw), per_lane, bits)
        return (stream * (1 << np.arange(bits))).sum(2)

    written, read = elements(rows("gfx950", size)), elements(out[:, :size])
    for group in range(4):
        matrix = written[16 * group : 16 * group + 16].reshape(-1, 16)  # row by row
        assert np.array_equal(read[16 * group : 16 * group + 16], matrix.T)


def test_flat_reaches_lds_and_scratch():
    """The upper half of a flat address names LDS or scratch; src_shared_base and src_private_base give it."""
    body = "s_mov_b64 s[12:13], src_shared_base; v_lshlrev_b32 v62, 2, v61; v_mov_b32 v63, s13; v_add_u32 v20, 7, v61;"
    body += "flat_store_dword v[62:63], v20; WAIT; ds_read_b32 v12, v62; WAIT;"
    body += "s_mov_b64 s[12:13], src_private_base; v_mov_b32 v62, 8; v_mov_b32 v63, s13;"
    body += "flat_store_dword v[62:63], v61; WAIT; scratch_load_dword v13, off, off offset:8"
    out, _ = run("gfx950", body, lds=256, scratch=16)
    lane = np.arange(64)
    assert np.array_equal(out.view(np.uint32)[:, :2], np.stack([lane + 7, lane], 1))


def test_uninitialised_wrapper_is_an_output():
    out = np.zeros((64, 16), np.uint8)
    text = _PROLOGUE.format(quad="dwordx4") + "\n  global_store_dwordx4 v60, v[12:15], s[6:7]\n"
    launch(assemble({"k": text}, "gfx950"), "k", (1,), (64,), [DATA, uninitialised(out)])
    assert np.array_equal(out.view(np.uint32)[:, 0], np.full(64, 0x11223344))
