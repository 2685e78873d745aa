"""SGLang's own MXFP8, `quant_method: mxfp8` (read against sglang 0.5.23 `layers/quantization/fp8.py`, which also reads
MiniMax-M3-MXFP8).

    <module>.weight             float8_e4m3fn [N, K]
    <module>.weight_scale_inv   uint8 e8m0 [N, K/32]: the factor that dequantizes, in spite of its name

SGLang rewrites the config of ModelOpt's MXFP8 checkpoints to this method before any quantization config sees it, so the
scale may also be called `weight_scale`.

`ignored_layers` or `modules_to_not_convert` name modules by any run of whole dotted parts of their path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang_amd_quant.checkpoints.naming import Role
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader, below, unsupported
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16, MX_BLOCK


@dataclass(frozen=True)
class Mxfp8Reader(Reader):
    """e4m3 weights with 1 x 32 e8m0 scales, activations quantized alike."""

    name: ClassVar[str] = "mxfp8"
    suffixes: ClassVar[Mapping[str, Role]] = {
        ".weight_scale_inv": Role.SCALE,
        ".weight_scale": Role.SCALE,
        ".weight": Role.DATA,
    }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        block = config.get("weight_block_size", [1, MX_BLOCK])
        if block != [1, MX_BLOCK]:
            raise unsupported(f"weight_block_size {block}", f"mxfp8 has one scale per [1, {MX_BLOCK}]")
        if config.get("activation_scheme", "dynamic") != "dynamic":
            raise unsupported(f"activation_scheme {config['activation_scheme']!r}", "mxfp8 quantizes as it runs")
        ignored = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
        names = dict.fromkeys(n for name in ignored for n in (name, name.removeprefix("model.")))
        rules = tuple(Rule(p, BF16) for name in names for start in (name, f"*.{name}") for p in below(start))
        return cls(Recipe(rules, "mxfp8", source=CONFIG))
