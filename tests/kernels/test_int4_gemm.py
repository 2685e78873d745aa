"""The Triton GEMM of int4 groups: machine code against fp64, in every layout, group and dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from emulated_triton import emulated_triton
from sglang_amd_quant.kernels.triton import group_gemm as group_gemm_module
from sglang_amd_quant.kernels.triton.group_gemm import GroupGemmConfig, group_gemm, group_gemm_torch
from sglang_amd_quant.kernels.triton.hopper_pack import row_order
from sglang_amd_quant.kernels.triton.manifest import Variant, group_variants
from sglang_amd_quant.kernels.triton.quant_mx import NO_FRONT, Front
from sm90 import GPU

from sglang_amd_quant.formats import dequantize_int4, group_words
from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.layouts.registry import scale_layout, value_layout
from sglang_amd_quant.toolchain.triton_aot import compile_variant

AMD = ("gfx950", "gfx942", "gfx1100", "gfx1151")
DECODE = {
    "gfx950": "cdna_int4+tile_group", "gfx942": "cdna_int4+tile_group", "gfx1100": "rdna_int4+tile_group",
    "gfx1151": "rdna_int4+tile_group",
}  # fmt: skip
PLACES = [*((arch, lies) for arch in AMD for lies in ("strided", "decode")), ("sm_90", "strided")]
"""Arch, and where weights lie: in rows, or as decode kernels read them."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXPERTS, TOP_K = 3, 2
VARIANTS = [v for v in group_variants() if v.w_format == "int4"]


@dataclass
class Problem:
    """Inputs with tails along N, and of routing; strided weights, and as a layout keeps them."""

    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    options: dict[str, Any]

    @property
    def words(self) -> torch.Tensor:
        return group_words(self.scales, self.zeros)

    @property
    def group(self) -> int:
        return self.codes.shape[-1] * 2 // self.scales.shape[-1]

    @property
    def rows(self) -> int:
        return self.x.shape[0] * self.options.get("top_k", 1)

    def run(
        self, config: GroupGemmConfig, arch: str, layout: str, out: torch.dtype, pairs: str | None = None,
        activation: Front = NO_FRONT,
    ) -> torch.Tensor:  # fmt: skip
        """`pairs`: the rows of the weights are put into the order of gates and ups first."""
        lies, order = TensorLayout.parse(layout), row_order(self.codes.shape[-2], pairs).to(self.codes.device)
        w, words = (t.index_select(-2, order) for t in (self.codes, self.words))
        columns = self.codes.shape[-2] // (1 if activation is NO_FRONT else 2)
        y = torch.full((self.rows, columns), torch.nan, dtype=out, device=self.x.device)
        return group_gemm(
            self.x, value_layout(lies.value).pack(w), scale_layout(lies.scale).pack(words), y, config, arch,
            group=self.group, layout=(lies.value, lies.scale), pairs=pairs, activation=activation, **self.options,
        )  # fmt: skip

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The product and the sum of the magnitudes of its terms, in fp64, expert by expert."""
        w = dequantize_int4(self.codes, self.scales, self.zeros, torch.float64)
        x, o = self.x.double().repeat_interleave(self.options.get("top_k", 1), 0), self.options
        bias = o.get("bias", torch.zeros(w.shape[:-1])).double()
        if "row_ids" not in o:
            return x @ w.T + bias, x.abs() @ w.abs().T + bias.abs()
        product, magnitude = torch.zeros(2, self.rows, w.shape[-2], dtype=torch.float64)
        block_m = o["row_ids"].numel() // o["block_experts"].numel()
        for place, row in enumerate(o["row_ids"].tolist()):
            expert = int(o["block_experts"][place // block_m])
            if row < self.rows and expert >= 0:
                weight = float(o["row_weights"][row])
                product[row] = (w[expert] @ x[row] + bias[expert]) * weight
                magnitude[row] = (w[expert].abs() @ x[row].abs() + bias[expert].abs()) * weight
        return product, magnitude


def problem(m: int, n: int, k: int, group: int, x: str = "bf16", grouped: int = 0, bias: bool = False) -> Problem:
    """Random inputs; `grouped` is the BLOCK_M of routing, 0 for a dense problem."""
    g = torch.Generator().manual_seed(m * n + k + group)
    lead = (EXPERTS,) if grouped else ()
    codes = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8, generator=g)
    scales = (torch.rand(*lead, n, k // group, generator=g) + 0.5).to(DTYPES[x]) / 64
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=g)
    options: dict[str, Any] = {}
    if bias:
        options["bias"] = torch.randn(*lead, n, generator=g).bfloat16()
    if grouped:
        experts = torch.randint(0, EXPERTS, (m * TOP_K,), generator=g)
        experts[:5] = -1  # another rank's
        row_ids, block_experts = [], []
        for expert in experts.unique().tolist():
            mine = torch.nonzero(experts == expert)[:, 0].tolist()
            blocks = -(-len(mine) // grouped)
            row_ids += mine + [experts.numel()] * (blocks * grouped - len(mine))
            block_experts += [expert] * blocks
        options["row_ids"] = torch.tensor(row_ids, dtype=torch.int32)
        options["block_experts"] = torch.tensor(block_experts, dtype=torch.int32)
        options["row_weights"] = torch.rand(m * TOP_K, generator=g)
        options["top_k"] = TOP_K
    return Problem(torch.randn(m, k, generator=g).to(DTYPES[x]), codes, scales, zeros, options)


def assert_close(y: torch.Tensor, p: Problem) -> None:
    """q - z and fp32 scales are exact; fp32 sums of K products, scaled by group, round K + K / group + 2 times at most;
    y is rounded once, to 8 bits or more."""
    want, magnitude = p.exact()
    bound = (p.x.shape[-1] + p.scales.shape[-1] + 2) * 2.0**-23 * magnitude
    bound += {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[y.dtype] * want.abs()
    error = (y.double() - want).abs()
    assert y.isfinite().all()
    assert (error <= bound).all(), (error - bound).max()


def whole(block_k: int, layout: str) -> int:
    """BLOCK_K, or the least with which a layout's tiles can be read."""
    return max(block_k, 128 if layout.startswith("cdna") else 64)


def executed(
    p: Problem, config: GroupGemmConfig, arch: str, layout: str, out: str = "fp32", pairs: str | None = None
) -> None:
    with emulated_triton(arch) as made:
        y = p.run(config, arch, layout, DTYPES[out], pairs)
    assert made[0].compiled.report.problems == []
    if arch == "sm_90":  # compiled only
        return
    assert made[0].counters is not None
    assert made[0].counters.matrix > 0
    assert_close(y, p)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.arch}-{v.name}")
def test_variants_compile_without_spills_and_keep_their_claims(variant: Variant) -> None:
    assert compile_variant(variant).report.problems == []


@pytest.mark.parametrize(("arch", "lies"), PLACES)
@pytest.mark.parametrize(("group", "block_k", "x"), [(32, 64, "bf16"), (64, 128, "fp16"), (128, 64, "bf16")])
def test_layouts_are_read_where_they_lie(arch: str, lies: str, group: int, block_k: int, x: str) -> None:
    """K of an odd number of groups: where two are a step, the last has one."""
    layout = "strided" if lies == "strided" else DECODE[arch]
    config = GroupGemmConfig(16, 32, whole(block_k, layout), nonkdim=16, num_stages=1)
    executed(problem(20, 40, 3 * group, group, x), config, arch, layout)


@pytest.mark.parametrize(("arch", "layout"), [("gfx1100", "cdna_int4"), ("gfx950", "rdna_int4"), ("sm_90", "mma_int4")])
def test_layouts_of_other_kernels_are_refused(arch: str, layout: str) -> None:
    with pytest.raises(ValueError, match=f"int4 weights in layout {layout} on {arch}: takes strided ones"):
        problem(20, 72, 128, 32).run(GroupGemmConfig(16, 32, 128), arch, f"{layout}+tile_group", torch.float32)


@pytest.mark.parametrize(("arch", "lies"), PLACES)
def test_experts(arch: str, lies: str) -> None:
    """N is no multiple of 16, so experts are padded in tiles; some rows are another rank's, and become zero."""
    layout, x, out = ("strided", "bf16", "fp32") if lies == "strided" else (DECODE[arch], "fp16", "fp16")
    config = GroupGemmConfig(16, 32, whole(64, layout), nonkdim=16, num_stages=2)
    p = problem(11, 40, 160, 32, x, grouped=16, bias=True)
    assert int(p.options["block_experts"].min()) == -1
    executed(p, config, arch, layout, out)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("k", [128, 160])
def test_experts_whose_tokens_are_beyond_buffer_loads(arch: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if x were larger: its addresses are of 64 bits."""
    monkeypatch.setattr(group_gemm_module, "SHORT", 0)
    config = GroupGemmConfig(16, 32, whole(64, DECODE[arch]))
    executed(problem(11, 40, k, 32, grouped=16), config, arch, DECODE[arch])


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_gates_and_ups_that_alternate_in_the_weights_are_where_they_belong(arch: str, pairs: str) -> None:
    """In the result, and in the bias."""
    config = GroupGemmConfig(16, 32, whole(64, DECODE[arch]), nonkdim=16, num_stages=1)
    executed(problem(11, 48, 128, 64, grouped=16, bias=True), config, arch, DECODE[arch], pairs=pairs)


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize("front", [Front("silu"), Front("swigluoai", interleaved=True, limit=2.0, beta=0.5)])
def test_pairs_are_activated(arch: str, front: Front) -> None:
    """As the sums of the kernel without an activation would be: an exponential errs by 2^-22 of its argument, and a
    few operations round."""
    p = problem(11, 48, 128, 64, grouped=16, bias=True)
    del p.options["row_weights"]  # gate_up has none
    config = GroupGemmConfig(16, 32, whole(64, DECODE[arch]), nonkdim=16, num_stages=1)
    pairs = "interleaved" if front.interleaved else "halves"
    with emulated_triton(arch):
        sums = p.run(config, arch, DECODE[arch], torch.float32, pairs).double()
        y = p.run(config, arch, DECODE[arch], torch.float32, pairs, front)
    exact, slope = front(sums), 1.0 if front.kind == "silu" else front.alpha
    gate = sums[:, 0::2] if front.interleaved else sums[:, :24]
    assert ((y - exact).abs() <= exact.abs() * (4 + slope * gate.abs()) * 2.0**-22).all()


def test_an_activation_wants_pairs() -> None:
    p, config = problem(11, 48, 128, 64, grouped=16), GroupGemmConfig(16, 32, 64)
    with pytest.raises(ValueError, match="silu of int4 weights strided on gfx942: no pairs; activate y instead"):
        p.run(config, "gfx942", "strided", torch.float32, activation=Front("silu"))


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize(("m", "n", "x", "out"), [(1, 1, "bf16", "bf16"), (70, 130, "fp16", "fp32")])
def test_any_m_and_n(arch: str, m: int, n: int, x: str, out: str) -> None:
    """One row and column; and several tiles each way, of which the last are in part outside."""
    config = GroupGemmConfig(32, 64, whole(64, DECODE[arch]), num_stages=1, nonkdim=16)
    executed(problem(m, n, 256, 128, x, bias=m == 1), config, arch, DECODE[arch], out)


@pytest.mark.parametrize("arch", AMD)
def test_a_nan_scale_is_nan_in_its_column_and_nowhere_else(arch: str) -> None:
    p = problem(3, 20, 256, 64)
    p.scales[7, 1] = torch.nan
    config = GroupGemmConfig(16, 32, whole(64, DECODE[arch]), nonkdim=16, num_stages=1)
    with emulated_triton(arch):
        y = p.run(config, arch, DECODE[arch], torch.float32)
    assert y.isnan().nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]


def test_groups_are_scaled_in_fp32() -> None:
    """Weights that are no bf16 (15 times a scale of 8 bits), which a kernel that dequantizes first would round."""
    p = problem(16, 32, 128, 32)
    p.codes.fill_(0xFF), p.zeros.zero_(), p.scales.fill_(1 + 2.0**-7), p.x.fill_(1.0)
    with emulated_triton("gfx942"):
        y = p.run(GroupGemmConfig(16, 32, 64, nonkdim=16, num_stages=1), "gfx942", "strided", torch.float32)
    assert torch.equal(y, torch.full_like(y, 128 * 15 * (1 + 2.0**-7)))


@pytest.mark.parametrize("grouped", [0, 16])
def test_the_twin_agrees(grouped: int) -> None:
    p = problem(11, 40, 160, 32, grouped=grouped, bias=True)
    got = group_gemm_torch(p.x, p.codes, p.words, **p.options, dtype=torch.float64)
    torch.testing.assert_close(got, p.exact()[0], rtol=1e-12, atol=1e-9)


@GPU
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.arch == "sm_90"], ids=lambda v: v.name)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_agrees_on_the_gpu(variant: Variant, group: int) -> None:
    p = problem(
        75, 200, 5 * group, group, variant.x_format, variant.config.block_m if variant.grouped else 0, bias=True
    )
    on_gpu = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in p.options.items()}
    there = Problem(p.x.cuda(), p.codes.cuda(), p.scales.cuda(), p.zeros.cuda(), on_gpu)
    assert_close(there.run(variant.config, "sm_90", "strided", torch.float32).cpu(), p)
