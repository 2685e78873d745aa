"""SGLang's fused-MoE layers in a quantized scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.moe.fused_moe_triton import FusedMoeWeightScaleSupported
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.utils import set_weight_attrs

from sglang_amd_quant.errors import ShapeError, UnsupportedError
from sglang_amd_quant.integration import loading
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out_experts
from sglang_amd_quant.ops.moe import QuantizedMoe
from sglang_amd_quant.ops.operand import DTYPES
from sglang_amd_quant.ops.reference import ActQuant, MoeProblem
from sglang_amd_quant.runtime.detect import CPU, cu_count, current_arch
from sglang_amd_quant.schemes import Scheme
from sglang_amd_quant.selection import Epilogue, GemmProblem
from sglang_amd_quant.tensor import MxTensor

if TYPE_CHECKING:
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig

    from sglang_amd_quant.integration.config import AmdMxConfig

SHARDED_DIM = {"w1": -2, "w3": -2, "w13": -2, "w2": -1}
"""Which dimension of [.., N, K] holds the intermediate size, by SGLang's shard id."""


class AmdMxMoEMethod(FusedMoEMethodBase):
    """One fused-MoE layer: `w13` is gate_up [E, 2I, H], `w2` is down [E, H, I]; each with `_scale`, and biases.

    The intermediate size is split over ranks in whole blocks of b = 32, or of int4's group: a rank holds ceil(I/b/tp)
    blocks and the last ranks less, padded with zeros (gpt-oss at TP8: 384 columns, 192 on the last). Tensors are padded
    before SGLang's loaders shard them, so EP, replicated experts and fused shared experts stay SGLang's own business.
    """

    def __init__(self, config: AmdMxConfig, scheme: Scheme, prefix: str) -> None:
        self.config, self.scheme, self.prefix = config, scheme, prefix
        self.scaled_outside = False  # by routed_scaling_factor: `built.py` sets it once the model is built

    @property
    def quant_config(self) -> AmdMxConfig:
        """Some SGLang models read the config from here."""
        return self.config

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        with_bias: bool = False,
        **extra: Any,
    ) -> None:
        """Register empty storage. Raises ShapeError where hidden or intermediate size is not whole blocks."""
        ranks, full = layer.moe_tp_size, intermediate_size_per_partition * layer.moe_tp_size
        self.scheme = self.config.fitted(self.scheme, self.prefix, hidden_size, dealt=full, ranks=ranks)
        block = self.scheme.block
        loading.check_blocks(self.prefix, self.scheme, "hidden size", hidden_size)
        loading.check_blocks(self.prefix, self.scheme, "intermediate size", full)
        per_rank = -(-full // block // ranks) * block
        self._intermediate, self._padded = full, per_rank * ranks
        self._dtype = DTYPES.get(params_dtype, "bf16")
        rows = (2 if layer.moe_runner_config.is_gated else 1) * per_rank
        load = partial(self._load, layer, weight_loader)
        attrs = {"weight_loader": load, "quant_method": FusedMoeWeightScaleSupported.BLOCK.value}
        for name, n, k in (("w13", rows, hidden_size), ("w2", hidden_size, per_rank)):
            data, scales = loading.new_storage(self.scheme, num_experts, n, k)
            tensors = {f"{name}_weight": data, f"{name}_weight_scale": scales}
            if with_bias:
                tensors[f"{name}_weight_bias"] = torch.full((num_experts, n), torch.nan, dtype=torch.float32)
            if self.config.has_static_input(self.prefix, is_moe=True):
                tensors[f"{name}_input_scale"] = torch.full((num_experts,), torch.nan)
            for parameter_name, tensor in tensors.items():
                parameter = torch.nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(parameter_name, parameter)
                set_weight_attrs(parameter, attrs)

    def _load(
        self,
        layer: torch.nn.Module,
        load: Callable[..., None],
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        name: str,
        shard_id: str,
        expert_id: int | None = None,
    ) -> None:
        experts = () if expert_id is None else (expert_id,)
        if expert_id is None and layer.moe_ep_size > 1:
            tensor = self._of_this_rank(layer, tensor)
        if name.endswith("input_scale"):
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local >= 0:  # gate and up share their input: the larger scale serves both
                scale = tensor.reshape(()).to(param.device)
                param.data[local] = torch.fmax(param.data[local], scale)
            return
        if name.endswith("bias"):
            padded = tensor if shard_id == "w2" else self._pad(layer, tensor.unsqueeze(-1), shard_id, 1).squeeze(-1)
            loading.loading(self.prefix, tensor, load, param, padded, name, shard_id, *experts)
            return
        which = "w2" if shard_id == "w2" else "w13"
        weight, scales = getattr(layer, f"{which}_weight"), getattr(layer, f"{which}_weight_scale")
        is_scale = param is scales
        block = self.scheme.block
        self._check(layer, tensor, shard_id, block if is_scale else self._per_byte(tensor))
        if is_scale:
            parts = [(scales, tensor, block)]
        else:
            mode = self.config.scale_mode.get(self.scheme.weight)
            made = loading.quantized(self.prefix, tensor, self.scheme, mode, param.device)
            parts = list(zip((weight, scales), made, (self.scheme.pack, block), strict=False))
        for target, part, per_byte in parts:
            part_name = name if target is param else f"{name}_scale"
            padded = self._pad(layer, part, shard_id, per_byte)
            loading.loading(self.prefix, tensor, load, target, padded, part_name, shard_id, *experts)

    def _of_this_rank(self, layer: torch.nn.Module, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's experts of a tensor [E, ..] of all: SGLang's loader of such tensors shards N and K alone."""
        first, count = layer._expert_storage_rank * layer._num_local_routed, layer._num_local_routed
        where = get_global_expert_location_metadata() if layer.uses_expert_location else None
        if where is not None and len(tensor) == where.num_logical_experts:
            return tensor[where.physical_to_logical_map[layer.layer_id, first : first + count].to(tensor.device)]
        return tensor[first : first + count] if len(tensor) == layer._num_global_routed else tensor

    def _per_byte(self, tensor: torch.Tensor) -> int:
        return self.scheme.pack if tensor.element_size() == 1 else 1

    def _check(self, layer: torch.nn.Module, part: torch.Tensor, shard_id: str, per_byte: int) -> None:
        """A checkpoint tensor [.., N, K / per_byte] must have the model's sizes. Raises ShapeError."""
        wide = self._intermediate * (2 if shard_id == "w13" and layer.moe_runner_config.is_gated else 1)
        want = (layer.hidden_size, wide) if shard_id == "w2" else (wide, layer.hidden_size)
        if part.dim() < 2 or (part.shape[-2], part.shape[-1] * per_byte) != want:
            raise ShapeError(
                f"layer {self.prefix}: {shard_id} {tuple(part.shape)}",
                f"the model has N={want[0]}, K={want[1]}" + (f", {per_byte} elements a byte" if per_byte > 1 else ""),
                loading.misfit(),
            )

    def _pad(self, layer: torch.nn.Module, part: torch.Tensor, shard_id: str, per_byte: int) -> torch.Tensor:
        """Widen the intermediate dimension of [.., N, K] to whole blocks on every rank: zero data, e8m0 scale 1; int4
        words of scale 0.

        A fused gate_up whose halves are not interleaved is also regrouped rank by rank, because SGLang's fused loader
        takes one contiguous piece of N for each rank.
        """
        dim = SHARDED_DIM[shard_id]
        unit = per_byte if dim == -1 else 1
        fused = shard_id == "w13" and layer.moe_runner_config.is_gated
        halved = fused and not activation_of(layer.moe_runner_config).interleaved
        extra = (self._padded - self._intermediate) // unit * (2 if fused and not halved else 1)
        fill = 127 if per_byte == self.scheme.block and part.dtype == torch.uint8 else 0

        def widened(piece: torch.Tensor) -> torch.Tensor:
            shape = list(piece.shape)
            shape[dim] = extra
            pad = torch.full(shape, fill, dtype=torch.uint8, device=piece.device)
            pad = pad.view(piece.dtype) if piece.element_size() == 1 else pad.to(piece.dtype)
            return torch.cat([piece, pad], dim) if extra else piece

        if not halved:
            return widened(part)
        ranks = [widened(half).chunk(layer.moe_tp_size, dim) for half in part.chunk(2, dim)]
        return torch.cat([piece for pair in zip(*ranks, strict=True) for piece in pair], dim)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that all of it came, lay it out as its kernels read it; forget copies of earlier weights."""
        run = layer.moe_runner_config
        activation = activation_of(run)
        weights, acts, gemms = [], [], []
        for name, op in (("w13", "moe_gate_up"), ("w2", "moe_down")):
            data, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale").data
            bias = getattr(layer, f"{name}_weight_bias", None)
            if loading.is_dummy_load():
                loading.fill_dummy(data, scales, bias)
            loading.check_loaded(f"{self.prefix}.{name}", data, scales, bias)
            static = loading.static_scale(f"{self.prefix}.{name}", getattr(layer, f"{name}_input_scale", None))
            acts.append(ActQuant(self.scheme, self.config.scale_mode.get(self.scheme.act), static))
            gemms.append(self._gemm(layer, op, data, activation, static is not None))
            weights.append(MxTensor.canonical(data, scales, self.scheme))
        w13, w2 = lay_out_experts(weights[0], weights[1], gemms[0], gemms[1])
        self._set(layer, w13.tensors, w2.tensors)
        problem = MoeProblem(
            num_experts=layer.num_local_experts,
            activation=activation,
            act13=acts[0],
            act2=acts[1],
            weight_on_input=run.apply_router_weight_on_input,
            combine=not run.no_combine,
            weight_output=not run.no_combine or run.no_combine_keep_router_weight,
            scale=1.0 if self.scaled_outside or run.routed_scaling_factor is None else run.routed_scaling_factor,
        )
        layer.amd_mx = QuantizedMoe(
            gate_up=gemms[0],
            down=gemms[1],
            problem=problem,
            w13=w13,
            w2=w2,
            b13=_narrowed(getattr(layer, "w13_weight_bias", None)),
            b2=_narrowed(getattr(layer, "w2_weight_bias", None)),
            values=(loading.Dequantized(weights[0]), loading.Dequantized(weights[1]))
            if current_arch() == CPU
            else None,
        )
        layer.amd_mx.prepare()

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Weights as a checkpoint has them again, for new ones to be loaded over."""
        self._set(layer, *(loading.restored(weight) for weight in (layer.amd_mx.w13, layer.amd_mx.w2)))

    def _set(self, layer: torch.nn.Module, w13: Sequence[torch.Tensor], w2: Sequence[torch.Tensor]) -> None:
        """Let the layer's parameters hold these: what they held is freed."""
        for name, tensors in (("w13", w13), ("w2", w2)):
            for suffix, tensor in zip(("weight", "weight_scale"), tensors, strict=False):
                getattr(layer, f"{name}_{suffix}").data = tensor

    def _gemm(
        self, layer: torch.nn.Module, op: str, data: torch.Tensor, activation: Activation, static: bool
    ) -> GemmProblem:
        experts, n, packed = data.shape
        gate_up = op == "moe_gate_up"
        return GemmProblem(
            op,
            self.scheme.name,
            current_arch(),
            m=0,
            n=n,
            k=packed * self.scheme.pack,
            cu_count=cu_count(),
            e_local=experts,
            e_total=max(layer.num_experts, experts),
            top_k=layer.top_k,
            tp=layer.moe_tp_size * layer.moe_ep_size,
            ep=layer.moe_ep_size,
            act="fp8_static" if static else "",
            weighted=not gate_up and not layer.moe_runner_config.apply_router_weight_on_input,
            epilogue=Epilogue(
                bias=hasattr(layer, "w13_weight_bias"),
                activation=activation.kind if gate_up else None,
                gated=activation.gated,
                interleaved=activation.interleaved and gate_up,
                limit=activation.limit if gate_up else None,
                alpha=activation.alpha if gate_up and activation.kind == "swigluoai" else None,
                clamp=activation.clamp if gate_up else "before",
                beta=activation.beta if gate_up and activation.kind == "swigluoai" else None,
            ),
            out_dtype=self._dtype,
            group=self.scheme.block,
        )

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        """No SGLang runner: `self.runner` stays None, so SGLang hands over standard top-k with local expert ids.

        Raises:
            UnsupportedError: an activation that is not known, or routing weights on the input with top_k > 1.
        """
        activation_of(moe_runner_config)
        if moe_runner_config.apply_router_weight_on_input and (moe_runner_config.top_k or 1) != 1:
            raise UnsupportedError(
                f"layer {self.prefix}: routing weight on the input with top_k={moe_runner_config.top_k}",
                "one input cannot carry several weights",
                "keep the layer bf16 with a recipe",
            )

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """Run the experts on hidden_states [M, H] and topk_ids [M, top_k]: local ids, -1 for experts of other ranks."""
        topk = dispatch_output.topk_output
        out = layer.amd_mx(dispatch_output.hidden_states, topk.topk_ids, topk.topk_weights)
        return StandardCombineInput(hidden_states=out)


def _narrowed(bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias as bf16, which decode kernels read, where that loses nothing: checkpoints have it so."""
    if bias is None:
        return None
    narrow = bias.detach().bfloat16()
    return narrow if torch.equal(narrow.to(bias.dtype), bias) else bias


def activation_of(run: MoeRunnerConfig) -> Activation:
    """SGLang's several switches as one `Activation` (its fused_moe.py, 0.5.23, reads them in this order).

    Raises:
        UnsupportedError: a function that neither kernels nor the reference know.
    """
    if run.activation != "silu" or not run.is_gated:
        return Activation(run.activation, gated=run.is_gated)
    if run.gemm1_alpha is not None:
        beta = 1.0 if run.gemm1_beta is None else run.gemm1_beta
        return Activation(
            "swigluoai",
            interleaved=run.gate_up_interleaved,
            limit=run.gemm1_clamp_limit,
            alpha=run.gemm1_alpha,
            beta=beta,
        )
    if run.gemm1_clamp_limit is not None:
        return Activation("silu", limit=run.gemm1_clamp_limit, clamp="after_silu")
    return Activation("silu", limit=run.swiglu_limit)
