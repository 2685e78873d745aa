"""The seeds' mechanisms, read back through `choose`: what #3783, #3580 and #1015 say, case by case."""

from dataclasses import replace

import pytest

from sglang_amd_quant.selection import Config, GemmProblem, Selector
from sglang_amd_quant.selection.buckets import block_bound
from sglang_amd_quant.selection.packs import Packs
from sglang_amd_quant.selection.rules import RULES, e_thresholds

EMPTY = Packs([])
M3 = GemmProblem("moe_gate_up", "mxfp8", "gfx950", 1, 1536, 6144, 0, 128, 128, 4, layout="strided")
A8W4 = GemmProblem("moe_gate_up", "w4a8", "gfx950", 1, 5760, 2880, 0, 128, 128, 4, layout="strided")


@pytest.fixture(scope="module")
def select():
    return Selector(EMPTY)


@pytest.mark.parametrize(
    ("n", "e", "m", "hip"),
    [
        (1536, 128, 4, True),  # 16 routed rows
        (1536, 32, 4, True),  # at any E
        (1536, 64, 5, False),  # 20 rows want 128 experts
        (1536, 128, 5, True),
        (1536, 128, 16, True),  # 64 rows
        (1536, 128, 17, False),
        (768, 128, 16, True),  # TP8
        (768, 16, 4, True),
        (768, 16, 5, False),
        (3072, 128, 1, False),  # TP2 has no row in the table
    ],
)
def test_3783_gate_up_bounds_on_routed_rows_and_experts(select, n, e, m, hip):
    choice = select(replace(M3, n=n, e_local=e, m=m))
    assert (choice.kernel == "hip_mxfp8_moe") == hip
    assert choice.source == ("rule" if hip else "heuristic")


@pytest.mark.parametrize(("m", "weighted", "hip"), [(2, False, True), (2, True, True), (3, True, False)])
def test_3783_down_bound(select, m, weighted, hip):
    down = replace(M3, op="moe_down", m=m, n=6144, k=768, e_local=64, weighted=weighted)
    assert (select(down).kernel == "hip_mxfp8_moe") == hip


def test_3783_block_n_is_16_for_down_and_8_for_gate_up(select):
    assert select(M3).config.block_n == 8
    down = replace(M3, op="moe_down", n=6144, k=768)
    assert select(down).config.block_n == 16


@pytest.mark.parametrize(
    ("m", "k", "kernel", "block_n"),
    [
        (1, 6144, "hip_mxfp8_gemv", 4),
        (8, 6144, "hip_mxfp8_gemv", 4),
        (9, 6144, "hip_mxfp8_gemv", 8),
        (1, 4096, "hip_mxfp8_gemv", 8),
        (16, 4096, "hip_mxfp8_gemv", 8),
        (17, 4096, "triton_gemm_mx", 128),  # untuned M > 16 is not the crossover kernel's
        (64, 4096, "triton_gemm_mx", 128),
    ],
)
def test_3783_dense_envelope_without_an_entry(select, m, k, kernel, block_n):
    choice = select(GemmProblem("linear", "mxfp8", "gfx950", m, 2048, k, layout="strided"))
    assert (choice.kernel, choice.config.block_n) == (kernel, block_n)


@pytest.mark.parametrize(
    ("arch", "weight", "layout"),
    [
        ("gfx950", "e2m1", "preshuffle"),
        ("gfx950", "e4m3", "mxfp8_lane"),
        ("gfx942", "e2m1", "cdna3_e2m1"),
        ("gfx942", "e4m3", "cdna3_e4m3"),
        ("gfx1151", "e2m1", "preshuffle"),
        ("gfx1100", "e4m3", "preshuffle"),
    ],
)
def test_the_grouped_decode_kernels_have_these_bounds_too(select, arch, weight, layout):
    scheme = "mxfp8" if weight == "e4m3" else "w4a16"
    gate_up = GemmProblem("moe_gate_up", scheme, arch, 1, 5760, 2880, 0, 32, 128, 4, layout=f"decode_{layout}")
    for op, e, rows, block_m in (
        ("moe_gate_up", 32, 8, 4),
        ("moe_gate_up", 32, 16, 16),
        ("moe_gate_up", 32, 20, None),
        ("moe_gate_up", 128, 64, 16),
        ("moe_gate_up", 128, 68, None),
        ("moe_down", 128, 8, 4),
        ("moe_down", 128, 12, None),
    ):
        choice = select(replace(gate_up, op=op, m=rows // 4, e_local=e))
        more = "triton_moe" if (arch, weight) == ("gfx950", "e4m3") else f"triton_{weight}_"
        assert choice.kernel.startswith(more if block_m is None else "hip_moe_decode_"), (op, e, rows)
        assert block_m in (None, choice.config.block_m)


def test_3783_thresholds_are_found_in_the_rules():
    assert e_thresholds("gfx950", "moe_gate_up", "mxfp8") == (128,)
    assert e_thresholds("gfx950", "moe_down", "mxfp8") == ()
    assert all(rule.origin for rule in RULES)


def test_1015_prefill_gate_up_only(select):
    gate_up = GemmProblem(
        "moe_gate_up", "int4_w4a16", "gfx1151", 994, 1024, 2048, e_local=256, e_total=256, top_k=8, group=128,
        layout="exllama",
    )  # fmt: skip
    assert select(gate_up).kernel == "hip_moe_w4a16_wmma"
    assert select(gate_up).config == Config(32, 256, 32)
    for other in (
        replace(gate_up, m=5),  # decode
        replace(gate_up, group=64),
        replace(gate_up, top_k=4),
        replace(gate_up, n=1024 + 128),
        replace(gate_up, op="moe_down", n=2048, k=512),
    ):
        assert select(other).kernel == "triton_moe_w4a16"


@pytest.mark.parametrize(
    ("arch", "m", "n", "expected"),
    [
        # routing gives BLOCK_M 16 for M=1: 4 rows on 4 tiles. gfx950 halves BLOCK_N once, to 64; gfx942 down to 32.
        ("gfx950", 1, 5760, Config(16, 64, 256, num_warps=4, num_stages=2)),
        ("gfx942", 1, 768, Config(16, 32, 256, num_warps=4, num_stages=2)),
        # 128 tokens x 4 on 128 experts are 512 - 127 rows: many tiles, no halving.
        ("gfx950", 128, 5760, Config(16, 128, 256, num_warps=4, num_stages=2)),
        ("gfx950", 1024, 1024, Config(32, 128, 256, num_warps=4, num_stages=2)),
        ("gfx950", 1024, 4096, Config(32, 256, 256, num_warps=4, num_stages=2)),
        ("gfx950", 1024, 5760, Config(32, 512, 256, num_warps=4, num_stages=1)),  # 165 876 B at two stages
        ("gfx950", 2048, 5760, Config(64, 128, 256, num_warps=4, num_stages=1)),  # rocprof
        ("gfx950", 8192, 5760, Config(128, 256, 256, num_warps=4, num_stages=2)),
        ("gfx950", 8192, 96, Config(128, 128, 256, num_warps=4, num_stages=2)),
        ("gfx942", 1024, 1024, Config(32, 128, 256, num_warps=4, num_stages=2)),
        ("gfx942", 1024, 1056, Config(32, 256, 256, num_warps=8, num_stages=2)),
        ("gfx942", 2048, 5760, Config(64, 128, 256, num_warps=8, num_stages=2)),
        ("gfx942", 8192, 5760, Config(128, 128, 256, num_warps=4, num_stages=2)),
    ],
)
def test_3580_heuristic_table(select, arch, m, n, expected):
    cu_count = {"gfx950": 256, "gfx942": 304}[arch]
    choice = select(replace(A8W4, arch=arch, cu_count=cu_count, m=m, n=n))
    assert choice.source == "heuristic"
    assert choice.config == expected.over(Config(split_k=1, waves_per_eu=0, nonkdim=16))


def test_3580_floor_of_64_where_mx_is_emitted(select):
    choice = select(replace(A8W4, arch="gfx942", cu_count=304, m=1, n=768, out_dtype="mxfp8"))
    assert choice.config.block_n == 64


def test_3580_sync_free_bound_of_tiles():
    """Against brute force: the most tiles any split of `rows` rows over E experts can need."""

    def most(rows, experts, block_m):
        best = {0: 0}
        for _ in range(experts):
            step: dict[int, int] = {}
            for used, tiles in best.items():
                for take in range(rows - used + 1):
                    total = tiles + -(-take // block_m)
                    step[used + take] = max(step.get(used + take, 0), total)
            best = step
        return best[rows]

    for rows in range(18):
        for experts in range(1, 5):
            for block_m in (1, 2, 4, 16):
                assert block_bound(rows, experts, block_m) == most(rows, experts, block_m)


def test_46117_decode_tile_and_stock_tile(select):
    tiny = GemmProblem("linear", "w4a8", "gfx950", 4, 2048, 4096, layout="strided")
    assert select(tiny).config.tile == (16, 16, 1024)
    assert select(replace(tiny, m=128)).config.tile == (64, 128, 128)


def test_sglang_native_mxfp8_moe_tiles(select):
    far = replace(M3, n=2048, k=4096)
    assert (select(far).config.tile, select(far).config.num_warps) == ((64, 64, 128), 4)
    assert (select(replace(far, m=9)).config.tile, select(replace(far, m=9)).config.num_warps) == ((64, 128, 128), 8)
    assert select(replace(far, k=2048)).config.num_warps == 8
