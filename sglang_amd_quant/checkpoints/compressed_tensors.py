"""compressed-tensors, `quant_method: compressed-tensors` (read against 0.18 and 0.20: its `mxfp4`, `mxfp8` and
`pack_quantized` compressors, `utils/match.py`).

    mxfp4-pack-quantized   <module>.weight_packed  uint8 [N, K/2], low nibble first
    mxfp8-quantized        <module>.weight         float8_e4m3fn [N, K]
    both                   <module>.weight_scale   uint8 e8m0 [N, K/32]

    pack-quantized         <module>.weight_packed       int32 [N, K/8], in sequence along K: an integer plus 8 each
    (4 bits)               <module>.weight_scale        floats [N, K/group]
                           <module>.weight_zero_point   int32 [N/8, K/group], likewise along N; only if not symmetric
                           <module>.weight_shape        int64 [2], N and K
                           <module>.weight_g_idx        int32 [K], only if in activation order: refused

All int4 layers have one group size and are symmetric or not alike.

Each of `config_groups` names its targets: modules by exact name or by `re:` (matched at the start), or the class
`Linear`; exact goes before `re:`, that before the class. `ignore` goes before all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from sglang_amd_quant.checkpoints.int4 import BITS, group_size, words
from sglang_amd_quant.checkpoints.naming import Role
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader, prefix_pattern, scheme_named, unsupported
from sglang_amd_quant.layouts.gptq import Gptq
from sglang_amd_quant.layouts.nibbles import as_octets
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16, INT4_GROUP, MX_BLOCK

_ELEMENTS = {4: "e2m1", 8: "e4m3"}
_LINEAR = "Linear"


@dataclass(frozen=True)
class CompressedTensorsReader(Reader):
    """llm-compressor's MXFP4 and MXFP8, weights only or with dynamic MX activations, and its int4 weights."""

    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[Mapping[str, Role]] = {
        ".weight_packed": Role.DATA,
        ".weight_scale": Role.SCALE,
        ".weight_zero_point": Role.ZEROS,
        ".weight_shape": Role.SHAPE,
        ".weight_g_idx": Role.ORDER,
        ".weight": Role.DATA,
    }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        if (config.get("transform_config") or {}).get("config_groups"):
            raise unsupported("transform_config", "activations have to be rotated too, which no kernel here does")
        default, exact, regular = BF16, [], []
        int4 = {}  # (group, symmetric) -> where it is said
        for group, spec in (config.get("config_groups") or {}).items():
            where = f"config_groups.{group}"
            scheme = _scheme(where, spec)
            if _is_int4(spec.get("weights") or {}):
                int4[_int4_settings(where, spec["weights"])] = where
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
        if len(int4) > 1:
            raise unsupported(" and ".join(int4.values()), "int4 layers of several group sizes or symmetries")
        (size, symmetric), *_ = int4 or {(INT4_GROUP, True): ""}
        return cls(Recipe((*ignored, *exact, *regular), default, CONFIG, size), symmetric=symmetric)

    def data(self, name: str, tensor: torch.Tensor, element: str) -> torch.Tensor:
        return as_octets(words(name, tensor, "[N, K/8]")) if element == "int4" else tensor

    def zeros(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        packed = words(name, tensor, "[N/8, K/group]")
        return Gptq(version=2).unpack_zeros(packed.mT)  # GPTQ's words run along N too, but of [K/group, N/8]


def _scheme(where: str, spec: Mapping[str, Any]) -> str:
    weights, inputs = spec.get("weights"), spec.get("input_activations")
    if not weights:
        return BF16
    weight = "int4" if _is_int4(weights) else _mx_element(weights)
    if weight is None or weights.get("dynamic"):
        raise unsupported(f"{where}.weights", f"neither MX nor int4 weights ({_brief(weights)})")
    if not inputs:
        return scheme_named(weight, BF16, where)
    act = _mx_element(inputs)
    if act is None or inputs.get("dynamic") is not True:
        raise unsupported(f"{where}.input_activations", f"no dynamic MX activations ({_brief(inputs)})")
    return scheme_named(weight, act, where)


def _is_int4(args: Mapping[str, Any]) -> bool:
    return args.get("type", "int") == "int" and args.get("num_bits") == BITS


def _int4_settings(where: str, args: Mapping[str, Any]) -> tuple[int, bool]:
    """Group size and symmetry. Raises CheckpointError where kernels have no such int4."""
    order = args.get("actorder")
    if order not in (None, False, "weight", "static"):  # both of these keep the order of K
        raise unsupported(f"{where}.weights actorder {order!r}", "in activation order, where kernels read neighbours")
    size = args.get("group_size") if args.get("strategy", "group") == "group" else -1
    return group_size(f"{where}.weights group_size", size), bool(args.get("symmetric", True))


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
