"""The Triton GEMM of scaled groups on MX weights, in models of fp16: machine code against fp64."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from emulated_triton import emulated_triton
from sglang_amd_quant.kernels.triton.group_gemm import GroupGemmConfig, group_gemm, group_gemm_torch
from sglang_amd_quant.kernels.triton.manifest import Variant, group_variants
from sglang_amd_quant.kernels.triton.routing import route_torch
from sm90 import GPU

from sglang_amd_quant.formats import dequantize_mx
from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.layouts.registry import scale_layout, value_layout
from sglang_amd_quant.runtime.decode_gemm_amd import layout_name
from sglang_amd_quant.toolchain.triton_aot import compile_variant

AMD = ("gfx950", "gfx942", "gfx1100", "gfx1151")
FORMATS = ("e2m1", "e4m3")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXPERTS, TOP_K = 3, 2
VARIANTS = [v for v in group_variants() if v.w_format in FORMATS]
SMALL = GroupGemmConfig(16, 32, 64, nonkdim=16, num_stages=1)


@dataclass
class Problem:
    """x in fp16, weights in MX blocks, and the rest of `group_gemm`'s arguments."""

    x: torch.Tensor
    w: torch.Tensor
    scales: torch.Tensor
    options: dict[str, Any]

    @property
    def rows(self) -> int:
        return self.x.shape[0] * self.options.get("top_k", 1)

    def run(
        self, config: GroupGemmConfig, arch: str, out: torch.dtype = torch.float32, layout: str = "strided"
    ) -> torch.Tensor:
        """On machine code, of which nothing spills; it starts from NaN."""
        y, lies = torch.full((self.rows, self.scales.shape[-2]), torch.nan, dtype=out), TensorLayout.parse(layout)
        w, scales = value_layout(lies.value).pack(self.w), scale_layout(lies.scale).pack(self.scales)
        with emulated_triton(arch) as made:
            group_gemm(
                self.x, w, scales, y, config, arch, group=32, layout=(lies.value, lies.scale), **self.options
            )  # fmt: skip
        assert made[0].compiled.report.problems == []
        assert arch == "sm_90" or made[0].counters.matrix > 0
        return y

    def exact(self, magnitude: bool = False) -> torch.Tensor:
        """The product in fp64, or the sum of the magnitudes of its terms."""
        values = dequantize_mx(self.w, self.scales, "e2m1" if self.w.dtype == torch.uint8 else "e4m3", torch.float64)
        x, o = self.x.double().repeat_interleave(self.options.get("top_k", 1), 0), self.options
        bias = o.get("bias", torch.zeros(values.shape[:-1])).double()
        if magnitude:
            values, x, bias = values.abs(), x.abs(), bias.abs()
        if "row_ids" not in o:
            return x @ values.T + bias
        y = torch.zeros(self.rows, values.shape[-2], dtype=torch.float64)
        block_m = o["row_ids"].numel() // o["block_experts"].numel()
        for place, row in enumerate(o["row_ids"].tolist()):
            expert = int(o["block_experts"][place // block_m])
            if row < self.rows and expert >= 0:
                y[row] = (values[expert] @ x[row] + bias[expert]) * float(o["row_weights"][row])
        return y


def problem(
    w_format: str, m: int, n: int, k: int, grouped: int = 0, bias: bool = False, scales: tuple[int, int] = (110, 126)
) -> Problem:
    """Random inputs without NaN; `grouped` is the BLOCK_M of routing, 0 for a dense problem; `scales` bounds bytes."""
    g = torch.Generator().manual_seed(m * n + k)
    lead = (EXPERTS,) if grouped else ()
    w = torch.randint(0, 256, (*lead, n, k // (2 if w_format == "e2m1" else 1)), dtype=torch.uint8, generator=g)
    if w_format == "e4m3":
        w = torch.where(w & 0x7F == 0x7F, 0x3A, w).to(torch.uint8).view(torch.float8_e4m3fn)
    bytes_ = torch.randint(*scales, (*lead, n, k // 32), dtype=torch.uint8, generator=g)
    options: dict[str, Any] = {}
    if bias:
        options["bias"] = torch.randn(*lead, n, generator=g).half()
    if grouped:
        routing = route_torch(torch.randint(-1, EXPERTS, (m, TOP_K), generator=g), EXPERTS, grouped)
        options |= {"row_ids": routing.row_ids, "block_experts": routing.block_experts, "top_k": TOP_K}
        options["row_weights"] = torch.rand(m * TOP_K, generator=g)
    return Problem(torch.randn(m, k, generator=g).half(), w, bytes_, options)


def assert_close(y: torch.Tensor, p: Problem) -> None:
    """Products of a code and an fp16 are exact in fp32; their sums over K, scaled by block, round K + K / 32 + 2 times
    at most; y is rounded once, to 8 bits or more. Rows of dropped slots are not written."""
    want, magnitude = p.exact(), p.exact(magnitude=True)
    bound = (p.x.shape[-1] + p.scales.shape[-1] + 2) * 2.0**-23 * magnitude
    bound += {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[y.dtype] * want.abs()
    here = torch.ones(p.rows, dtype=torch.bool)
    if "row_ids" in p.options:
        here = torch.zeros(p.rows + 1, dtype=torch.bool).index_fill(0, p.options["row_ids"].long(), True)[:-1]
        assert y[~here].isnan().all()
    error = (y.double() - want).abs()[here]
    assert y[here].isfinite().all()
    assert (error <= bound[here]).all(), (error - bound[here]).max()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.arch}-{v.name}")
def test_variants_compile_without_spills_and_keep_their_claims(variant: Variant) -> None:
    assert compile_variant(variant).report.problems == []


@pytest.mark.parametrize("arch", [*AMD, "sm_90"])
@pytest.mark.parametrize("w_format", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k", "block_k", "out"),
    [(1, 1, 32, 32, "fp16"), (20, 40, 160, 64, "fp32"), (20, 72, 256, 128, "bf16"), (70, 130, 96, 128, "fp16")],
)
def test_dense(arch: str, w_format: str, m: int, n: int, k: int, block_k: int, out: str) -> None:
    """One row and column; several tiles each way; K of whole steps, of less than one, and with a tail."""
    p = problem(w_format, m, n, k, bias=n == 40)
    y = p.run(replace(SMALL, block_k=block_k), arch, DTYPES[out])
    assert arch == "sm_90" or assert_close(y, p) is None


@pytest.mark.parametrize("arch", [*AMD, "sm_90"])
@pytest.mark.parametrize("w_format", FORMATS)
def test_experts(arch: str, w_format: str) -> None:
    p = problem(w_format, 11, 40, 160, grouped=16, bias=True)
    y = p.run(replace(SMALL, num_stages=2), arch)
    assert arch == "sm_90" or assert_close(y, p) is None


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize(("n", "grouped"), [(130, 0), (40, 16)])
def test_where_decode_kernels_read_it(arch: str, n: int, grouped: int) -> None:
    """Of e2m1 on AMD (`amd_gemm.py`), dense and by expert, K with a tail."""
    p = problem("e2m1", 20, n, 160, grouped=grouped, bias=True)
    config = replace(SMALL, block_k=64 if arch.startswith("gfx11") else 128)
    assert_close(p.run(config, arch, layout=layout_name(arch, "w4a16")), p)


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize("w_format", FORMATS)
def test_every_code_and_every_bit_of_x_reach_the_sum(arch: str, w_format: str) -> None:
    """One element of a row is 1, so a sum is one code; or 1 + 2^-10, which is no bf16, in fp16's whole range."""
    codes = torch.arange(256, dtype=torch.uint8)
    if w_format == "e4m3":
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)
    w = codes.reshape(-1, 16 if w_format == "e2m1" else 32)
    p = Problem(torch.eye(32).half(), w, torch.full((len(w), 1), 127, dtype=torch.uint8), {})
    for factor in (1.0, 1 + 2.0**-10, 65504.0, 2.0**-14):
        p.x = torch.eye(32).half() * factor
        assert torch.equal(p.run(SMALL, arch).double(), p.exact()), factor


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize("w_format", FORMATS)
def test_scales_may_be_beyond_fp16(arch: str, w_format: str) -> None:
    """From 2^-127, a subnormal of fp32, to 2^100."""
    for scales in ((0, 2), (1, 60), (190, 228)):
        p = problem(w_format, 5, 40, 96, scales=scales)
        y = p.run(SMALL, arch)
        tiny = 2.0**-149 * 2 * p.scales.shape[-1]  # below 2^-126 sums and scaled sums are rounded to this
        want, bound = p.exact(), (96 + 3 + 2) * 2.0**-23 * p.exact(magnitude=True) + tiny
        assert want.abs().max() > 0
        assert ((y.double() - want).abs() <= bound).all(), scales


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize("w_format", FORMATS)
def test_nan_is_nan_in_its_column_and_nowhere_else(arch: str, w_format: str) -> None:
    """A scale of 255, and e4m3's own."""
    p = problem(w_format, 3, 20, 96)
    p.scales[7, 1] = 255
    want = [7]
    if w_format == "e4m3":
        p.w.view(torch.uint8)[11, 40], p.w.view(torch.uint8)[13, 95] = 0x7F, 0xFF
        want += [11, 13]
    y = p.run(SMALL, arch)
    assert y.isnan().nonzero().tolist() == [[row, column] for row in range(3) for column in want]


@pytest.mark.parametrize("w_format", FORMATS)
@pytest.mark.parametrize("grouped", [0, 16])
def test_the_twin_agrees(w_format: str, grouped: int) -> None:
    p = problem(w_format, 11, 40, 160, grouped=grouped, bias=True)
    got = group_gemm_torch(p.x, p.w, p.scales, **p.options, dtype=torch.float64)
    torch.testing.assert_close(got, p.exact(), rtol=1e-12, atol=1e-9)


def test_what_would_lose_bits_is_refused() -> None:
    """bf16 is another kernel's, as are e4m3 weights that lie as it reads them."""
    p, y = problem("e4m3", 3, 16, 64), torch.empty(3, 16)
    with pytest.raises(ValueError, match="with x of torch.bfloat16 on gfx950: .*use mx_gemm"):
        group_gemm(p.x.bfloat16(), p.w, p.scales, y, SMALL, "gfx950", group=32)
    with pytest.raises(ValueError, match="e4m3 weights in layout preshuffle on gfx950: takes strided ones"):
        group_gemm(p.x, p.w, p.scales, y, SMALL, "gfx950", group=32, layout=("preshuffle", "tile_scale"))


@GPU
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.arch == "sm_90"], ids=lambda v: v.name)
def test_agrees_on_the_gpu(variant: Variant) -> None:
    p = problem(variant.w_format, 75, 200, 160, variant.config.block_m if variant.grouped else 0, bias=True)
    given = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in p.options.items()}
    y = torch.full((p.rows, 200), torch.nan, device="cuda")
    group_gemm(p.x.cuda(), p.w.cuda(), p.scales.cuda(), y, variant.config, "sm_90", group=32, **given)
    assert_close(y.cpu(), p)
