"""Problems for the decode GEMM in the emulator: operands, launches, and what fp64 says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang_amd_quant.kernels.hip import manifest

from sglang_amd_quant.formats import dequantize_mx, group_words, quantize_mx
from sglang_amd_quant.formats.mx import ELEMENTS
from sglang_amd_quant.ops.decode_weights import decode_weights
from sglang_amd_quant.ops.routing import Routing, route_torch
from sglang_amd_quant.runtime.decode_gemm import NOTHING, Epilogue
from sglang_amd_quant.runtime.decode_gemm_amd import (
    FORMATS,
    AmdDecodePlan,
    decode_gemm_amd,
    group_of,
    layout_name,
    plans,
)
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, SCHEMES, ScaleMode
from sglang_amd_quant.tensor import MxTensor
from sglang_amd_quant.toolchain.build import build

CU_COUNT = 4  # a small GPU, so that blocks take several row groups
STATIC_SCALE = 0.03125 * 1.1


@cache
def code_object(arch: str, scheme: str) -> Path:
    """The code object of a scheme, brought up to date first."""
    (built,) = build([arch], code_objects=(manifest.find(f"decode_{scheme}_m4", arch)[0],))
    assert [r.problems for r in built.reports] == [[]] * len(built.reports)
    return built.path


def weights(scheme: str, shape: tuple[int, ...], seed: int) -> MxTensor:
    """Random codes [..., N, K] under scales of 2^-15 to 2^0, none of them NaN.

    int4: scales of fp16 or bf16 with any fraction, and zero points that are random, or 8 for every other seed.
    """
    weight, rng = FORMATS[scheme][0], np.random.default_rng(seed)
    *lead, n, k = shape
    if weight == "int4":
        group = group_of(scheme)
        data = torch.from_numpy(rng.integers(0, 256, (*lead, n, k // 2), dtype=np.uint8))
        floats = rng.uniform(1, 2, (*lead, n, k // group)) * np.exp2(rng.integers(-15, 0, (*lead, n, k // group)))
        scales = torch.from_numpy(floats).to(torch.float16 if seed % 3 == 0 else torch.bfloat16)
        zeros = torch.from_numpy(rng.integers(0, 16, scales.shape, dtype=np.uint8)) if seed % 2 else None
        int4 = replace(SCHEMES["int4_w4a16"], block=group)
        return MxTensor.canonical(data, group_words(scales, zeros), int4)
    codes = rng.integers(0, 256, (*lead, n, k // (2 if weight == "e2m1" else 1)), dtype=np.uint8)
    if weight == "e4m3":
        codes[codes & 0x7F == 0x7F] = 0x3A
    data = torch.from_numpy(codes)
    scales = torch.from_numpy(rng.integers(112, 128, (*lead, n, k // 32), dtype=np.uint8))
    name = {"e2m1": "w4a16", "e4m3": "mxfp8"}[weight]
    return MxTensor.canonical(data.view(torch.float8_e4m3fn) if weight == "e4m3" else data, scales, SCHEMES[name])


def activations(m: int, k: int, seed: int) -> torch.Tensor:
    """[m, k] bf16 over a dozen binades."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((m, k)) * np.exp2(rng.integers(-6, 7, (m, k)))).bfloat16()


def quantized(x: torch.Tensor, scheme: str, mode: ScaleMode | None = None) -> torch.Tensor:
    """The activations that the scheme multiplies, fp64; by `formats`, whose codes the kernels must hit exactly."""
    act = FORMATS[scheme][1]
    if act in ("bf16", "fp16"):
        return x.double()
    if act == "fp8_static":
        inverse = torch.tensor(STATIC_SCALE).float().reciprocal()
        codes = (x.float() * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.double() * torch.tensor(STATIC_SCALE).float().double()
    return dequantize_mx(*quantize_mx(x, act, mode or DEFAULT_SCALE_MODE[act]), act, torch.float64)


@dataclass
class Problem:
    """One launch and its reference.

    Attributes:
        scheme: one of the manifest's.
        x: [M, K] bf16, or made fp16 where the scheme's is; w: [N, K] or [E, N, K], canonical.
        epilogue: tensors on the CPU; row weights, bias and so on.
        out: dtype of y.
        ids: topk ids [M, top_k] of a grouped problem.
        block_m: rows of a routed block.
        mode: scale rounding of activations; None: their format's own.
    """

    scheme: str
    x: torch.Tensor
    w: MxTensor
    epilogue: Epilogue = NOTHING
    out: torch.dtype = torch.float32
    ids: torch.Tensor | None = None
    block_m: int = 0
    mode: ScaleMode | None = None

    def __post_init__(self) -> None:
        if FORMATS[self.scheme][1] == "fp16":
            self.x = self.x.half()

    @property
    def n(self) -> int:
        return self.w.n

    @property
    def rows(self) -> int:
        """Rows of y."""
        return len(self.x) * (1 if self.ids is None else self.ids.shape[1])

    def plans(self, arch: str) -> tuple[AmdDecodePlan, ...]:
        """Plans, best first."""
        blocks = 0 if self.ids is None else self.routing().blocks
        return plans(arch, self.scheme, self.rows, self.n, self.w.k, CU_COUNT, self.block_m, blocks)

    def routing(self) -> Routing:
        """Rows by expert."""
        return route_torch(self.ids, self.w.shape[0], self.block_m)

    def run(self, target: Any, plan: AmdDecodePlan | None = None, **options: Any) -> tuple[torch.Tensor, Any]:
        """Launch in the emulator. Returns y [rows, columns], NaN where nothing was stored, and the counters."""
        arch, act = target.arch.name, FORMATS[self.scheme][1]
        int4 = FORMATS[self.scheme][0] == "int4"
        packed = self.w.to_layout(layout_name(arch, self.scheme)) if int4 else decode_weights(self.w, arch)
        columns = self.n // 2 if self.epilogue.activation else self.n
        y = torch.full((self.rows, columns), float("nan"), dtype=self.out)
        grouped: dict[str, Any] = {}
        if self.ids is not None:
            routing = self.routing()
            grouped = {"row_ids": routing.row_ids, "block_experts": routing.block_experts, "block_m": self.block_m}
            grouped["top_k"] = self.ids.shape[1]
        chosen = plan or self.plans(arch)[0]
        row_blocks = routing.blocks if grouped else -(-self.rows // chosen.rows)
        needed = chosen.workspace_bytes(row_blocks, self.n)
        workspace = None
        if needed:  # counters are zero, sums are whatever they are
            workspace = torch.full((needed // 4,), float("nan"))
            workspace[:4096] = 0
        carry = ELEMENTS[act].carry(self.mode or DEFAULT_SCALE_MODE[act]) if act in ELEMENTS else 0
        d = decode_gemm_amd(
            self.x, packed.data, packed.scales, y, arch=arch, scheme=self.scheme, n=self.n, cu_count=CU_COUNT,
            carry=carry, x_scale=torch.tensor([STATIC_SCALE]) if act == "fp8_static" else None,
            epilogue=self.epilogue, workspace=workspace, plan=chosen, **grouped,
        )  # fmt: skip
        args = tuple(memory(a) if isinstance(a, torch.Tensor) else a for a in d.args)
        names = [p.partition(":") for p in manifest.find(d.kernel, arch)[1].params]
        args = tuple(
            np.int64(a) if t == "i64" else np.float32(a) if t == "f32" else a
            for a, (_, _, t) in zip(args, names, strict=True)
        )
        counters = target.run(code_object(arch, self.scheme), replace(d, args=args), **options)
        if workspace is not None:
            assert not workspace[:4096].any(), "counters are not zero again"
        return y, counters

    def bias_order(self) -> torch.Tensor:
        """Index of the bias of each packed row: in the checkpoint's order, while rows alternate 8 gates and 8 ups."""
        row = torch.arange(self.n)
        if not self.epilogue.activation:
            return row
        gate, is_up = row // 16 * 8 + row % 8, row % 16 // 8
        return 2 * gate + is_up if self.epilogue.interleaved else gate + is_up * (self.n // 2)

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """y in fp64, and the sum of magnitudes [rows, N] that rounding errors are measured by (before an activation).

        Rows that are dropped are NaN.
        """
        x = quantized(self.x, self.scheme, self.mode)
        w = self.w.dequantize(torch.float64)
        if self.ids is None:
            sums, magnitudes = x @ w.mT, x.abs() @ w.abs().mT
            experts = torch.zeros(len(x), dtype=torch.long)
        else:
            x, experts = x.repeat_interleave(self.ids.shape[1], 0), self.ids.flatten().long()
            dropped = (experts < 0) | (experts >= self.w.shape[0])
            experts = experts.clamp(0, self.w.shape[0] - 1)
            sums = torch.einsum("mk,mnk->mn", x, w[experts])
            magnitudes = torch.einsum("mk,mnk->mn", x.abs(), w[experts].abs())
            sums[dropped] = float("nan")
        e = self.epilogue
        if e.bias is not None:
            bias = e.bias.double().reshape(-1, self.n)[experts][:, self.bias_order()]
            sums, magnitudes = sums + bias, magnitudes + bias.abs()
        return sums, magnitudes

    def bound(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """What fp32 accumulation may lose: K products and a few partial sums, each rounded (or truncated) once, and
        where scales are applied to sums, two more roundings for every MX block's sum, or every group's of int4."""
        return (self.w.k + 2 * self.w.k // 32 + 64) * 2.0**-23 * magnitudes


def memory(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor from its first element to the end of its storage, shared."""
    flat = torch.as_strided(
        tensor, (tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset(),), (1,)
    )
    return flat.view(torch.uint8).numpy()
