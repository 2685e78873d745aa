"""Other implementations of a fused MoE, behind one interface. Each is left out with its reason where it cannot run.

triton_kernels (OpenAI) comes with sglang-kernel, `fused_experts` in bf16 with sglang, humming with humming-kernels.
FlashInfer's SM90 mixed-input MoE (`cutlass_fused_moe`) is not among them; docs/moe.md says why.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import json
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from bench.moe_problem import Shape, Weights

Run = Callable[[], torch.Tensor]


@triton.jit(repr=lambda _: "_silu_and_mul")
def silu_and_mul(input):
    """The activation that triton_kernels has none of: silu of even columns times odd ones."""
    gate, up = tl.split(tl.reshape(input, (input.shape[0], input.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


def for_triton_kernels(data: torch.Tensor, scales: torch.Tensor) -> tuple[Any, Any]:
    """MXFP4 weights [..., N, K / 2] and scales [..., N, K / 32] as matmul_ogs takes them on Hopper: w, and a config."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    value, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    w = convert_layout(wrap_torch_tensor(data.transpose(-2, -1), dtype=FP4), value, **value_options)
    s = convert_layout(wrap_torch_tensor(scales.transpose(-2, -1)), scale, **scale_options)
    return w, PrecisionConfig(weight_scale=s, flex_ctx=FlexCtx(rhs_data=InFlexData()))


class TritonKernels:
    """matmul_ogs: MXFP4 weights in Hopper's layout times bf16, activation fused, top_k summed. Routing is outside."""

    name = "triton_kernels x bf16"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from triton_kernels.matmul_ogs import FnSpecs, FusedActivation
        from triton_kernels.swiglu import swiglu_fn

        if shape.element != "e2m1":
            raise RuntimeError("it has no kernel for MXFP8 weights on Hopper that takes bf16")
        self.shape, self.weights = shape, weights
        interleave = _interleaved(weights, shape)
        self.w13, self.p13 = for_triton_kernels(*interleave)
        self.w2, self.p2 = for_triton_kernels(weights.w2, weights.s2)
        self.b13 = None if weights.b13 is None else weights.b13.float()
        self.b2 = None if weights.b2 is None else weights.b2.float()
        oai = shape.activation.kind == "swigluoai"
        if oai:
            specs = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2)
            self.activation = FusedActivation(specs, (shape.activation.alpha, shape.activation.limit))
        else:
            specs = FnSpecs("silu_and_mul", silu_and_mul, (), reduction_n=2)
            self.activation = FusedActivation(specs, ())

    def bind(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> Run:
        """Both GEMMs for a routing."""
        from triton_kernels.matmul_ogs import GatherIndx, RoutingData, ScatterIndx, matmul_ogs
        from triton_kernels.tensor_details.ragged_tensor import make_ragged_tensor_metadata

        e, k = self.shape.experts, self.shape.top_k
        flat = ids.reshape(-1).long()
        by_expert = torch.argsort(flat, stable=True).int()
        place = torch.argsort(by_expert, stable=True).int()
        counts = torch.bincount(flat, minlength=e).int()
        ragged = make_ragged_tensor_metadata(counts, flat.numel())
        routing = RoutingData(topk_weights.reshape(-1)[by_expert.long()].contiguous(), counts, e, k, ragged)
        gather, scatter = GatherIndx(by_expert, place), ScatterIndx(place, by_expert)

        def run() -> torch.Tensor:
            hidden = matmul_ogs(
                x, self.w13, self.b13, routing, gather_indx=gather, precision_config=self.p13,
                fused_activation=self.activation,
            )  # fmt: skip
            return matmul_ogs(
                hidden, self.w2, self.b2, routing, scatter_indx=scatter, precision_config=self.p2,
                gammas=routing.gate_scal,
            )  # fmt: skip

        return run


class SglangBf16:
    """SGLang's own Triton fused MoE on dequantized bf16 weights, its align and sum included."""

    name = "sglang bf16"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
        from sglang.srt.runtime_context import get_parallel, publish
        from sglang.srt.server_args import ServerArgs

        publish(ServerArgs(model_path="dummy"), role="scheduler")
        get_parallel().override_permanently(tp_group=None)
        self.shape, self.experts = shape, fused_moe.fused_experts_impl
        free = torch.cuda.mem_get_info()[0]
        if 6 * shape.experts * shape.hidden * shape.inter > 0.8 * free:
            raise RuntimeError("bf16 weights do not fit beside the others")
        n = torch.empty(shape.experts, 2 * shape.inter, shape.hidden, dtype=torch.bfloat16, device="cuda")
        self.w13, self.b13, self.b2 = n, weights.b13, weights.b2
        self.w2 = torch.empty(shape.experts, shape.hidden, shape.inter, dtype=torch.bfloat16, device="cuda")
        for expert in range(shape.experts):
            self.w13[expert] = weights.dense(0, expert)
            self.w2[expert] = weights.dense(1, expert)

    def bind(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> Run:
        """Everything for a routing."""
        a = self.shape.activation
        options: dict[str, Any] = {}
        if a.kind == "swigluoai":
            options = {"gemm1_alpha": a.alpha, "gemm1_limit": a.limit, "gate_up_interleaved": a.interleaved}
        return lambda: self.experts(
            x, self.w13, self.w2, topk_weights, ids, self.b13, self.b2, filter_expert=False, **options
        )


class Humming:
    """humming's indexed MoE GEMMs; activation, align and sum are ours, outside of what humming brings."""

    input_config: ClassVar[dict[str, str] | None] = None
    name = "humming x bf16"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from humming.layer import HummingLayer
        from humming.tune import get_heuristics_config

        self.shape, self.weights = shape, weights
        fmt = {"quant_method": "mxfp4"} if shape.element == "e2m1" else {
            "dtype": "float8e4m3", "scale_dtype": "float8e8m0", "group_size": 32,
        }  # fmt: skip

        def layer(data: torch.Tensor, scales: torch.Tensor, n: int, k: int) -> tuple[Any, list[Any]]:
            made = HummingLayer(
                shape_n=n, shape_k=k, weight_config=dict(fmt), num_experts=shape.experts, pad_n_to_multiple=256,
                pad_k_to_multiple=128, input_config=None if self.input_config is None else dict(self.input_config),
                torch_dtype=torch.bfloat16,
            ).cuda()  # fmt: skip
            if shape.element == "e4m3":  # its own schema packs codes into words, and means scales by their dtype
                data, scales = data.view(torch.int32), scales.view(torch.float8_e8m0fnu)
            made.load_from_tensors({"weight": data, "weight_scale": scales})
            made.transform()
            return made, get_heuristics_config(layer_config=made.humming_config, gemm_type="indexed")

        self.w13, self.t13 = layer(weights.w13, weights.s13, 2 * shape.inter, shape.hidden)
        self.w2, self.t2 = layer(weights.w2, weights.s2, shape.hidden, shape.inter)

    def bind(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> Run:
        """Both GEMMs, activation and sum for a routing; biases are added by torch where there are some."""
        from sglang_amd_quant.kernels.triton.combine import combine
        from sglang_amd_quant.kernels.triton.quant_mx import Front, quant_mx
        from sglang_amd_quant.kernels.triton.routing import route

        shape, rows = self.shape, ids.numel()
        block = next(c["block_shape"][0] for low, high, c in self.t13 if low < rows <= high)
        routing = route(ids, shape.experts, block) if block & (block - 1) == 0 else _route(ids, shape.experts, block)
        used = (routing.block_experts >= 0).sum().int() * block
        compute = json.dumps({"gemm_type": "indexed"})
        common = {
            "sorted_ids": routing.row_ids, "expert_ids": routing.block_experts, "num_tokens_padded": used,
            "compute_config": compute, "valid_shape_m": rows,
        }  # fmt: skip
        a = shape.activation
        front = Front(a.kind, a.interleaved, a.limit, a.alpha, a.beta)
        weighted = topk_weights.reshape(-1, 1)
        bias = None if self.weights.b13 is None else (self.weights.b13, self.weights.b2, ids.reshape(-1).long())
        t13, t2 = json.dumps(self.t13), json.dumps(self.t2)

        def run() -> torch.Tensor:
            hidden = self.w13(x, top_k=shape.top_k, tuning_config=t13, **common)[:, : 2 * shape.inter]
            hidden = hidden.contiguous() if bias is None else hidden + bias[0][bias[2]]
            down = self.w2(quant_mx(hidden, None, "bf16", front=front)[0], top_k=1, tuning_config=t2, **common)
            down = down[:, : shape.hidden] if bias is None else down[:, : shape.hidden] + bias[1][bias[2]]
            return combine((down * weighted).bfloat16(), ids, shape.experts, torch.empty_like(x))

        return run


class HummingFp8(Humming):
    """The same with activations in fp8 under one scale a token."""

    input_config: ClassVar[dict[str, str] | None] = {"dtype": "float8e4m3"}
    name = "humming x fp8"


PEERS = {"triton_kernels": TritonKernels, "sglang": SglangBf16, "humming_fp8": HummingFp8, "humming": Humming}


def _interleaved(weights: Weights, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 and its scales with gate and up rows alternating."""
    if shape.activation.interleaved:
        return weights.w13, weights.s13
    order = torch.arange(2 * shape.inter, device="cuda").view(2, -1).T.reshape(-1)
    return weights.w13[:, order].contiguous(), weights.s13[:, order].contiguous()


def _route(ids: torch.Tensor, experts: int, block: int) -> Any:
    from sglang_amd_quant.kernels.triton.routing import route_torch

    return route_torch(ids, experts, block)
