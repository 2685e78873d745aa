"""Published shapes, transcribed as data, must come out of the planner.

Sources: ROCm/aiter: tuned fused-MoE rows, its Qwen3.5 (#3974) and small-M MXFP8 (#3783) tables; and the shapes
that public configs give by hand (2 * I/TP for gate_up, I/TP for down, whole 32-blocks a rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sglang_amd_quant import shapes
from sglang_amd_quant.shapes.facts import ModelFacts
from sglang_amd_quant.shapes.layers import Experts
from sglang_amd_quant.shapes.roofline import OFFSET_LIMIT


def plan(card: str, tp: int, ep: int = 1, **options: object) -> dict[tuple[str, str], shapes.Gemm]:
    """{(op, layer): GEMM} in MXFP8, where a byte is an element."""
    facts = shapes.load(card)
    if options.get("fuse_shared") and not any(x.shared for x in facts.layers if isinstance(x, Experts)):
        options["fuse_shared"] = None
    return {(g.op, g.layer): g for g in shapes.plan(facts, tp, ep, "mxfp8", **options)}  # type: ignore[arg-type]


def experts(card: str, tp: int, ep: int = 1, **options: object) -> tuple[shapes.Gemm, shapes.Gemm]:
    gemms = plan(card, tp, ep, **options)
    (up,) = (g for (op, _), g in gemms.items() if op == "moe_gate_up")
    (down,) = (g for (op, _), g in gemms.items() if op == "moe_down")
    return up, down


@dataclass(frozen=True)
class Row:
    """Experts of one model: hidden size, E and top_k with fused shared ones, and per TP 1, 2, 4, 8 the rest.

    `inter` is the down projection's K a rank, `last` that of the last rank, `padded` it rounded up to 256; `over`: does
    the gate_up weight in bytes at 1 byte an element pass 2^31.
    """

    card: str
    hidden: int
    experts: int
    top_k: int
    inter: tuple[int, ...]
    over: tuple[bool, ...]
    padded: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    billions: tuple[float, ...] = ()


T, F = True, False
ROWS = [
    Row("gpt-oss-120b", 2880, 128, 4, (2880, 1440, 736, 384), (F, F, F, F), (3072, 1536, 768, 512),
        (2880, 1440, 672, 192), (2.12, 1.06, 0.54, 0.28)),
    Row("gpt-oss-20b", 2880, 32, 4, (2880, 1440, 736, 384), (F, F, F, F), (3072, 1536, 768, 512),
        (2880, 1440, 672, 192)),
    Row("MiniMax-M3", 6144, 129, 5, (3072, 1536, 768, 384), (T, T, F, F), (3072, 1536, 768, 512), (),
        (4.87, 2.43, 1.22, 0.61)),
    Row("MiniMax-M2.5", 3072, 256, 8, (1536, 768, 384, 192), (T, F, F, F), (1536, 768, 512, 256)),
    Row("Qwen3.5-397B-A17B", 4096, 513, 11, (1024, 512, 256, 128), (T, T, F, F), (1024, 512, 256, 256)),
    Row("Qwen3.6-35B-A3B", 2048, 257, 9, (512, 256), (F, F), (512, 256)),
    Row("Qwen3-235B-A22B", 4096, 128, 8, (1536, 768, 384, 192), (F, F, F, F)),
    Row("Qwen3-Next-80B-A3B", 2048, 513, 11, (512, 256, 128), (F, F, F)),
    Row("DeepSeek-V3", 7168, 257, 9, (2048, 1024, 512, 256), (T, T, F, F)),
    Row("DeepSeek-R1", 7168, 257, 9, (2048, 1024, 512, 256), (T, T, F, F)),
    Row("DeepSeek-V4-Pro", 7168, 385, 7, (3072, 1536, 768, 384), (T, T, T, F), (3072, 1536, 768, 512)),
    Row("DeepSeek-V4-Flash", 4096, 257, 7, (2048, 1024, 512, 256), (T, T, F, F)),
    Row("Kimi-K2", 7168, 385, 9, (2048, 1024, 512, 256), (T, T, T, F)),
    Row("GLM-4.7", 5120, 161, 9, (1536, 768, 384, 192), (T, F, F, F)),
    Row("GLM-5", 6144, 257, 9, (2048, 1024, 512, 256), (T, T, F, F)),
    Row("Llama-4-Maverick", 5120, 129, 2, (8192, 4096, 2048, 1024), (T, T, T, F)),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.card)
def test_experts_of_every_tp(row: Row) -> None:
    for i, inter in enumerate(row.inter):
        tp = 2**i
        up, down = experts(row.card, tp, fuse_shared=True)
        assert (up.N, up.K, down.N, down.K) == (2 * inter, row.hidden, row.hidden, inter)
        assert (up.E_local, up.E_total, up.top_k) == (row.experts, row.experts, row.top_k)
        assert (up.data_bytes >= OFFSET_LIMIT) is row.over[i]
        if row.padded:
            assert down.padded(256)[1] == row.padded[i]
            assert up.padded(256)[0] == 2 * row.padded[i]
        last_up, last_down = experts(row.card, tp, fuse_shared=True, rank=tp - 1)
        last = row.last[i] if row.last else inter
        assert (last_up.N_used, last_down.K_used) == (2 * last, last)
        assert (last_up.N, last_down.K) == (up.N, down.K)
        if row.billions:
            assert up.elements / 1e9 == pytest.approx(row.billions[i], abs=0.005)


def test_gpt_oss_is_near_the_limit_and_over_it_once_padded() -> None:
    up, _ = experts("gpt-oss-120b", 1)
    assert up.data_bytes / OFFSET_LIMIT == pytest.approx(0.989, abs=0.001)
    n, k = up.padded(256)
    assert up.E_local * n * k / 1e9 == pytest.approx(2.42, abs=0.005)
    assert shapes.limits(up) == ["98.9% of 2^31 bytes", "over 2^31 bytes once padded to 256"]


@pytest.mark.parametrize(("ep", "local", "billions"), [(2, 64, 2.42), (4, 32, 1.21), (8, 16, 0.60)])
def test_minimax_m3_with_experts_whole_on_each_rank(ep: int, local: int, billions: float) -> None:
    """SGLang fuses M3's shared expert without EP only."""
    up, down = experts("MiniMax-M3", ep, ep)
    assert (up.E_local, up.N, up.K, down.N, down.K) == (local, 6144, 6144, 6144, 3072)
    assert up.elements / 1e9 == pytest.approx(billions, abs=0.005)
    assert (up.data_bytes >= OFFSET_LIMIT) is (ep == 2)


@pytest.mark.parametrize(("ep", "local"), [(1, 256), (2, 128), (4, 64), (8, 32)])
def test_the_256_expert_minimax_m3_of_aiter_3783(ep: int, local: int) -> None:
    """aiter #3783 tunes an M3 with 256 experts, their intermediate size divided by 4 within an EP group."""
    config = {**_config("MiniMax-M3"), "num_local_experts": 256, "n_shared_experts": 0}
    gemms = {g.op: g for g in shapes.plan(ModelFacts.from_config(config), 4 * ep, ep, "mxfp8")}
    up, down = gemms["moe_gate_up"], gemms["moe_down"]
    assert (up.E_local, up.N, up.K, down.N, down.K) == (local, 1536, 6144, 6144, 768)
    assert up.elements / 1e9 == pytest.approx({1: 2.42, 2: 1.21, 4: 0.60, 8: 0.30}[ep], abs=0.005)


def _config(card: str) -> dict[str, object]:
    import json

    return json.loads(shapes.cards()[card].read_text())


# aiter's fused-MoE rows: card, hidden, {inter: where it occurs}, ... as (inter, E_local, top_k, TP, EP, fused, padded).
AITER = {
    "DeepSeek-V3": (7168, [(256, 256, 8, 8, 1, F), (512, 257, 9, 4, 1, T), (2048, 32, 8, 8, 8, F),
                           (2048, 33, 9, 8, 8, T), (2048, 64, 8, 4, 4, F)]),
    "DeepSeek-V4-Pro": (7168, [(384, 384, 6, 8, 1, F), (768, 385, 7, 4, 1, T), (1536, 384, 6, 2, 1, F),
                               (3072, 48, 6, 8, 8, F)]),
    "DeepSeek-V4-Flash": (4096, [(256, 256, 6, 8, 1, F), (2048, 256, 6, 1, 1, F)]),
    "GLM-4.7": (5120, [(192, 161, 9, 8, 1, T), (384, 161, 9, 4, 1, T), (1536, 40, 8, 4, 4, F),
                       (1536, 41, 9, 4, 4, T)]),
    "GLM-5": (6144, [(256, 257, 9, 8, 1, T), (512, 256, 8, 4, 1, F), (1024, 257, 9, 2, 1, T),
                     (2048, 256, 8, 1, 1, F)]),
    "Kimi-K2": (7168, [(256, 384, 8, 8, 1, F), (512, 385, 9, 4, 1, T), (1024, 384, 8, 2, 1, F)]),
    "MiniMax-M2.5": (3072, [(384, 256, 8, 4, 1, F), (768, 256, 8, 2, 1, F), (1536, 256, 8, 1, 1, F)]),
    "MiniMax-M3": (6144, [(384, 129, 5, 8, 1, T), (768, 129, 5, 4, 1, T)]),
    "Qwen3-235B-A22B": (4096, [(192, 128, 8, 8, 1, F), (384, 128, 8, 4, 1, F), (1536, 128, 8, 1, 1, F)]),
    "Qwen3.5-397B-A17B": (4096, [(256, 512, 10, 4, 1, F), (512, 513, 11, 2, 1, T)]),
    "Qwen3-Next-80B-A3B": (2048, [(128, 512, 10, 4, 1, F), (256, 512, 10, 2, 1, F), (512, 512, 10, 1, 1, F)]),
    "Llama-4-Maverick": (5120, [(1024, 128, 1, 8, 1, F)]),
}  # fmt: skip


@pytest.mark.parametrize("card", AITER)
def test_fused_moe_rows_of_aiter(card: str) -> None:
    hidden, rows = AITER[card]
    for inter, local, top_k, tp, ep, fused in rows:
        up, down = experts(card, tp, ep, fuse_shared=fused)
        assert (up.K, up.N, down.N, down.K) == (hidden, 2 * inter, hidden, inter)
        assert (up.E_local, up.top_k) == (local, top_k)


@pytest.mark.parametrize(
    ("card", "tp", "inter", "hidden"),
    [("gpt-oss-120b", 1, 3072, 3072), ("gpt-oss-120b", 2, 1536, 3072), ("gpt-oss-120b", 8, 512, 3072),
     ("DeepSeek-V4-Pro", 8, 512, 7168), ("MiniMax-M2.5", 8, 256, 3072)],
)  # fmt: skip
def test_padded_fused_moe_rows_of_aiter(card: str, tp: int, inter: int, hidden: int) -> None:
    _, down = experts(card, tp)
    assert down.padded(256) == (hidden, inter)


DENSE = {
    "gpt-oss-120b": {
        "self_attn.qkv_proj": [(5120, 2880), (2560, 2880), (1280, 2880), (640, 2880)],
        "self_attn.o_proj": [(2880, 4096), (2880, 2048), (2880, 1024), (2880, 512)],
        "mlp.router": [(128, 2880)] * 4,
    },
    "DeepSeek-V3": {
        "self_attn.fused_qkv_a_proj_with_mqa": [(2112, 7168)] * 4,
        "self_attn.q_b_proj": [(24576, 1536), (12288, 1536), (6144, 1536), (3072, 1536)],
        "self_attn.kv_b_proj": [(32768, 512), (16384, 512), (8192, 512), (4096, 512)],
        "self_attn.o_proj": [(7168, 16384), (7168, 8192), (7168, 4096), (7168, 2048)],
        "mlp.gate": [(256, 7168)] * 4,
        "mlp.gate_up_proj": [(36864, 7168), (18432, 7168), (9216, 7168), (4608, 7168)],
        "mlp.down_proj": [(7168, 18432), (7168, 9216), (7168, 4608), (7168, 2304)],
    },
    "MiniMax-M3": {
        "self_attn.fused_qkv_index_proj": [(9856, 6144), (4992, 6144), (2560, 6144), (1536, 6144)],
        "self_attn.qkv_proj": [(9216, 6144), (4608, 6144), (2304, 6144), (1280, 6144)],
        "self_attn.o_proj": [(6144, 8192), (6144, 4096), (6144, 2048), (6144, 1024)],
        "mlp.shared_experts.gate_up_proj": [(6144, 6144), (3072, 6144), (1536, 6144), (768, 6144)],
        "mlp.shared_experts.down_proj": [(6144, 3072), (6144, 1536), (6144, 768), (6144, 384)],
        "mlp.gate_up_proj": [(24576, 6144), (12288, 6144), (6144, 6144), (3072, 6144)],
        "mlp.down_proj": [(6144, 12288), (6144, 6144), (6144, 3072), (6144, 1536)],
    },
}
BF16 = {"mlp.router", "mlp.gate", "self_attn.kv_b_proj"}


@pytest.mark.parametrize("card", DENSE)
def test_dense_projections(card: str) -> None:
    options = {"fuse_shared": False} if card == "MiniMax-M3" else {}
    for i, tp in enumerate((1, 2, 4, 8)):
        gemms = plan(card, tp, **options)
        for layer, shape in DENSE[card].items():
            gemm = gemms["linear", layer]
            assert (layer, tp, gemm.N, gemm.K) == (layer, tp, *shape[i])
            assert gemm.scheme == ("bf16" if layer in BF16 else "mxfp8")


def test_minimax_m3_has_three_dense_blocks() -> None:
    gemms = plan("MiniMax-M3", 8, fuse_shared=False)
    assert gemms["linear", "self_attn.qkv_proj"].blocks == gemms["linear", "mlp.gate_up_proj"].blocks == (0, 1, 2)
    assert gemms["linear", "self_attn.fused_qkv_index_proj"].count == 57
    assert gemms["moe_down", "mlp.experts.down_proj"].count == 57


def test_qwen3_5_tuned_shapes_of_aiter_3974() -> None:
    """TP2; what the table lists besides are the draft block's fc and its q and k projections, unfused there."""
    tuned = {(10240, 4096), (8704, 4096), (4096, 4096), (4096, 512), (1024, 4096), (512, 4096), (64, 4096)}
    facts = shapes.load("Qwen3.5-397B-A17B")
    dense = [g for g in shapes.plan(facts, 2, fuse_shared=False) if g.op == "linear"]
    assert {(g.N, g.K) for g in dense} - {(124160, 4096), (1, 4096)} == tuned
    draft = {g.layer: g for g in shapes.plan(facts, 2, fuse_shared=False, mtp=True) if g.layer.startswith("mtp.")}
    assert (draft["mtp.fc"].N, draft["mtp.fc"].K) == (4096, 8192)
    assert [rows for _, rows in draft["mtp.self_attn.qkv_proj"].parts] == [8192, 256, 256]


BILLIONS = {
    "DeepSeek-V3": 671, "DeepSeek-R1": 671, "DeepSeek-V4-Flash": 284, "DeepSeek-V4-Pro": 1600, "GLM-4.7": 353,
    "GLM-5": 744, "Kimi-K2": 1026, "Llama-3.1-70B": 70.6, "Llama-3.1-8B": 8.03, "Llama-4-Maverick": 400,
    "MiniMax-M2.5": 228.7, "Qwen3-235B-A22B": 235, "Qwen3-30B-A3B": 30.5, "Qwen3-Next-80B-A3B": 80,
    "Qwen3.5-397B-A17B": 397, "Qwen3.6-35B-A3B": 35, "gemma-3-270m": 0.268, "gemma-3-27b": 27.0, "gpt-oss-120b": 116.8,
    "gpt-oss-20b": 20.9,
}  # fmt: skip
"""Parameters in 10^9 as vendors publish them, by name or in the model's description."""


@pytest.mark.parametrize("card", BILLIONS)
def test_weights_add_up_to_the_published_size(card: str) -> None:
    """Every GEMM's weight once, and the embedding where it is not tied; norms and biases are what 2 % is for."""
    config = _config(card)
    weights = sum(g.elements * g.count for g in shapes.plan(shapes.load(card), fuse_shared=False))
    if not config["tie_word_embeddings"]:
        weights += config["vocab_size"] * config["hidden_size"]  # type: ignore[operator]
    assert weights / 1e9 == pytest.approx(BILLIONS[card], rel=0.02)
