"""A transformers model that computes with our formats.

It is what a served model's token ids are compared with, and what perplexity is taken of. Attention, norms, routing and
embeddings are transformers' own; only linear layers and experts are exchanged, for a few lines of fp32 arithmetic that
share nothing with the serving path but the formats.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.formats import dequantize_int4, dequantize_mx, fake_quantize_mx, quantize_int4, quantize_mx
from sglang_amd_quant.integration.cpu_platform import declare_torchvision_ops
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import Scheme

EXPERT_PARTS = ("0.gate_proj", "0.up_proj", "0.down_proj")
"""What a recipe's patterns see of an experts module, below its own name."""


def load_model(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model in the directory, ready for inference."""
    declare_torchvision_ops()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def round_trip(weight: Tensor, scheme: Scheme) -> Tensor:
    """weight[..., N, K] quantized along K and dequantized to fp32."""
    if scheme.weight == "int4":
        return dequantize_int4(*quantize_int4(weight, scheme.block))
    return dequantize_mx(*quantize_mx(weight, scheme.weight), scheme.weight)


def fake_act(x: Tensor, scheme: Scheme) -> Tensor:
    """What a matmul of the scheme sees of its input x[..., K], in fp32."""
    return (x if scheme.act == "bf16" else fake_quantize_mx(x, scheme.act)).float()


class QuantLinear(nn.Module):
    """`nn.Linear` on fake-quantized weights and activations: fp32 products and sums, rounded once at the end."""

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.scheme, self.bias = scheme, linear.bias
        self.weight = nn.Parameter(round_trip(linear.weight.data, scheme), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(fake_act(x, self.scheme), self.weight, bias).to(x.dtype)


class QuantExperts(nn.Module):
    """transformers' fused experts (`gate_up_proj`, `down_proj`) on fake-quantized weights and activations.

    Args:
        experts: the module to replace; its own `_apply_gate` stays the activation.
        scheme: of both GEMMs.
    """

    def __init__(self, experts: Any, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.activation: Callable[[Tensor], Tensor] = experts._apply_gate
        weights = (experts.gate_up_proj.data, experts.down_proj.data)  # gpt-oss stores them [E, K, N], others [E, N, K]
        self.w13, self.w2 = (round_trip(w.mT if experts.is_transposed else w, scheme) for w in weights)
        biases = (getattr(experts, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj"))
        self.b13, self.b2 = (torch.zeros(w.shape[:2]) if b is None else b.data.float()
                             for w, b in zip((self.w13, self.w2), biases, strict=True))  # fmt: skip

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, H], top_k_index and top_k_weights [M, top_k] -> [M, H]; the sum over top_k is fp32."""
        x, out = fake_act(hidden_states, self.scheme), torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            hidden = self.activation(functional.linear(x[token], self.w13[expert], self.b13[expert]))
            hidden = fake_act(hidden.to(hidden_states.dtype), self.scheme)
            down = functional.linear(hidden, self.w2[expert], self.b2[expert])
            out.index_add_(0, token, down * top_k_weights[token, slot, None].float())
        return out.to(hidden_states.dtype)


def fake_quantize(model: Any, recipe: Recipe) -> dict[str, Scheme]:
    """Exchange, in place, every layer that the recipe quantizes. Returns their names and schemes.

    Raises:
        UnsupportedError: the recipe quantizes nothing of this model.
    """
    done: dict[str, Scheme] = {}
    for name, module in list(model.named_modules()):
        is_experts = hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter)
        if not is_experts and not isinstance(module, nn.Linear):
            continue
        scheme = recipe.scheme_for(*(f"{name}.{part}" for part in EXPERT_PARTS) if is_experts else [name])
        if scheme is None:
            continue
        weights = (module.gate_up_proj, module.down_proj) if is_experts else (module.weight,)
        ks = (w.shape[-2 if is_experts and module.is_transposed else -1] for w in weights)
        scheme = recipe.fitted(scheme, *ks)
        model.set_submodule(name, QuantExperts(module, scheme) if is_experts else QuantLinear(module, scheme))
        done[name] = scheme
    if not done:
        raise UnsupportedError(f"{recipe.source} on {type(model).__name__}", "quantizes no layer", "check the recipe")
    return done
