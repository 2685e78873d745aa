"""Launching: arguments, limits, errors that say what is wrong, and the counters."""

import numpy as np
import pytest
from assembling import assemble, compile_hip
from emulator import (
    Checks,
    CodeObject,
    CodeObjectError,
    InstructionLimit,
    KernelFault,
    LaunchError,
    UnknownInstruction,
    launch,
    uninitialised,
)

ARCHES = ("gfx950", "gfx942", "gfx1100", "gfx1151")
KERNEL = 'extern "C" __attribute__((global)) '
X, BX = "__builtin_amdgcn_workitem_id_x()", "__builtin_amdgcn_workgroup_id_x()"

ARGUMENTS = KERNEL + """
void arguments(double *out, signed char a, short b, int c, long d, float e, double f, const float *g) {
  out[0] = a; out[1] = b; out[2] = c; out[3] = d; out[4] = e; out[5] = f; out[6] = g ? g[0] : -1;
}"""  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
def test_arguments_of_every_size(arch):
    code = compile_hip(ARGUMENTS, arch)
    out = np.zeros(7)
    launch(code, "arguments", (1,), (1,), [uninitialised(out), -5, -300, -70000, -(1 << 40), 0.5, 0.1, None])
    assert np.array_equal(out, [-5, -300, -70000, -(1 << 40), 0.5, 0.1, -1])
    values = [np.int8(7), np.int16(8), np.uint32(9), np.int64(10), np.float32(11), 12.0, np.full(1, 13, np.float32)]
    launch(code, "arguments", (1,), (1,), [out, *values])
    assert np.array_equal(out, [7, 8, 9, 10, 11, 12, 13])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([np.zeros(7)], "takes 8 arguments"),
        ([np.zeros(7), 300, 0, 0, 0, 0.0, 0.0, None], "300 does not fit 1 bytes"),
        ([3, 0, 0, 0, 0, 0.0, 0.0, None], "is a pointer, 3 was given"),
        ([np.zeros(7), np.zeros(1), 0, 0, 0, 0.0, 0.0, None], "is a 1-byte scalar, an array was given"),
        ([np.zeros(14)[::2], 0, 0, 0, 0, 0.0, 0.0, None], "not C-contiguous"),
        ([np.zeros(7), 0, 0, 0, 0, np.float64(0), 0.0, None], "8 bytes given, the kernel takes 4"),
        ([np.zeros(7), 0, 0, "x", 0, 0.0, 0.0, None], "str is neither"),
    ],
)
def test_wrong_arguments(args, message):
    with pytest.raises(LaunchError, match=message):
        launch(compile_hip(ARGUMENTS, "gfx942"), "arguments", (1,), (1,), args)


IDENTITY = KERNEL + """
void identity(int *out) {
  const int x = __builtin_amdgcn_workitem_id_x(), bx = __builtin_amdgcn_workgroup_id_x();
  const int y = __builtin_amdgcn_workitem_id_y(), by = __builtin_amdgcn_workgroup_id_y();
  const int z = __builtin_amdgcn_workitem_id_z(), bz = __builtin_amdgcn_workgroup_id_z();
  const int sx = __builtin_amdgcn_workgroup_size_x(), sy = __builtin_amdgcn_workgroup_size_y();
  const int thread = (z * sy + y) * sx + x, block = (bz * 3 + by) * 2 + bx;
  out[block * 30 + thread] = x + 10 * y + 100 * z + 1000 * bx + 10000 * by + 100000 * bz;
}"""  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
def test_three_dimensions(arch):
    """Work-item and work-group numbers, and group sizes from the hidden arguments."""
    out = np.full((2, 3, 2, 3, 2, 5), -1, np.int32)
    launch(compile_hip(IDENTITY, arch), "identity", (2, 3, 2), (5, 2, 3), [uninitialised(out)])
    bz, by, bx, z, y, x = np.indices(out.shape)
    assert np.array_equal(out, x + 10 * y + 100 * z + 1000 * bx + 10000 * by + 100000 * bz)


DYNAMIC = KERNEL + f"""
void dynamic(int *out) {{
  extern __attribute__((shared)) int tile[];
  tile[{X}] = {X};
  out[{X}] = tile[{X}];
}}"""  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
def test_dynamic_lds(arch):
    code, out = compile_hip(DYNAMIC, arch), np.zeros(64, np.int32)
    launch(code, "dynamic", (1,), (64,), [out], lds_bytes=256)
    assert np.array_equal(out, np.arange(64))
    with pytest.raises(KernelFault, match="LDS at byte 252"):
        launch(code, "dynamic", (1,), (64,), [out], lds_bytes=252)
    most = 160 * 1024 if arch == "gfx950" else 64 * 1024
    launch(code, "dynamic", (1,), (64,), [out], lds_bytes=most)
    with pytest.raises(LaunchError, match=f"{arch} has {most} per block"):
        launch(code, "dynamic", (1,), (64,), [out], lds_bytes=most + 1)


def test_sizes():
    code, out = compile_hip(DYNAMIC, "gfx942"), np.zeros(64, np.int32)
    with pytest.raises(LaunchError, match="2048 threads per block"):
        launch(code, "dynamic", (1,), (2048,), [out])
    for grid in ((0,), (), (1, 1, 1, 1)):
        with pytest.raises(LaunchError, match="one to three sizes"):
            launch(code, "dynamic", grid, (64,), [out])


def test_unknown_names_and_files(tmp_path):
    code = compile_hip(DYNAMIC, "gfx942")
    with pytest.raises(CodeObjectError, match="no kernel 'nothing'; this code object has dynamic"):
        launch(code, "nothing", (1,), (1,), [])
    with pytest.raises(CodeObjectError, match="not a 64-bit"):
        CodeObject(b"\x7fELF" + bytes(60))
    other = bytearray(code.data)
    other[48] = 0x30  # gfx908
    with pytest.raises(CodeObjectError, match="EF_AMDGPU_MACH 0x30"):
        CodeObject(bytes(other))
    path = tmp_path / "kernel.hsaco"
    path.write_bytes(code.data)
    out = np.zeros(64, np.int32)
    launch(path, "dynamic", (1,), (64,), [out], lds_bytes=256)
    assert out[63] == 63


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [
        ("gfx950", "s_getreg_b32 s8, hwreg(HW_REG_MODE)"),
        ("gfx942", "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0"),
        ("gfx950", "v_smfmac_f32_16x16x32_bf16 v[0:3], v[4:5], v[8:11], v12"),
        ("gfx1100", "image_load v0, v1, s[0:7] dmask:0x1 dim:SQ_RSRC_IMG_1D"),
    ],
)
def test_unknown_instruction_is_named(arch, instruction):
    code = assemble({"k": f"s_nop 0\n{instruction}"}, arch)
    with pytest.raises(UnknownInstruction) as caught:
        launch(code, "k", (1,), (64,), [None, None])
    mnemonic = instruction.split()[0]
    assert mnemonic in str(caught.value)
    assert arch in str(caught.value)
    assert caught.value.address == code.kernel("k").address + 4


def test_endless_loop_ends():
    code = assemble({"k": ".Lagain:\ns_branch .Lagain"}, "gfx942")
    with pytest.raises(InstructionLimit, match="more than 1000 instructions"):
        launch(code, "k", (1,), (64,), [None, None], limit=1000)


FAR = KERNEL + """
void far(unsigned char *p, long at) { p[at] = p[at] + 1; }"""  # fmt: skip


def test_buffers_beyond_4_gib():
    """The memory is not touched but where the kernel touches it, so a huge weight costs nothing."""
    code, array = compile_hip(FAR, "gfx950"), np.zeros(5 << 30, np.uint8)
    at = (9 << 29) + 12345
    launch(code, "far", (1,), (1,), [array, at], record=False)
    assert array[at] == 1
    with pytest.raises(KernelFault, match="byte 5368709120 of argument 0"):
        launch(code, "far", (1,), (1,), [array, 5 << 30], record=False)


OVERLAP = KERNEL + f"""
void shift(const float *x, float *y) {{ y[{X}] = x[{X}] + 1; }}"""  # fmt: skip


def test_arrays_that_share_memory():
    code, memory = compile_hip(OVERLAP, "gfx942"), np.arange(96, dtype=np.float32)
    launch(code, "shift", (1,), (64,), [memory[:64], memory[32:]])
    assert np.array_equal(memory[32:96], np.arange(1, 65))
    counters = launch(code, "shift", (1,), (64,), [memory[:64], memory[:64]])
    assert counters.traffic[0] == counters.traffic[1]
    assert (counters.loaded, counters.stored) == (256, 256)


# ---- counters ----

REREAD = KERNEL + f"""
void reread(const float *x, float *y, int times) {{
  float sum = 0;
  for (int k = 0; k < times; k++) sum += *(const volatile float *)(x + {X});
  y[{X} + 64 * {BX}] = sum;
}}"""  # fmt: skip


@pytest.mark.parametrize("arch", ["gfx950", "gfx1100"])
def test_traffic(arch):
    x, y = np.ones(64, np.float32), np.zeros(128, np.float32)
    counters = launch(compile_hip(REREAD, arch), "reread", (2,), (64,), [x, uninitialised(y), 3])
    assert np.array_equal(y, np.full(128, 3))
    assert (counters.traffic[0].loaded, counters.traffic[0].loaded_distinct) == (2 * 3 * 256, 256)
    assert (counters.traffic[1].stored, counters.traffic[1].stored_distinct) == (512, 512)
    assert counters.traffic[2] is None
    waves = 2 if arch == "gfx950" else 4
    assert counters.waves == waves
    assert counters.by_class["load"] == 3 * waves
    assert sum(counters.by_class.values()) == sum(counters.by_mnemonic.values()) == counters.wave_instructions
    unrecorded = launch(compile_hip(REREAD, arch), "reread", (2,), (64,), [x, y, 3], record=False)
    assert (unrecorded.traffic[0].loaded, unrecorded.traffic[0].loaded_distinct) == (2 * 3 * 256, -1)


@pytest.mark.parametrize(
    ("arch", "stride", "conflicts"),
    [
        ("gfx942", 1, 0),  # 32 banks: two groups of 32 lanes
        ("gfx942", 2, 2),
        ("gfx942", 32, 62),
        ("gfx942", 33, 0),
        ("gfx942", 0, 0),  # one word for all: a broadcast
        ("gfx950", 2, 1),  # 64 banks: one group of 64 lanes
        ("gfx950", 32, 31),
        ("gfx1100", 32, 31),  # one group of 32 lanes
    ],
)
def test_bank_conflicts(arch, stride, conflicts):
    load = "ds_read_b32" if arch.startswith("gfx9") else "ds_load_b32"
    body = f"v_mul_u32_u24 v1, {4 * stride}, v0\n{load} v2, v1\ns_waitcnt lgkmcnt(0)"
    lanes = 64 if arch.startswith("gfx9") else 32
    code = assemble({"k": body}, arch, lds=64 * 1024)
    counters = launch(code, "k", (1,), (lanes,), [None, None], checks=Checks.ALL & ~Checks.UNINITIALISED)
    assert counters.lds_bank_conflicts == conflicts
    assert counters.lds_accesses == 1
