"""NVIDIA ModelOpt, `quant_method: modelopt` (read against nvidia-modelopt 0.47: `export_hf_checkpoint`).

    <module>.weight         float8_e4m3fn [N, K] (MXFP8) or uint8 [N, K/2] (W4A8_MXFP4_FP8)
    <module>.weight_scale   uint8 e8m0 [N, K/32]
    <module>.input_scale    float32 scalar, W4A8_MXFP4_FP8 only

The config is flat in config.json (`quant_algo`, `ignore`) and nested in hf_quant_config.json (`quantization`:
`quant_algo`, `exclude_modules`); `MIXED_PRECISION` lists every quantized module in `quantized_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang_amd_quant.checkpoints.naming import Role
from sglang_amd_quant.checkpoints.reader import CONFIG, FP8_STATIC, Reader, below, scheme_named, unsupported
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16

_ALGOS = {"MXFP8": ("e4m3", "e4m3"), "W4A8_MXFP4_FP8": ("e2m1", FP8_STATIC)}
_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class ModelOptReader(Reader):
    """ModelOpt's MXFP8 and MXFP4 x static fp8."""

    name: ClassVar[str] = "modelopt"
    suffixes: ClassVar[Mapping[str, Role]] = {f".{role}": role for role in Role}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        section = config.get("quantization", config)
        algo = section.get("quant_algo")
        excluded = section.get("ignore") or section.get("exclude_modules") or []
        algos = {p: BF16 for module in excluded for p in below(module)}
        if algo == _MIXED:
            algos |= {name: spec.get("quant_algo") for name, spec in section.get("quantized_layers", {}).items()}
            algo = BF16
        algos["*"] = algo
        found = {pattern: _formats(pattern, name) for pattern, name in algos.items()}
        schemes = [Rule(p, scheme_named(*pair, where=p) if pair else BF16) for p, pair in found.items()]
        static = tuple(Rule(p, pair[1] if pair else BF16) for p, pair in found.items())
        return cls(
            Recipe(tuple(schemes[:-1]), schemes[-1].scheme, source=CONFIG),
            static=static if any(rule.scheme == FP8_STATIC for rule in static) else (),
        )


def _formats(pattern: str, algo: Any) -> tuple[str, str] | None:
    if algo == BF16:
        return None
    if algo not in _ALGOS:
        raise unsupported(f"quant_algo of {pattern!r}", f"{algo}, not one of {', '.join(_ALGOS)}")
    return _ALGOS[algo]
