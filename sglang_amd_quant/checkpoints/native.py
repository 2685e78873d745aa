"""Our own format: the canonical names as they are, and the recipe in config.json.

    "quantization_config": {"quant_method": "amd_mx", "version": 1, "recipe": {...},
                            "scale_mode": {"e2m1": "even", "e4m3": "rceil"}, "static_input": ["*.experts.*"]}

`static_input` (optional) lists patterns of modules that store an `input_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang_amd_quant.checkpoints.reader import FUSED_EXPERTS, Part, Reader, Role
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, ScaleMode

QUANT_METHOD = "amd_mx"
VERSION = 1
_KEYS = frozenset({"quant_method", "version", "recipe", "scale_mode", "static_input"})
_FUSED_ROLES = {"": Role.DATA, "_scale": Role.SCALE, "_input_scale": Role.INPUT_SCALE}


@dataclass(frozen=True)
class NativeReader(Reader):
    """`quant_method: amd_mx`, as `amd-mx quantize` writes it."""

    static: tuple[Rule, ...] = ()

    name: ClassVar[str] = QUANT_METHOD
    suffixes: ClassVar[Mapping[str, Role]] = {f".{role}": role for role in (Role.DATA, Role.SCALE, Role.INPUT_SCALE)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        what = "config.json quantization_config"
        if config.get("version") != VERSION or set(config) - _KEYS:
            unknown = sorted(set(config) - _KEYS)
            raise CheckpointError(
                f"{what}: version {config.get('version')!r}" + (f", keys {', '.join(unknown)}" if unknown else ""),
                f"this release reads version {VERSION} with keys {', '.join(sorted(_KEYS))}",
                "upgrade sglang-amd-quant, or quantize the source again",
            )
        try:
            given = {element: ScaleMode(mode) for element, mode in config.get("scale_mode", {}).items()}
        except ValueError as error:
            raise CheckpointError(f"{what}: scale_mode", str(error), f"use one of {', '.join(ScaleMode)}") from None
        return cls(
            recipe=Recipe.from_dict(config.get("recipe", {}), source=what),
            scale_mode={**DEFAULT_SCALE_MODE, **given},
            static=tuple(Rule(pattern, "static") for pattern in config.get("static_input", ())),
        )

    def static_input(self, module: str) -> bool:
        return any(rule.matches(module) for rule in self.static)

    def part(self, name: str) -> Part | None:
        match = FUSED_EXPERTS.fullmatch(name)
        if match and match["suffix"] in _FUSED_ROLES:
            return Part(match["module"], _FUSED_ROLES[match["suffix"]])
        return super().part(name)


def quantization_config(
    recipe: Recipe, scale_mode: Mapping[str, ScaleMode] = DEFAULT_SCALE_MODE, static_input: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The `quantization_config` that `NativeReader` reads back."""
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "recipe": recipe.to_dict(),
        "scale_mode": {element: str(mode) for element, mode in scale_mode.items()},
    }
    return config | ({"static_input": list(static_input)} if static_input else {})
