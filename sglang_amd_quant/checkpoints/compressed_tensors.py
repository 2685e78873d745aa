"""compressed-tensors, `quant_method: compressed-tensors` (read against 0.18 and 0.20: its `mxfp4` and `mxfp8`
compressors, `utils/match.py`).

    mxfp4-pack-quantized   <module>.weight_packed  uint8 [N, K/2], low nibble first
    mxfp8-quantized        <module>.weight         float8_e4m3fn [N, K]
    both                   <module>.weight_scale   uint8 e8m0 [N, K/32]

Each of `config_groups` names its targets: modules by exact name or by `re:` (matched at the start), or the class
`Linear`; exact goes before `re:`, that before the class. `ignore` goes before all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang_amd_quant.checkpoints.naming import Role
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader, prefix_pattern, scheme_named, unsupported
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16, MX_BLOCK

_ELEMENTS = {4: "e2m1", 8: "e4m3"}
_LINEAR = "Linear"


@dataclass(frozen=True)
class CompressedTensorsReader(Reader):
    """llm-compressor's MXFP4 and MXFP8, weights only or with dynamic MX activations."""

    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[Mapping[str, Role]] = {
        ".weight_packed": Role.DATA,
        ".weight_scale": Role.SCALE,
        ".weight": Role.DATA,
    }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        default, exact, regular = BF16, [], []
        for group, spec in (config.get("config_groups") or {}).items():
            scheme = _scheme(f"config_groups.{group}", spec)
            for target in spec.get("targets") or []:
                if target == _LINEAR:
                    default = scheme
                elif target.startswith("re:"):
                    regular.append(Rule(prefix_pattern(target[3:]), scheme))
                else:
                    exact.append(Rule(target, scheme))
        ignored = [
            Rule(prefix_pattern(name[3:]) if name.startswith("re:") else name, BF16)
            for name in config.get("ignore") or []
        ]
        return cls(Recipe((*ignored, *exact, *regular), default, source=CONFIG))


def _scheme(where: str, spec: Mapping[str, Any]) -> str:
    weights, inputs = spec.get("weights"), spec.get("input_activations")
    if not weights:
        return BF16
    weight = _mx_element(weights)
    if weight is None or weights.get("dynamic"):
        raise unsupported(f"{where}.weights", f"no MX weights ({_brief(weights)})")
    if not inputs:
        return scheme_named(weight, BF16, where)
    act = _mx_element(inputs)
    if act is None or inputs.get("dynamic") is not True:
        raise unsupported(f"{where}.input_activations", f"no dynamic MX activations ({_brief(inputs)})")
    return scheme_named(weight, act, where)


def _mx_element(args: Mapping[str, Any]) -> str | None:
    is_mx = (
        args.get("type") == "float"
        and args.get("strategy") == "group"
        and args.get("group_size") == MX_BLOCK
        and args.get("scale_dtype") in ("torch.uint8", "uint8")
        and args.get("symmetric", True)
    )
    return _ELEMENTS.get(int(args.get("num_bits", 0))) if is_mx else None


def _brief(args: Mapping[str, Any]) -> str:
    keys = ("num_bits", "type", "strategy", "group_size", "scale_dtype", "dynamic")
    return ", ".join(f"{key} {args.get(key)}" for key in keys)
