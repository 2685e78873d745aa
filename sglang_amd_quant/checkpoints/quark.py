"""AMD Quark, `quant_method: quark` (read against amd-quark 0.13: `QConfig.to_dict`, `export_safetensors`).

Names and layout are canonical already: `<module>.weight` (uint8 packed e2m1, low nibble first, or float8_e4m3fn),
`<module>.weight_scale` (uint8 e8m0), `<module>.input_scale` (bf16 scalar) where activations are static per-tensor fp8.

The config holds one spec per module: the first pattern of `layer_quant_config` that matches, else
`layer_type_quant_config.Linear`, else `global_quant_config`; `exclude` (globs, or `re:` at the start) goes before all.

gpt-oss is exported expert by expert with gate and up still interleaved (`...experts.3.gate_up_proj.weight` [2I, H/2]);
here the experts of a layer are stacked again as soon as the last has come, as SGLang loads them for this model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from sglang_amd_quant.checkpoints.ledger import Named
from sglang_amd_quant.checkpoints.naming import CANONICAL_ROLES, Role, some
from sglang_amd_quant.checkpoints.reader import (
    CONFIG,
    FP8_STATIC,
    Reader,
    prefix_pattern,
    scheme_named,
    unsupported,
)
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16, DEFAULT_SCALE_MODE, MX_BLOCK, ScaleMode

_ELEMENTS = {"fp4": "e2m1", "fp8_e4m3": "e4m3"}
_STACKED = re.compile(r"(.*\.experts)\.(\d+)\.(gate_up_proj|down_proj)\.(weight|weight_scale|input_scale|bias)")
_STACKED_SUFFIX = {"weight": "", "weight_scale": "_scale", "input_scale": "_input_scale", "bias": "_bias"}


@dataclass(frozen=True)
class QuarkReader(Reader):
    """AMD Quark's MXFP4, MXFP8 and MXFP4 x fp8, per-layer mixes of them, dynamic or static activations.

    Attributes:
        stacked_experts: E where experts have to be stacked again, else 0.
    """

    stacked_experts: int = 0

    name: ClassVar[str] = "quark"
    suffixes: ClassVar[Mapping[str, Role]] = {f".{role}": role for role in CANONICAL_ROLES}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        layers = config.get("layer_quant_config") or {}
        linear = (config.get("layer_type_quant_config") or {}).get("Linear")
        rest = "layer_type_quant_config.Linear" if linear else "global_quant_config"
        specs = [(p, f"layer_quant_config[{p!r}]", spec) for p, spec in layers.items()]
        specs.append(("*", rest, linear or config.get("global_quant_config")))
        excluded = [prefix_pattern(p[3:]) if p.startswith("re:") else p for p in config.get("exclude") or []]
        rules, static = [Rule(p, BF16) for p in excluded], [Rule(p, BF16) for p in excluded]
        modes = dict(DEFAULT_SCALE_MODE)
        for pattern, where, spec in specs:
            scheme, act = _scheme(where, spec, modes)
            rules.append(Rule(pattern, scheme))
            static.append(Rule(pattern, act))
        return cls(
            recipe=Recipe(tuple(rules[:-1]), rules[-1].scheme, source=CONFIG),
            scale_mode=modes,
            static=tuple(static) if any(rule.scheme == FP8_STATIC for rule in static) else (),
            stacked_experts=int(model["num_local_experts"]) if model.get("model_type") == "gpt_oss" else 0,
        )

    def walk(self, stream: Iterable[Named], report: Callable[[CheckpointError], None]) -> Iterator[Named]:
        canonical = super().walk(stream, report)
        return _stacked(canonical, self.stacked_experts, report) if self.stacked_experts else canonical


def _scheme(where: str, spec: Mapping[str, Any] | None, modes: dict[str, ScaleMode]) -> tuple[str, str]:
    """Scheme and activation format of one module spec; notes the activations' scale mode."""
    if not spec or not spec.get("weight"):
        return BF16, BF16
    weight = _mx_element(f"{where}.weight", spec["weight"])
    if weight is None or spec["weight"].get("is_dynamic"):
        raise unsupported(f"{where}.weight", f"no MX weights ({_brief(spec['weight'])})")
    inputs = spec.get("input_tensors")
    if not inputs:
        return scheme_named(weight, BF16, where), BF16
    act = _mx_element(f"{where}.input_tensors", inputs)
    if act is not None and inputs.get("is_dynamic"):
        modes[act] = _scale_mode(f"{where}.input_tensors", inputs)
        return scheme_named(weight, act, where), act
    per_tensor_fp8 = inputs.get("dtype") == "fp8_e4m3" and inputs.get("qscheme") == "per_tensor"
    if per_tensor_fp8 and not inputs.get("is_dynamic"):
        return scheme_named(weight, FP8_STATIC, where), FP8_STATIC
    raise unsupported(f"{where}.input_tensors", f"no MX nor static per-tensor fp8 activations ({_brief(inputs)})")


def _mx_element(where: str, spec: Mapping[str, Any] | list[Any]) -> str | None:
    """Element format of a tensor spec, or None where it is no MX one."""
    if isinstance(spec, list):
        raise unsupported(where, f"{len(spec)} stages of quantization")
    is_mx = (
        spec.get("qscheme") == "per_group" and spec.get("group_size") == MX_BLOCK and spec.get("scale_format") == "e8m0"
    )
    return _ELEMENTS.get(str(spec.get("dtype"))) if is_mx else None


def _scale_mode(where: str, spec: Mapping[str, Any]) -> ScaleMode:
    mode = spec.get("scale_calculation_mode") or ScaleMode.EVEN  # Quark's observer takes None for "even"
    try:
        return ScaleMode(mode)
    except ValueError:
        raise unsupported(f"{where}.scale_calculation_mode", f"{mode!r}, not one of {', '.join(ScaleMode)}") from None


def _brief(spec: Mapping[str, Any]) -> str:
    keys = ("dtype", "qscheme", "group_size", "scale_format", "is_dynamic")
    return ", ".join(f"{key} {spec.get(key)}" for key in keys)


def _stacked(stream: Iterable[Named], experts: int, report: Callable[[CheckpointError], None]) -> Iterator[Named]:
    """Per-expert tensors as [E, ...] ones; others pass."""
    waiting: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in stream:
        match = _STACKED.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        layer, expert, proj, leaf = match.groups()
        stacked = f"{layer}.{proj}{_STACKED_SUFFIX[leaf]}"
        parts = waiting.setdefault(stacked, {})
        parts[int(expert)] = tensor
        if len(parts) < experts:
            continue
        del waiting[stacked]
        try:
            yield stacked, torch.stack([parts[e] for e in range(experts)])
        except (KeyError, RuntimeError) as error:
            report(
                CheckpointError(f"{layer}.*.{proj}.{leaf}", f"no {experts} equal experts ({error})", "fetch it again")
            )
    if waiting:
        report(
            CheckpointError(
                some(waiting),
                f"fewer than config.json's {experts} experts",
                "fetch the shards that hold the others again",
            )
        )
