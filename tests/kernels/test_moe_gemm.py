"""The grouped GEMM of a fused MoE with its epilogues, and the fused MoE, through the emulator against their twins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
from emulated_triton import Launch, emulated_triton
from sglang_amd_quant.kernels.triton.hopper_pack import row_order
from sglang_amd_quant.kernels.triton.manifest import SCHEMES, TRITON_ARCHS
from sglang_amd_quant.kernels.triton.moe import default_configs, fused_moe_torch, fused_moe_triton
from sglang_amd_quant.kernels.triton.moe_gemm import PLAIN, Epilogue, moe_gemm, moe_gemm_torch
from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig
from sglang_amd_quant.kernels.triton.quant_mx import quant_mx_torch
from sglang_amd_quant.kernels.triton.routing import route_torch
from sglang_amd_quant.kernels.triton.tiles import STRIDED

from sglang_amd_quant.layouts.registry import scale_layout, value_layout
from sglang_amd_quant.toolchain.triton_aot import call, compile_variant

ARCHS = ("gfx950", "gfx942", "gfx1100")
EXPERTS, TOP_K, TOKENS = 3, 2, 9
TILES = {
    "gfx950": MxGemmConfig(16, 64, 128, nonkdim=16),
    "gfx942": MxGemmConfig(16, 32, 64, nonkdim=16),
    "gfx1100": MxGemmConfig(16, 32, 32, num_stages=1),
    "sm_90": MxGemmConfig(16, 64, 64, num_stages=3),
}


def codes(g: torch.Generator, element: str, *shape: int) -> torch.Tensor:
    """Random data of a format, [..., K]; no NaN codes."""
    if element == "bf16":
        return torch.randn(*shape, generator=g).bfloat16()
    if element == "e2m1":
        return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=g)
    return torch.randn(*shape, generator=g).to(torch.float8_e4m3fn)


def scales(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Random e8m0 scales, [..., K / 32]."""
    return torch.randint(120, 128, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, generator=g)


def problem(scheme: str, n: int, k: int, seed: int) -> dict[str, Any]:
    """Operands and a routing that drops some rows."""
    g = torch.Generator().manual_seed(seed)
    x_format, w_format = SCHEMES[scheme]
    ids = torch.randint(-1, EXPERTS, (TOKENS, TOP_K), generator=g).int()
    return {
        "x": codes(g, x_format, TOKENS, k),
        "x_scales": None if x_format == "bf16" else scales(g, TOKENS, k),
        "w": codes(g, w_format, EXPERTS, n, k),
        "w_scales": scales(g, EXPERTS, n, k),
        "bias": torch.randn(EXPERTS, n, generator=g).bfloat16(),
        "ids": ids,
        "row_weights": torch.rand(TOKENS * TOP_K, generator=g),
    }


def positive(data: torch.Tensor) -> torch.Tensor:
    """The same codes without their signs."""
    if data.dtype == torch.uint8:
        return data & 0x77
    return data.abs() if data.dtype == torch.bfloat16 else (data.view(torch.uint8) & 0x7F).view(data.dtype)


def run(
    arch: str,
    p: dict[str, Any],
    epilogue: Epilogue,
    weighted: bool,
    layout: tuple[str, str] = STRIDED,
    config: MxGemmConfig | None = None,
) -> tuple[Any, Any, dict[str, Any], Launch]:
    """y, y_scales and the twin's arguments; outputs start as NaN, or 0xAA for codes."""
    config = config or TILES[arch]
    routing = route_torch(p["ids"], EXPERTS, config.block_m)
    n = p["bias"].shape[1] // (1 if epilogue.activation == "none" else 2)
    y: torch.Tensor = torch.full((TOKENS * TOP_K, n), torch.nan, dtype=torch.bfloat16)
    y_scales = None
    if epilogue.out:
        y = torch.full((TOKENS * TOP_K, n // (2 if epilogue.out == "e2m1" else 1)), 0xAA, dtype=torch.uint8)
        y_scales = torch.full((TOKENS * TOP_K, n // 32), 0xAA, dtype=torch.uint8)
    more = {"top_k": TOP_K, "bias": p["bias"], "row_weights": p["row_weights"] if weighted else None}
    operands = [p[name] for name in ("x", "x_scales", "w", "w_scales")]
    with emulated_triton(arch) as launches:
        moe_gemm(*operands, y, y_scales, routing, config, arch, epilogue=epilogue, layout=layout, **more)
    assert launches[0].compiled.report.problems == []
    twin = {"operands": operands, "routing": routing, "epilogue": epilogue, **more}
    return y, y_scales, twin, launches[0]


def exact(twin: dict[str, Any], **changes: Any) -> torch.Tensor:
    """The twin's result in fp64."""
    t = twin | changes
    operands = t.pop("operands")
    return moe_gemm_torch(*operands, t.pop("routing"), dtype=torch.float64, **t)[0]


@pytest.mark.parametrize("arch", TRITON_ARCHS)
@pytest.mark.parametrize(
    ("scheme", "tail"),
    [("w4a8", False), *((scheme, True) for scheme in SCHEMES)],
    ids=lambda v: {True: "tail", False: "whole"}.get(v, v),
)
def test_down(arch: str, scheme: str, tail: bool) -> None:
    """Within what fp32 accumulation over K terms may lose, plus one rounding to bf16; dropped rows stay untouched."""
    config = replace(TILES[arch], block_k=max(64, TILES[arch].block_k))  # 32 has no tail, K being whole MX blocks
    k = 2 * config.block_k - (32 if tail else 0)
    p = problem(scheme, config.block_n + 16, k, seed=len(scheme))
    y, _, twin, made = run(arch, p, PLAIN, weighted=True, config=config)
    if arch not in ARCHS:
        return
    claims = ("matrix", "scaled_mfma") if arch == "gfx950" and scheme != "w4a16" else ("matrix",)
    assert compile_variant(replace(made.compiled.variant, claims=claims)).report.problems == []
    here = p["ids"].flatten() >= 0
    assert y[~here].isnan().all()
    value = exact(twin)
    x, xs, w, ws = twin["operands"]
    magnitude = exact(twin, operands=[positive(x), xs, positive(w), ws], bias=p["bias"].abs())
    error = (y.double() - value).abs()
    assert (error[here] <= (k * 2.0**-23 * magnitude + 2.0**-8 * value.abs())[here]).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("scheme", "epilogue"),
    [
        ("w4a16", Epilogue("silu")),
        ("w4a8", Epilogue("swigluoai", interleaved=True, limit=7.0, out="e4m3")),
        ("mxfp8", Epilogue("swigluoai", limit=2.0, alpha=1.5, beta=0.5)),
        ("mxfp4", Epilogue("silu", interleaved=True, out="e2m1", mode="rceil")),
    ],
    ids=["silu", "gpt-oss-mxfp8", "swiglu-halves", "silu-mxfp4"],
)
def test_gate_up(arch: str, scheme: str, epilogue: Epilogue) -> None:
    """Activated columns, as bf16 or as MX blocks.

    An activation's slope is at most 1.2 in the gate times |up| and about |gate| in up; so the relative error of a
    result is that of gate plus that of up, each bounded by the accumulation over K. Quantized: the codes are those of a
    bf16 within that error, so each value is within half a step of the format of it: e4m3 2^-4, e2m1 2^-2 of the value,
    or half of the smallest step of the block.
    """
    block = TILES[arch].block_k
    p = problem(scheme, 2 * 96, block + 32, seed=3)
    y, y_scales, twin, _ = run(arch, p, epilogue, weighted=False)
    here = p["ids"].flatten() >= 0
    bare = Epilogue(epilogue.activation, epilogue.interleaved, epilogue.limit, epilogue.alpha, epilogue.beta)
    value = exact(twin, epilogue=bare)
    if epilogue.out is None:
        assert y[~here].isnan().all()
        torch.testing.assert_close(y[here].double(), value[here], rtol=2.0**-8 + 2.0**-12, atol=1e-3)
        return
    assert y_scales is not None
    assert (y[~here] == 0xAA).all()
    data, expected_scales = quant_mx_torch(value.bfloat16(), epilogue.out, "mx", epilogue.mode)
    same = (y_scales[here] == expected_scales[here]).float().mean()
    assert same > 0.99, same  # a largest element next to where the scale steps may fall on either side
    codes_equal = (y[here] == data.view(torch.uint8)[here]).float().mean()
    assert codes_equal > 0.98, codes_equal  # likewise next to where codes step: 2^-9 of 2^-4 or 2^-2 wide


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
def test_what_is_quantized_is_rounded_to_the_models_dtype(arch: str, element: str, half: bool) -> None:
    """Weights are zero, so sums are the bias: next to the middle of two codes, on which bf16 would round it; and beyond
    fp16, where it is infinite. Bit for bit."""
    p = problem("w4a8", 96, 64, seed=13)
    p["w"].zero_()
    p["bias"] = torch.full((EXPERTS, 96), 1 + 2.0 ** {"e2m1": -2, "e4m3": -4}[element] + 2.0**-10)
    p["bias"][:, 0], p["bias"][:, 40] = {"e2m1": 4.0, "e4m3": 256.0}[element], 70000.0
    y, y_scales, twin, _ = run(arch, p, Epilogue(out=element, half=half), weighted=False)
    operands, here = twin.pop("operands"), p["ids"].flatten() >= 0
    data, scales = moe_gemm_torch(*operands, twin.pop("routing"), **twin)
    assert torch.equal(y[here], data.view(torch.uint8)[here])
    assert torch.equal(y_scales[here], scales[here])
    assert bool(scales[here][0, 1] > 240) == half  # of infinity


@pytest.mark.parametrize(
    ("arch", "scheme", "values"),
    [
        ("gfx950", "w4a8", "preshuffle"),
        ("gfx950", "mxfp8", "mxfp8_lane"),
        ("gfx942", "w4a16", "cdna3_e2m1"),
        ("gfx1100", "mxfp8", "preshuffle"),
    ],
)
@pytest.mark.parametrize(
    "epilogue",
    [PLAIN, Epilogue("silu", interleaved=True, out="e2m1"), Epilogue("swigluoai", limit=2.0)],
    ids=["down", "interleaved", "halves"],
)
def test_weights_may_lie_as_decode_kernels_read_them(arch: str, scheme: str, values: str, epilogue: Epilogue) -> None:
    """The same products in the same order, so the same bits, loaded in no smaller pieces; N and K end within a tile of
    the layout."""
    n, k = 2 * 96 - (8 if epilogue is PLAIN else 0), TILES[arch].block_k + 32
    p = problem(scheme, n, k, seed=5)
    want, want_scales, _, strided = run(arch, p, epilogue, weighted=False)
    order = torch.arange(n)
    if epilogue is not PLAIN:
        order = row_order(n, "interleaved" if epilogue.interleaved else "halves")
    packed = {
        "w": value_layout(values).pack(p["w"].view(torch.uint8)[:, order].view(p["w"].dtype)),
        "w_scales": scale_layout("tile_scale").pack(p["w_scales"][:, order]),
    }
    got, got_scales, _, made = run(arch, p | packed, epilogue, weighted=False, layout=(values, "tile_scale"))
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert want_scales is None or torch.equal(got_scales, want_scales)
    narrow = [sum(launch.compiled.report.loads.get(size, 0) for size in (1, 2)) for launch in (made, strided)]
    assert narrow[0] <= narrow[1], narrow


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fused_moe(arch: str, scheme: str) -> None:
    """All of it, against the twin, which differs where a code of the hidden activations falls the other way."""
    g = torch.Generator().manual_seed(11)
    hidden, inter, w_format = 96, 64, SCHEMES[scheme][1]
    x = torch.randn(6, hidden, generator=g).bfloat16()
    ids = torch.tensor([[0, 2], [2, 1], [-1, 0], [1, 3], [-1, -1], [2, 0]])
    weights = torch.rand(6, 2, generator=g)
    w13, s13 = codes(g, w_format, EXPERTS, 2 * inter, hidden), scales(g, EXPERTS, 2 * inter, hidden)
    w2, s2 = codes(g, w_format, EXPERTS, hidden, inter), scales(g, EXPERTS, hidden, inter)
    more = {"scheme": scheme, "b13": torch.randn(EXPERTS, 2 * inter, generator=g).bfloat16(), "scale": 1.5}
    tiles = (TILES[arch], TILES[arch])
    with emulated_triton(arch) as launches:
        y = fused_moe_triton(
            x, ids, weights, w13, s13, w2, s2, arch=arch, config=tiles, activation="swigluoai", interleaved=True,
            limit=7.0, **more,
        )  # fmt: skip
    assert all(made.compiled.report.problems == [] for made in launches)
    assert len(launches) == (4 if scheme == "w4a16" else 5)
    twin = fused_moe_torch(
        x, ids, weights, w13, s13, w2, s2, epilogue=Epilogue(
            "swigluoai", True, 7.0, out=None if scheme == "w4a16" else SCHEMES[scheme][0]
        ), dtype=torch.float64, **more,
    )  # fmt: skip
    assert not y[4].any()
    error = (y.double() - twin.double()).norm() / twin.double().norm()
    assert error < {"w4a16": 2.0**-8, "w4a8": 2.0**-7, "mxfp8": 2.0**-7, "mxfp4": 2.0**-5}[scheme], error


@pytest.mark.parametrize("arch", TRITON_ARCHS)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_default_configs_compile(arch: str, tokens: int) -> None:
    """Without spills, for the GEMMs of gpt-oss on a rank of TP 8; nothing runs."""
    from sglang_amd_quant.kernels.triton.moe_gemm import moe_gemm_kernel

    first, second = default_configs(tokens, 4, 128, arch)
    assert first.block_m == second.block_m
    made: list[Any] = []

    def compile_only(kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        made.append(compile_variant(call(kernel, arch, *args, **kwargs)[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(moe_gemm_kernel), "run", compile_only)
        routing = route_torch(torch.zeros(1, 4, dtype=torch.int32), 2, first.block_m)
        k, empty = 384, torch.zeros
        for config, epilogue in ((first, Epilogue("swigluoai", True, 7.0, out="e4m3")), (second, PLAIN)):
            y = empty(4, 96, dtype=torch.uint8 if epilogue.out else torch.bfloat16)
            moe_gemm(
                empty(1, k).to(torch.float8_e4m3fn), empty(1, k // 32, dtype=torch.uint8),
                empty(2, 192 if epilogue.out else 96, k // 2, dtype=torch.uint8),
                empty(2, 192 if epilogue.out else 96, k // 32, dtype=torch.uint8), y,
                empty(4, 3, dtype=torch.uint8), routing, config, arch, top_k=4, epilogue=epilogue,
            )  # fmt: skip
    assert [m.report.problems for m in made] == [[], []]


def test_what_is_routed_for_another_block_is_refused() -> None:
    p = problem("w4a16", 64, 64, 1)
    routing = route_torch(p["ids"], EXPERTS, 32)
    y = torch.empty(TOKENS * TOP_K, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="route again"):
        moe_gemm(p["x"], None, p["w"], p["w_scales"], y, None, routing, TILES["gfx950"], "gfx950", top_k=TOP_K)
