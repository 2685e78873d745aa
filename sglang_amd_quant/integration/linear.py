"""SGLang's linear layers in a quantized scheme."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from sglang_amd_quant.errors import ShapeError, UnsupportedError
from sglang_amd_quant.integration import loading
from sglang_amd_quant.integration.gated import activated
from sglang_amd_quant.ops.layout import lay_out
from sglang_amd_quant.ops.linear import QuantizedLinear
from sglang_amd_quant.ops.operand import DTYPES
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.runtime.detect import CPU, cu_count, current_arch
from sglang_amd_quant.schemes import Scheme
from sglang_amd_quant.selection import Epilogue, GemmProblem
from sglang_amd_quant.tensor import MxTensor

if TYPE_CHECKING:
    from sglang_amd_quant.integration.config import AmdMxConfig


class AmdMxLinearMethod(LinearMethodBase):
    """One linear layer.

    It holds `weight` (uint8 [N, K/2] or e4m3 [N, K]) and `weight_scale` (e8m0 [N, K/32], or for int4 a word of scale
    and zero point a group, int32 [N, K/group]). A bf16 tensor is quantized when it arrives, so the layer never exists
    in bf16; blocks lie along K, so quantizing before sharding gives the bits of sharding before quantizing.
    """

    def __init__(self, config: AmdMxConfig, scheme: Scheme, prefix: str) -> None:
        self.config, self.scheme, self.prefix = config, scheme, prefix
        self.dual: Any = None  # the `DualGemm` of a gate_up_proj, where `gated.py` has taken it

    @property
    def quant_config(self) -> AmdMxConfig:
        """Some SGLang models read the config from here."""
        return self.config

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **extra: Any,
    ) -> None:
        """Register empty storage. Raises ShapeError where K is not whole blocks on this rank."""
        n, k = sum(output_partition_sizes), input_size_per_partition
        self.scheme = self.config.fitted(self.scheme, self.prefix, k)
        loading.check_blocks(self.prefix, self.scheme, f"N={n},", k, input_size // k)
        data, scales = loading.new_storage(self.scheme, n, k)
        load = partial(self._load, layer, weight_loader)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=load)
        )
        layer.register_parameter(
            "weight_scale",
            GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=load),
        )
        if self.config.has_static_input(self.prefix):
            scale = torch.full((len(output_partition_sizes),), torch.nan)
            layer.register_parameter(
                "input_scale", PerTensorScaleParameter(data=scale, weight_loader=self._load_input_scale)
            )
        self._input_size, self._dtype = input_size, DTYPES.get(params_dtype, "bf16")

    def _load(
        self,
        layer: torch.nn.Module,
        load: Callable[..., None],
        param: torch.Tensor,
        tensor: torch.Tensor,
        *shard: Any,
        **named: Any,
    ) -> None:
        is_scale = param is layer.weight_scale
        per_byte = self.scheme.block if is_scale else self.scheme.pack if tensor.element_size() == 1 else 1
        if tensor.dim() != 2 or tensor.shape[1] * per_byte != self._input_size:
            raise ShapeError(
                f"layer {self.prefix}: {'scales' if is_scale else 'weight'} {tuple(tensor.shape)}",
                f"the model's K is {self._input_size}"
                + (f", {per_byte} elements a {'scale' if is_scale else 'byte'}" if per_byte > 1 else ""),
                loading.misfit(),
            )
        if is_scale:
            loading.loading(self.prefix, tensor, load, param, tensor, *shard, **named)
            return
        mode = self.config.scale_mode.get(self.scheme.weight)
        parts = loading.quantized(self.prefix, tensor, self.scheme, mode, param.device)
        for target, part in zip((layer.weight, layer.weight_scale), parts, strict=False):
            loading.loading(self.prefix, tensor, load, target, part, *shard, **named)

    def _load_input_scale(self, param: torch.Tensor, tensor: torch.Tensor, shard: int | str | None = None) -> None:
        index = {"q": 0, "k": 1, "v": 2}.get(shard, shard) if isinstance(shard, str) else shard
        param.data[slice(None) if index is None else index] = tensor.reshape(()).to(param.device)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that all of it came, lay it out as its kernels read it; forget copies of earlier weights."""
        data, scales = layer.weight.data, layer.weight_scale.data
        if loading.is_dummy_load():
            loading.fill_dummy(data, scales)
        loading.check_loaded(self.prefix, data, scales)
        static = loading.static_scale(self.prefix, getattr(layer, "input_scale", None))
        problem = GemmProblem(
            "linear",
            self.scheme.name,
            current_arch(),
            m=0,
            n=data.shape[0],
            k=data.shape[1] * self.scheme.pack,
            cu_count=cu_count(),
            tp=getattr(layer, "tp_size", 1) or 1,
            act="" if static is None else "fp8_static",
            epilogue=Epilogue(bias=layer.bias is not None),
            out_dtype=self._dtype,
            group=self.scheme.block,
        )
        problem = activated(problem, self.dual)
        stored = MxTensor.canonical(data, scales, self.scheme)
        weight = lay_out(stored, problem)
        values = loading.Dequantized(stored) if current_arch() == CPU else None
        layer.weight.data, layer.weight_scale.data = weight.tensors[:2]
        act = ActQuant(self.scheme, self.config.scale_mode.get(self.scheme.act), static)
        layer.amd_mx = QuantizedLinear(problem, weight, act, values)
        layer.amd_mx.prepare()

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Weights as a checkpoint has them again, for new ones to be loaded over."""
        layer.weight.data, layer.weight_scale.data = loading.restored(layer.amd_mx.weight)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x[..., K] -> [..., N] in x's dtype.

        Raises:
            UnsupportedError: the layer activates its product (`gated.py`), and something else than SGLang's MLPs wants
                it as it is.
        """
        problem = layer.amd_mx.problem
        if problem.epilogue.activation is None:
            return layer.amd_mx(x, bias)  # type: ignore[no-any-return]
        if x.numel():
            raise UnsupportedError(
                f"layer {self.prefix}",
                "its GEMM does the activation, and the model calls it without",
                "report the model",
            )
        return x.new_zeros(*x.shape[:-1], problem.n)
