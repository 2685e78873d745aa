"""GPTQ, `quant_method: gptq` (read against gptqmodel's and AutoGPTQ's configs as transformers 5.19 and sglang 0.5.23
take them; the words themselves: `layouts/gptq.py`).

    <module>.qweight   int32 [K/8, N]
    <module>.qzeros    int32 [K/group, N/8]: zero points minus one, or as they are (`checkpoint_format: gptq_v2`)
    <module>.scales    fp16 or bf16 [K/group, N]
    <module>.g_idx     int32 [K], the group of each element of K: only k // group is served, and dropped

All linear layers are quantized but lm_head (which `lm_head: true` adds: it is dequantized as it comes), encoders of
other modalities, and what `dynamic` (`-:REGEX`, matched at the start), `block_name_to_quantize` or
`modules_in_block_to_quantize` leave out. One setting serves all layers: `dynamic` may not give some another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from sglang_amd_quant.checkpoints.int4 import BITS, SCHEME, group_size, transposed, words
from sglang_amd_quant.checkpoints.naming import Role
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader, prefix_pattern, unsupported
from sglang_amd_quant.layouts.gptq import Gptq
from sglang_amd_quant.recipe import TOWERS, Recipe, Rule
from sglang_amd_quant.schemes import BF16

_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_SETTINGS = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class GptqReader(Reader):
    """GPTQ's 4 bits in the order of K, with zero points or symmetric.

    Attributes:
        version: of the checkpoint format, 1 or 2.
    """

    version: int = 1

    name: ClassVar[str] = "gptq"
    suffixes: ClassVar[Mapping[str, Role]] = {
        ".qweight": Role.DATA,
        ".qzeros": Role.ZEROS,
        ".scales": Role.SCALE,
        ".g_idx": Role.ORDER,
    }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        if config["bits"] != BITS:
            raise unsupported(f"bits {config['bits']}", f"not {BITS}")
        if config.get("desc_act"):
            raise unsupported("desc_act true", "weights in activation order, where kernels read groups of neighbours")
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in _VERSIONS:
            raise unsupported(f"checkpoint_format {version!r}", f"not one of {', '.join(_VERSIONS)}")
        group = group_size("group_size", config["group_size"])
        within = [name for names in config.get("modules_in_block_to_quantize") or [] for name in _listed(names)]
        block = config.get("block_name_to_quantize")
        rules = (*(Rule(tower, BF16) for tower in TOWERS), *_dynamic(config))
        default = SCHEME
        if within or block:
            stem = f"{block}.*" if block else "*"
            rules += tuple(Rule(pattern, SCHEME) for pattern in [f"{stem}.{part}" for part in within] or [stem])
            default = BF16
        recipe = Recipe(rules, default, CONFIG, group)
        return cls(recipe, symmetric=bool(config.get("sym", True)), version=_VERSIONS[version])

    def data(self, name: str, tensor: torch.Tensor, element: str) -> torch.Tensor:
        k, n = words(name, tensor, "[K/8, N]").shape
        return Gptq(self.version).unpack(tensor, n, 4 * k)

    def scales(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return transposed(name, tensor)

    def zeros(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return Gptq(self.version).unpack_zeros(words(name, tensor, "[K/group, N/8]"))


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _dynamic(config: Mapping[str, Any]) -> Iterator[Rule]:
    """Rules for `dynamic`: what is left out, and what is named only to be what all else is."""
    for pattern, settings in (config.get("dynamic") or {}).items():
        regex = prefix_pattern(pattern.removeprefix("-:").removeprefix("+:"))
        if pattern.startswith("-:"):
            yield Rule(regex, BF16)
            continue
        other = [f"{key} {settings[key]}" for key in _SETTINGS if settings.get(key, config.get(key)) != config.get(key)]
        if other:
            raise unsupported(f"dynamic {pattern!r}", f"{', '.join(other)}, while one setting has to serve all layers")
        yield Rule(regex, SCHEME)
