"""The checks: kernels that are broken on purpose are caught when the check is on, and pass unnoticed when it is off.

The kernel under mutation reverses each block of 256 numbers through LDS, with a masked tail, and doubles them.
"""

import numpy as np
import pytest
from assembling import assemble, compile_hip, wave_size
from emulator import IN_ORDER, REVERSED, Checks, FindingKind, KernelFault, launch, random_schedule, uninitialised

ARCHES = ("gfx950", "gfx942", "gfx1100", "gfx1151")
N = 1000  # not a multiple of the block

REVERSE = """
extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(256, 256)))
void reverse(const float *x, float *y, int n) {
  __attribute__((shared)) static float tile[256];
  const int t = __builtin_amdgcn_workitem_id_x(), i = 256 * __builtin_amdgcn_workgroup_id_x() + t;
#ifndef NO_TAIL
  const bool inside = i < n;
#else
  const bool inside = true;
#endif
  tile[t] = inside ? x[i] : 0.f;
#ifndef NO_BARRIER
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#else
  __asm__ volatile("s_waitcnt lgkmcnt(0)" ::: "memory");
#endif
  const int last = n - 1 - 256 * (int)__builtin_amdgcn_workgroup_id_x(), from = (last < 255 ? last : 255) - t;
  if (inside && from >= 0) y[i] = 2 * tile[from];
}
"""


def build(arch, define="", edit=()):
    return compile_hip(f"#define {define}\n{REVERSE}" if define else REVERSE, arch, edit)


def run(code, checks=Checks.ALL, schedule=IN_ORDER, n=N):
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    y = np.zeros_like(x)
    launch(code, "reverse", (-(-n // 256),), (256,), [x, uninitialised(y), n], checks=checks, schedule=schedule)
    expected = np.concatenate([2 * x[k : k + 256][::-1] for k in range(0, n, 256)])
    return np.array_equal(y, expected)


def drop(instruction):
    return ((instruction, "s_nop 0"),)


# name -> the #define or the edit of the assembly that breaks it, the checks that see it, what they must report
MUTATIONS = {
    "missing wait for a load": ("", drop("s_waitcnt vmcnt(0)"), Checks.WAITS, FindingKind.MISSING_WAIT),
    "missing wait for LDS and scalar loads": ("", drop("s_waitcnt lgkmcnt(0)"), Checks.WAITS, FindingKind.MISSING_WAIT),
    "missing barrier": ("NO_BARRIER", (), Checks.BARRIERS | Checks.UNINITIALISED, FindingKind.LDS_RACE),
    "missing tail mask": ("NO_TAIL", (), Checks.BOUNDS, FindingKind.OUT_OF_BOUNDS),
}


@pytest.mark.parametrize("arch", ARCHES)
def test_sound_kernel_has_no_findings(arch):
    for schedule in (IN_ORDER, REVERSED, random_schedule(1)):
        assert run(build(arch), schedule=schedule)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(arch, name):
    define, edit, checks, kind = MUTATIONS[name]
    code = build(arch, define, edit)
    with pytest.raises(KernelFault) as caught:
        run(code)
    assert kind in {f.kind for f in caught.value.findings}
    # The checks named see it alone. (A wait dropped before a barrier is a race as well: the write may come late.)
    with pytest.raises(KernelFault):
        run(code, checks=checks)
    run(code, checks=Checks.ALL & ~(checks | Checks.BARRIERS))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_passes_unnoticed_without_the_checks(arch, name):
    """And, run in order, gives the right answer all the same: only the checks stand between it and the hardware."""
    define, edit, _, kind = MUTATIONS[name]
    right = run(build(arch, define, edit), checks=Checks.NONE)
    assert right == (kind != FindingKind.LDS_RACE)


@pytest.mark.parametrize("arch", ARCHES)
def test_finding_names_instruction_lane_and_block(arch):
    with pytest.raises(KernelFault) as caught:
        run(build(arch, "NO_TAIL"), checks=Checks.BOUNDS, n=900)
    (finding,) = caught.value.findings  # the store stays inside: it is masked by what it reads
    assert finding.text.startswith("global_load")
    first = 900 - 3 * 256  # thread of block 3 that is the first beyond the array
    assert finding.block == (3, 0, 0)
    assert (finding.wave, finding.lane) == divmod(first, wave_size(arch))
    assert finding.count == 256 - first
    assert "byte 3600 of argument 0" in finding.detail
    assert "(3600 bytes)" in finding.detail


SCHEDULE = """
extern "C" __attribute__((global)) void last_writer(int *out, int *lds_out) {
  __attribute__((shared)) static int winner;
  const int t = __builtin_amdgcn_workitem_id_x();
  if (t % 64 == 0) *(volatile int *)&winner = t / 64;
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  out[0] = __builtin_amdgcn_workgroup_id_x();
  lds_out[0] = *(volatile int *)&winner;
}
"""


def test_schedules_expose_order_dependence():
    """Blocks and waves that overwrite each other's result: which one wins shows the order they ran in."""

    def winners(schedule):
        out, winner = np.full(1, -1, np.int32), np.full(1, -1, np.int32)
        code = compile_hip(SCHEDULE, "gfx942")
        launch(code, "last_writer", (8,), (256,), [out, winner], checks=Checks.NONE, schedule=schedule)
        return int(out[0]), int(winner[0])

    assert winners(IN_ORDER) == (7, 3)
    assert winners(REVERSED) == (0, 0)
    random = [winners(random_schedule(seed)) for seed in range(12)]
    assert len(set(random)) > 3
    assert random == [winners(random_schedule(seed)) for seed in range(12)]  # a seed is a schedule


# ---- loads that write LDS directly ----

TO_LDS = """
extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(128, 128)))
void through_lds(const float *x, float *y) {
  __attribute__((shared)) static float tile[128];
  typedef __attribute__((address_space(1))) void *Global;
  typedef __attribute__((address_space(3))) void *Local;
  const int t = __builtin_amdgcn_workitem_id_x(), wave = t / 64;
  __builtin_amdgcn_global_load_lds((Global)const_cast<float *>(x + t), (Local)(tile + 64 * wave), 4, 0, 0);
  __asm__ volatile("WAIT" ::: "memory");
  BARRIER
  y[t] = ((volatile float *)tile)[t ^ FLIP];
}
"""
BARRIER = "__builtin_amdgcn_s_barrier();"


def through_lds(arch, wait, barrier, flip, checks=Checks.ALL):
    text = TO_LDS.replace("WAIT", wait).replace("BARRIER", barrier).replace("FLIP", str(flip))
    code = compile_hip(text, arch)
    x = np.arange(128, dtype=np.float32)
    y = np.zeros(128, np.float32)
    launch(code, "through_lds", (1,), (128,), [x, uninitialised(y)], checks=checks)
    return np.array_equal(y, x[np.arange(128) ^ flip])


@pytest.mark.parametrize("arch", ["gfx950", "gfx942"])
def test_load_to_lds_needs_its_wait(arch):
    waited, forgotten = "s_waitcnt vmcnt(0)", "s_waitcnt lgkmcnt(0)"
    assert through_lds(arch, waited, "", 1)  # own wave's data: no barrier needed
    assert through_lds(arch, waited, BARRIER, 64)
    with pytest.raises(KernelFault) as caught:
        through_lds(arch, forgotten, "", 1)
    assert {f.kind for f in caught.value.findings} == {FindingKind.DMA_NOT_WAITED}
    assert "global_load_lds_dword" in caught.value.findings[0].detail
    with pytest.raises(KernelFault) as caught:  # a barrier does not make another wave's load arrive
        through_lds(arch, forgotten, BARRIER, 64)
    assert FindingKind.LDS_RACE in {f.kind for f in caught.value.findings}
    assert through_lds(arch, forgotten, BARRIER, 64, checks=Checks.NONE)


# ---- single rules, in assembly ----

_START = """
  s_load_{quad} s[4:7], s[0:1], 0x0
  v_lshlrev_b32 v60, 2, v0
  s_waitcnt lgkmcnt(0)
"""


def assembled(arch, body, threads=None, lds=1024, checks=Checks.ALL, uninit=False):
    text = _START.format(quad="dwordx4" if arch.startswith("gfx9") else "b128") + body
    x, y = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    code = assemble({"k": text}, arch, lds=lds)
    args = [uninitialised(x) if uninit else x, y]
    launch(code, "k", (1,), (threads or wave_size(arch),), args, checks=checks)
    return y


def findings(*args, **options):
    with pytest.raises(KernelFault) as caught:
        assembled(*args, **options)
    return caught.value.findings


def test_counted_waits():
    """vmcnt(n) covers all but the n youngest loads: the first load may be used, the second not."""
    body = "global_load_dword v1, v60, s[4:5]\nglobal_load_dword v2, v60, s[4:5] offset:4\ns_waitcnt vmcnt(1)\n"
    assembled("gfx942", body + "v_add_u32 v3, v1, v1")
    (finding,) = findings("gfx942", body + "v_add_u32 v3, v2, v2")
    assert finding.detail.startswith("v2 is still being loaded")
    assert "offset:4" in finding.detail


def test_halves_of_a_register_are_waited_for_apart():
    """Two loads into the halves of v1: with one outstanding the lower half may be used, the upper and the whole not."""
    load = "global_load_d16_b16 v1, v60, s[4:5]\nglobal_load_d16_hi_b16 v1, v60, s[4:5] offset:2\ns_waitcnt vmcnt(1)\n"
    assembled("gfx1100", load + "ds_store_b16 v60, v1\nv_mov_b16 v2.l, v1.l")
    for use in ("ds_store_b16_d16_hi v60, v1", "v_mov_b16 v2.l, v1.h", "v_mov_b32 v2, v1", "ds_store_b32 v60, v1"):
        (finding,) = findings("gfx1100", load + use)
        assert finding.detail.startswith("v1 is still being loaded")
        assert "d16_hi" in finding.detail


def test_scalar_loads_return_in_any_order():
    """Only lgkmcnt(0) waits for a scalar load, and no other count helps while one is under way."""
    scalar = "s_load_dword s8, s[4:5], 0x0\n"
    local = "ds_write_b32 v60, v0\nds_read_b32 v1, v60\n"
    wait, wait_but_one, use = "s_waitcnt lgkmcnt(0)\n", "s_waitcnt lgkmcnt(1)\n", "v_mov_b32 v2, v1\n"
    assembled("gfx942", local + wait + use + scalar + wait + "s_mov_b32 s9, s8")
    assert findings("gfx942", scalar + scalar.replace("s8", "s10") + wait_but_one + "s_mov_b32 s9, s8")
    assert findings("gfx942", local + scalar + wait_but_one + use)
    # Of four, three are done, in the worst case the scalar load among them: the two oldest of the others are certain.
    late = local + "ds_read_b32 v3, v60\n" + scalar + wait_but_one
    assembled("gfx942", late + use)
    assert findings("gfx942", late + "v_mov_b32 v2, v3")


def test_stores_have_their_own_counter_on_gfx11():
    body = "global_load_b32 v1, v60, s[4:5]\nglobal_store_b32 v60, v60, s[6:7]\n"
    assembled("gfx1100", body + "s_waitcnt vmcnt(0)\nv_mov_b32 v2, v1")
    assert findings("gfx1100", body + "s_waitcnt_vscnt null, 0x0\nv_mov_b32 v2, v1")
    gfx9 = (
        "global_load_dword v1, v60, s[4:5]\nglobal_store_dword v60, v60, s[6:7]\ns_waitcnt vmcnt(1)\nv_mov_b32 v2, v1"
    )
    assembled("gfx942", gfx9)  # the store counts too there: one outstanding can only be the store


def test_overwriting_a_register_that_is_being_loaded():
    body = "global_load_dword v1, v60, s[4:5]\nv_mov_b32 v1, 0\ns_waitcnt vmcnt(0)"
    (finding,) = findings("gfx950", body)
    assert finding.text.startswith("v_mov_b32")
    assembled("gfx950", "global_load_dword v1, v60, s[4:5]\nglobal_load_dword v1, v60, s[4:5]\ns_waitcnt vmcnt(0)")


def test_storing_a_register_that_is_being_loaded():
    (finding,) = findings("gfx1100", "ds_store_b32 v60, v0\nds_load_b32 v1, v60\nglobal_store_b32 v60, v1, s[6:7]")
    assert finding.text.startswith("global_store_b32")


WORD = "v_mov_b32 v1, 7\nds_write_b32 v62, v1\nWAIT\ns_barrier\n"
"""Both waves write the same to a word."""

RACE = {  # body with two waves, whether they race
    "write, barrier, read": ("ds_write_b32 v60, v0\nWAIT\ns_barrier\nds_read_b32 v1, v61\nWAIT", False),
    "write, read": ("ds_write_b32 v60, v0\nWAIT\nds_read_b32 v1, v61\nWAIT", True),
    "write not waited for, barrier, read": ("ds_write_b32 v60, v0\ns_barrier\nds_read_b32 v1, v61\nWAIT", True),
    "read, write": (
        "ds_write_b32 v60, v0\nWAIT\ns_barrier\nds_read_b32 v1, v61\nWAIT\nds_write_b32 v60, v61\nWAIT",
        True,
    ),
    "read, barrier, write": (
        "ds_write_b32 v60, v0\nWAIT\ns_barrier\nds_read_b32 v1, v61\nWAIT\ns_barrier\nds_write_b32 v60, v61\nWAIT",
        False,
    ),
    "read not waited for, barrier, write": (
        "ds_write_b32 v60, v0\nWAIT\ns_barrier\nds_read_b32 v1, v61\ns_barrier\nds_write_b32 v60, v61\nWAIT",
        True,
    ),
    "two writes of different values": ("ds_write_b32 v62, v0\nWAIT", True),
    "two writes of the same value": ("v_mov_b32 v1, 7\nds_write_b32 v62, v1\nWAIT", False),
    "two atomics": ("v_mov_b32 v1, 0\nds_write_b32 v62, v1\nWAIT\ns_barrier\nds_add_u32 v62, v0\nWAIT", False),
    "atomic, read": (
        "v_mov_b32 v1, 0\nds_write_b32 v62, v1\nWAIT\ns_barrier\nds_add_u32 v62, v0\nds_read_b32 v2, v62\nWAIT",
        True,
    ),
    "bytes of one word": ("ds_write_b8 v63, v0\nWAIT", False),
    "word, barrier, own bytes of it read and written": (
        f"{WORD}ds_read_u8 v2, v63\nWAIT\nds_write_b8 v63, v0\nWAIT",
        False,
    ),
    "own bytes of a word, word": (f"{WORD}ds_write_b8 v63, v0\nWAIT\nds_read_b32 v2, v62\nWAIT", True),
    "own bytes of a word, barrier, word, barrier, own bytes": (
        f"{WORD}ds_write_b8 v63, v0\nWAIT\ns_barrier\n{WORD}ds_write_b8 v63, v0\nWAIT\nds_read_u8 v2, v63\nWAIT",
        False,
    ),
}


@pytest.mark.parametrize("schedule", [IN_ORDER, REVERSED], ids=["in order", "reversed"])
@pytest.mark.parametrize("name", RACE)
def test_lds_races(name, schedule):
    """v60: own word, v61: the other wave's word; of lane 0 alone, v62: one word for all, v63: own byte of a word."""
    body, races = RACE[name]
    setup = """
  v_xor_b32 v61, 0x100, v60
  v_lshrrev_b32 v63, 6, v0
  v_mov_b32 v62, 0
"""
    if "v62" in body or "v63" in body:  # one lane per wave
        setup += "  v_and_b32 v59, 63, v0\n  v_cmp_eq_u32 vcc, 0, v59\n  s_and_saveexec_b64 s[10:11], vcc\n"
    text = _START.format(quad="dwordx4") + setup + body.replace("WAIT", "s_waitcnt lgkmcnt(0)")
    code = assemble({"k": text}, "gfx942", lds=1024)
    args = [np.zeros(4, np.uint32), np.zeros(4, np.uint32)]
    if not races:
        launch(code, "k", (2,), (128,), args, schedule=schedule)
        return
    with pytest.raises(KernelFault) as caught:
        launch(code, "k", (2,), (128,), args, schedule=schedule)
    assert FindingKind.LDS_RACE in {f.kind for f in caught.value.findings}
    rest = Checks.ALL & ~(Checks.BARRIERS | Checks.UNINITIALISED)  # what is read too early was not yet written either
    launch(code, "k", (2,), (128,), args, schedule=schedule, checks=rest)


def test_uninitialised_lds():
    read = "ds_read_b32 v1, v60\ns_waitcnt lgkmcnt(0)"
    (finding,) = findings("gfx950", read)
    assert finding.kind == FindingKind.UNINITIALISED
    assert finding.lane == 0
    assert "LDS at byte 0" in finding.detail
    assembled("gfx950", read, checks=Checks.ALL & ~Checks.UNINITIALISED)
    half = "v_cmp_gt_u32 vcc, 20, v0\ns_and_saveexec_b64 s[8:9], vcc\nds_write_b32 v60, v0\ns_mov_b64 exec, s[8:9]\n"
    (finding,) = findings("gfx950", half + read)
    assert finding.lane == 20
    assert finding.count == 44


def test_lds_of_an_earlier_block_is_not_initialised():
    body = "s_cmp_lg_u32 s2, 0\ns_cbranch_scc1 .Lread\nds_write_b32 v60, v0\n.Lread:\n"
    body += "ds_read_b32 v1, v60\ns_waitcnt lgkmcnt(0)"
    text = _START.format(quad="dwordx4") + body
    code = assemble({"k": text}, "gfx942", lds=256)
    args = [np.zeros(4, np.uint32), np.zeros(4, np.uint32)]
    launch(code, "k", (1,), (64,), args)
    with pytest.raises(KernelFault) as caught:
        launch(code, "k", (2,), (64,), args)
    assert caught.value.findings[0].block == (1, 0, 0)


def test_uninitialised_global_memory():
    read = "global_load_dword v1, v60, s[4:5] offset:16\ns_waitcnt vmcnt(0)"
    (finding,) = findings("gfx950", read, uninit=True)
    assert finding.kind == FindingKind.UNINITIALISED
    assert "byte 16 of argument 0" in finding.detail
    assembled("gfx950", read, uninit=True, checks=Checks.ALL & ~Checks.UNINITIALISED)
    assembled("gfx950", "global_store_dword v60, v0, s[4:5] offset:16\n" + read, uninit=True)
    narrow = "global_store_short v60, v0, s[4:5] offset:16\n"  # two bytes of the four that are read
    assert findings("gfx950", narrow + read, uninit=True)


@pytest.mark.parametrize(
    ("address", "what"), [("v_add_u32 v60, 0x1000, v60", "byte 4096"), ("v_add_u32 v60, 0xffc, v60", "lane 1")]
)
def test_out_of_bounds_global(address, what):
    (finding,) = findings("gfx942", f"{address}\nglobal_load_dword v1, v60, s[4:5]\ns_waitcnt vmcnt(0)")
    assert what in str(finding)


def test_access_before_a_buffer_and_to_nothing():
    (finding,) = findings("gfx942", "global_load_dword v1, v60, s[4:5] offset:-8\ns_waitcnt vmcnt(0)")
    assert "8 bytes before of argument 0" in finding.detail
    assert finding.count == 2
    (finding,) = findings("gfx942", "s_mov_b64 s[4:5], 0\nglobal_load_dword v1, v60, s[4:5]\ns_waitcnt vmcnt(0)")
    assert "no buffer" in finding.detail
    (finding,) = findings("gfx942", "s_mov_b64 s[4:5], 64\ns_load_dword s8, s[4:5], 0x0\ns_waitcnt lgkmcnt(0)")
    assert finding.text.startswith("s_load_dword")


def test_out_of_bounds_lds_and_scratch():
    body = "v_add_u32 v61, 0x3f4, v60\nds_write_b64 v61, v[60:61]\ns_waitcnt lgkmcnt(0)"
    (finding,) = findings("gfx942", body)
    assert finding.lane == 2
    assert "LDS at byte 1020" in finding.detail
    (finding,) = findings("gfx942", "scratch_store_dword off, v0, off offset:16\ns_waitcnt vmcnt(0)")
    assert "scratch" in finding.detail


def test_lost_carry_in_address_arithmetic_shows():
    """Buffers straddle a 4 GiB line, so a 64-bit address computed with a 32-bit addition points nowhere."""
    right = "v_mov_b32 v2, s4\nv_mov_b32 v3, s5\nv_add_co_u32 v2, vcc, 0x1000, v2\n"
    right += "v_addc_co_u32 v3, vcc, 0, v3, vcc\n"
    use = "global_load_dword v1, v[2:3], off\ns_waitcnt vmcnt(0)"
    with pytest.raises(KernelFault, match="byte 4096 of argument 0"):  # the array has 4096 bytes
        assembled("gfx942", right + use)
    with pytest.raises(KernelFault, match="before of argument 0"):
        assembled("gfx942", right.replace("v_addc_co_u32 v3, vcc, 0, v3, vcc", "") + use)
