"""AutoAWQ, `quant_method: awq`, version `gemm` (read against transformers 5.19 `AwqConfig`, sglang 0.5.23 `awq.py` and
compressed-tensors 0.20 `AutoAWQConverter`; the words themselves: `layouts/awq.py`).

    <module>.qweight   int32 [K, N/8]
    <module>.qzeros    int32 [K/group, N/8]
    <module>.scales    fp16 [K/group, N]

`modules_to_not_convert` names modules by any part of their path; lm_head and encoders of other modalities are bf16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from sglang_amd_quant.checkpoints.int4 import BITS, SCHEME, group_size, transposed, words
from sglang_amd_quant.checkpoints.naming import Role
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader, unsupported
from sglang_amd_quant.layouts.awq import AutoAwq
from sglang_amd_quant.recipe import TOWERS, Recipe, Rule
from sglang_amd_quant.schemes import BF16


@dataclass(frozen=True)
class AwqReader(Reader):
    """AutoAWQ's 4 bits, with zero points or symmetric."""

    name: ClassVar[str] = "awq"
    suffixes: ClassVar[Mapping[str, Role]] = {
        ".qweight": Role.DATA,
        ".qzeros": Role.ZEROS,
        ".scales": Role.SCALE,
    }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        bits = config.get("bits", config.get("w_bit"))
        if bits != BITS:
            raise unsupported(f"bits {bits}", f"not {BITS}")
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise unsupported(f"version {version!r}", "words in another order than gemm's")
        excluded = [f"re:.*{re.escape(name)}.*" for name in config.get("modules_to_not_convert") or []]
        rules = tuple(Rule(pattern, BF16) for pattern in (*TOWERS, *excluded))
        group = group_size("group_size", config.get("group_size", config.get("q_group_size")))
        return cls(Recipe(rules, SCHEME, CONFIG, group), symmetric=not config.get("zero_point", True))

    def data(self, name: str, tensor: torch.Tensor, element: str) -> torch.Tensor:
        k, words_of_n = words(name, tensor, "[K, N/8], K in whole groups", rows=8).shape
        return AutoAwq().unpack(tensor, 8 * words_of_n, k // 2)

    def scales(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return transposed(name, tensor)

    def zeros(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return AutoAwq().unpack_zeros(words(name, tensor, "[K/group, N/8]"))
