"""NVIDIA ModelOpt MXFP8, `quant_method: modelopt` (read against nvidia-modelopt 0.47: `export_hf_checkpoint`).

    <module>.weight         float8_e4m3fn [N, K]
    <module>.weight_scale   uint8 e8m0 [N, K/32]

The config is flat in config.json (`quant_algo`, `ignore`) and nested in hf_quant_config.json (`quantization`:
`quant_algo`, `exclude_modules`); `MIXED_PRECISION` lists every quantized module in `quantized_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang_amd_quant.checkpoints.naming import Role
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader, below, unsupported
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16

_SCHEMES = {"MXFP8": "mxfp8"}
_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class ModelOptReader(Reader):
    """ModelOpt's MXFP8."""

    name: ClassVar[str] = "modelopt"
    suffixes: ClassVar[Mapping[str, Role]] = {f".{role}": role for role in (Role.DATA, Role.SCALE)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        section = config.get("quantization", config)
        excluded = section.get("ignore") or section.get("exclude_modules") or []
        rules = [Rule(pattern, BF16) for module in excluded for pattern in below(module)]
        algo = section.get("quant_algo")
        if algo != _MIXED:
            return cls(Recipe(tuple(rules), _scheme("*", algo), source=CONFIG))
        layers = section.get("quantized_layers") or {}
        rules += [Rule(name, _scheme(name, spec.get("quant_algo"))) for name, spec in layers.items()]
        return cls(Recipe(tuple(rules), BF16, source=CONFIG))


def _scheme(module: str, algo: str | None) -> str:
    if algo not in _SCHEMES:
        raise unsupported(f"quant_algo of {module!r}", f"{algo}, not one of {', '.join(_SCHEMES)}")
    return _SCHEMES[algo]
