"""The Triton MX GEMM: compiled for every arch without a GPU, checked for what it promises, executed against its
twin."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from sglang_amd_quant.kernels.triton.manifest import SCHEMES, Variant, mx_variants
from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig, mx_gemm, mx_gemm_kernel, mx_gemm_torch
from sm90 import GPU

from sglang_amd_quant.toolchain.compilers import BuildError
from sglang_amd_quant.toolchain.triton_aot import Compiled, compile_variant

ALL = list(mx_variants())
AMD = [v for v in ALL if v.arch != "sm_90"]
EXPERTS, TOP_K = 3, 2

compiled = cache(compile_variant)


def ids(variant: Variant) -> str:
    """How pytest calls a variant."""
    return f"{variant.arch}-{variant.name}"


@pytest.mark.parametrize("variant", ALL, ids=ids)
def test_compiles_without_spills_and_keeps_its_claims(variant: Variant) -> None:
    report = compiled(variant).report
    assert report.problems == []
    assert report.mix is not None
    assert report.mix["matrix"] > 0


def codes(generator: torch.Generator, element: str, *shape: int) -> torch.Tensor:
    """Random data of a format, [..., K]; no NaN codes."""
    if element == "bf16":
        return torch.randn(*shape, generator=generator).bfloat16()
    if element == "e2m1":
        return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.where(raw & 0x7F == 0x7F, 0x3A, raw).to(torch.uint8).view(torch.float8_e4m3fn)


def scales(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Random e8m0 scales, [..., K / 32]."""
    return torch.randint(118, 134, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, generator=generator)


def align(experts: torch.Tensor, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """row_ids and block_experts as SGLang's moe_align_block_size gives them, for routed rows with these experts."""
    rows, blocks = [], []
    for expert in experts.unique().tolist():
        mine = torch.nonzero(experts == expert)[:, 0].tolist()
        padded = -(-len(mine) // block_m) * block_m
        rows += mine + [experts.numel()] * (padded - len(mine))
        blocks += [expert] * (padded // block_m)
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(blocks, dtype=torch.int32)


def problem(v: Variant, seed: int) -> dict[str, Any]:
    """Inputs with tails along M and N, and along K where the variant allows one."""
    g = torch.Generator().manual_seed(seed)
    n, k = v.config.block_n + 48, 2 * v.config.block_k - (0 if v.even_k else 32)
    lead = (EXPERTS,) if v.grouped else ()
    tokens = 11 if v.grouped else v.config.block_m + 13
    p: dict[str, Any] = {
        "x": codes(g, v.x_format, tokens, k),
        "x_scales": None if v.x_format == "bf16" else scales(g, tokens, k),
        "w": codes(g, v.w_format, *lead, n, k),
        "w_scales": scales(g, *lead, n, k),
    }
    if v.grouped:
        experts = torch.randint(0, EXPERTS, (tokens * TOP_K,), generator=g)
        experts[torch.randperm(experts.numel(), generator=g)[:5]] = -1  # experts of another rank
        p["row_ids"], p["block_experts"] = align(experts, v.config.block_m)
        p["bias"] = torch.randn(EXPERTS, n, generator=g).bfloat16()
        p["row_weights"] = torch.rand(tokens * TOP_K, generator=g)
        p["top_k"] = TOP_K
    return p


def assert_twin_agrees(y: torch.Tensor, p: dict[str, Any]) -> None:
    """Within what fp32 accumulation over K terms may lose, plus one rounding to bf16."""
    exact = mx_gemm_torch(**p, dtype=torch.float64)
    positive = dict(p)
    for name in ("x", "w"):  # sum of magnitudes: the same problem with every sign dropped
        data = p[name]
        positive[name] = (
            data.abs()
            if data.dtype == torch.bfloat16
            else (data & 0x77 if data.dtype == torch.uint8 else (data.view(torch.uint8) & 0x7F).view(data.dtype))
        )
    if "bias" in p:
        positive["bias"] = p["bias"].abs()
    magnitude = mx_gemm_torch(**positive, dtype=torch.float64)
    k = p["w_scales"].shape[-1] * 32
    bound = k * 2.0**-23 * magnitude + 2.0**-8 * exact.abs()
    error = (y.double() - exact).abs()
    assert y.isfinite().all()
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("variant", AMD, ids=ids)
def test_agrees_with_its_twin_in_the_emulator(variant: Variant) -> None:
    from emulator.code_object import CodeObject
    from emulator.launch import launch

    made, p = compiled(variant), problem(variant, seed=1)
    m, n = p["x"].shape[0] * (TOP_K if variant.grouped else 1), variant.config.block_n + 48
    k = p["w_scales"].shape[-1] * 32
    y = np.full((m, n), 0x7FC0, np.uint16)  # NaN
    tiles_m = p["row_ids"].numel() // variant.config.block_m if variant.grouped else -(-m // variant.config.block_m)
    named = {"y": y, "M": m, "N": n, "K": k, "tiles_m": tiles_m} | {
        name: t.view(torch.uint8 if t.itemsize == 1 else torch.int16 if t.itemsize == 2 else t.dtype).numpy()
        for name, t in p.items()
        if isinstance(t, torch.Tensor)
    }
    args = [named[name] for name in mx_gemm_kernel.arg_names if name in variant.signature]
    code = CodeObject(made.code)
    explicit = sum(not a.kind.startswith("hidden") for a in code.kernel(made.kernel).arguments)
    args += [None] * (explicit - len(args))  # Triton's scratch pointers
    grid = tiles_m * -(-n // variant.config.block_n)
    counters = launch(code, made.kernel, (grid,), (made.threads,), args, lds_bytes=made.lds)
    assert_twin_agrees(torch.from_numpy(y.view(np.int16)).view(torch.bfloat16), p)
    assert counters.matrix > 0
    if variant.grouped:
        skipped = p["row_ids"][: variant.config.block_m][
            p["block_experts"].repeat_interleave(variant.config.block_m)[: variant.config.block_m] < 0
        ]
        rows = skipped[skipped < m].long()
        assert rows.numel() == 5
        assert not y[rows.numpy()].any()


def test_without_enough_warps_scaled_mfma_is_not_there_and_the_build_says_so() -> None:
    """One warp silently gives plain bf16 MFMA: the claim is what notices."""
    variant = next(v for v in ALL if v.arch == "gfx950" and v.x_format == "e4m3" and v.grouped)
    alone = replace(variant, config=replace(variant.config, num_warps=1))
    assert "claims scaled_mfma, but no instruction is v_mfma_scale_f32_" in compiled(alone).report.problems


def test_what_triton_cannot_compile_is_one_line() -> None:
    broken = replace(ALL[0], config=replace(ALL[0].config, block_k=96))
    with pytest.raises(BuildError, match="see kernels/triton/manifest.py"):
        compile_variant(broken)


def test_the_twin_agrees_with_torchao_and_with_a_loop_over_experts() -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    variant = next(v for v in ALL if v.grouped and v.x_format == "e4m3")
    p = problem(variant, seed=3)

    def wide(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        kind = torch.float4_e2m1fn_x2 if data.dtype == torch.uint8 else data.dtype
        return mx.to_dtype(data, scale.view(torch.float8_e8m0fnu), kind, 32, torch.float64)

    x, w = wide(p["x"], p["x_scales"]), torch.stack([wide(d, s) for d, s in zip(p["w"], p["w_scales"], strict=True)])
    expected = torch.zeros(x.shape[0] * TOP_K, w.shape[1], dtype=torch.float64)
    block_m = variant.config.block_m
    for place, row in enumerate(p["row_ids"].tolist()):
        expert = int(p["block_experts"][place // block_m])
        if row < expected.shape[0] and expert >= 0:
            expected[row] = (w[expert] @ x[row // TOP_K] + p["bias"][expert]) * p["row_weights"][row]
    torch.testing.assert_close(mx_gemm_torch(**p, dtype=torch.float64), expected, rtol=1e-12, atol=1e-9)


@GPU
@pytest.mark.parametrize("variant", [v for v in ALL if v.arch == "sm_90"], ids=ids)
def test_agrees_with_its_twin_on_the_gpu(variant: Variant) -> None:
    p = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in problem(variant, seed=2).items()}
    m = p["x"].shape[0] * p.get("top_k", 1)
    y = torch.full((m, p["w"].shape[-2]), torch.nan, dtype=torch.bfloat16, device="cuda")
    mx_gemm(y=y, config=variant.config, arch="sm_90", **p)
    assert_twin_agrees(y, p)


def test_every_scheme_is_compiled_for_every_arch() -> None:
    assert {(v.arch, v.x_format, v.w_format) for v in ALL} == {
        (arch, *formats) for arch in ("gfx950", "gfx942", "gfx1100", "sm_90") for formats in SCHEMES.values()
    }


def test_configs_never_ask_the_impossible() -> None:
    for v in ALL:
        assert isinstance(v.config, MxGemmConfig)
        assert v.config.num_warps >= 2
        if v.arch == "gfx950":
            assert v.config.block_k >= (128 if v.config.nonkdim == 16 else 64)


def test_compiled_facts(tmp_path: Any) -> None:
    made = compiled(next(v for v in ALL if v.arch == "gfx950"))
    assert isinstance(made, Compiled)
    assert made.report.lds == made.lds
    assert made.threads == made.variant.config.num_warps * 64
