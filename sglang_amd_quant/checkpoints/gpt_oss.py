"""OpenAI gpt-oss, `quant_method: mxfp4` (read against transformers 5.19 `integrations/mxfp4.py` and the released
checkpoints' names).

    ...experts.gate_up_proj_blocks  uint8 [E, 2I, H/32, 16]   16 bytes = one block of 32 e2m1, low nibble first
    ...experts.gate_up_proj_scales  uint8 [E, 2I, H/32]       e8m0
    ...experts.gate_up_proj_bias    bf16  [E, 2I]
    ...experts.down_proj_blocks     uint8 [E, H, I/32, 16], and so on

Rows of gate and up are interleaved (even: gate, odd: up), and stay so: SGLang's gpt-oss runs them interleaved.
Weights only are quantized, so the scheme is `w4a16`; `--quantization amd_w4a8` or `amd_mxfp4` choose other activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from sglang_amd_quant.checkpoints.naming import FUSED_EXPERTS, Part, Role
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader, below
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16

_ROLES = {"_blocks": Role.DATA, "_scales": Role.SCALE}
_BLOCK_BYTES = 16


@dataclass(frozen=True)
class GptOssReader(Reader):
    """gpt-oss as OpenAI released it."""

    name: ClassVar[str] = "gpt-oss mxfp4"
    suffixes: ClassVar[Mapping[str, Role]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        excluded = [Rule(p, BF16) for module in config.get("modules_to_not_convert") or [] for p in below(module)]
        experts = [Rule(p, "w4a16") for p in below("*.experts")]
        return cls(Recipe((*excluded, *experts), BF16, source=CONFIG))

    def part(self, name: str) -> Part | None:
        match = FUSED_EXPERTS.fullmatch(name)
        return Part(match["module"], _ROLES[match["suffix"]]) if match and match["suffix"] in _ROLES else None

    def data(self, name: str, tensor: torch.Tensor, element: str) -> torch.Tensor:
        if tensor.dim() != 4 or tensor.shape[-1] != _BLOCK_BYTES:
            raise CheckpointError(
                f"{name} {list(tensor.shape)}", "gpt-oss blocks are [E, N, K/32, 16]", "fetch the checkpoint again"
            )
        return tensor.flatten(-2)
