"""Our own format: the canonical names as they are, and the recipe in config.json.

    "quantization_config": {"quant_method": "amd_mx", "version": 1, "recipe": {...},
                            "scale_mode": {"e2m1": "even", "e4m3": "rceil"}, "static_input": {PATTERN: bool},
                            "checked": true}

`static_input` (optional): which modules store an `input_scale`; the first pattern that matches decides. `checked`:
written by `amd-mx quantize`, which saw that every pattern of the recipe matches a module; a recipe written by hand into
the config.json of a bf16 checkpoint has not been seen by anyone yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from sglang_amd_quant.checkpoints.naming import CANONICAL_ROLES, FUSED_EXPERTS, Part, Role
from sglang_amd_quant.checkpoints.reader import CONFIG, FP8_STATIC, Reader
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import BF16, DEFAULT_SCALE_MODE, INT4_GROUP, ScaleMode

QUANT_METHOD = "amd_mx"
VERSION = 1
_KEYS = frozenset({"quant_method", "version", "recipe", "scale_mode", "static_input", "checked"})
_FUSED_ROLES = {"": Role.DATA, "_scale": Role.SCALE, "_input_scale": Role.INPUT_SCALE}


@dataclass(frozen=True)
class NativeReader(Reader):
    """`quant_method: amd_mx`, as `amd-mx quantize` writes it."""

    name: ClassVar[str] = QUANT_METHOD
    suffixes: ClassVar[Mapping[str, Role]] = {f".{role}": role for role in CANONICAL_ROLES}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        unknown = sorted(set(config) - _KEYS)
        if config.get("version") != VERSION or unknown:
            raise CheckpointError(
                f"{CONFIG}: version {config.get('version')!r}" + (f", keys {', '.join(unknown)}" if unknown else ""),
                f"this release reads version {VERSION} with keys {', '.join(sorted(_KEYS))}",
                "upgrade sglang-amd-quant, or quantize the source again",
            )
        try:
            given = {element: ScaleMode(mode) for element, mode in config.get("scale_mode", {}).items()}
        except ValueError as error:
            raise CheckpointError(f"{CONFIG} scale_mode", str(error), f"use one of {', '.join(ScaleMode)}") from None
        recipe, checked = Recipe.from_dict(config.get("recipe", {}), source=CONFIG), bool(config.get("checked", False))
        if checked:  # weights are stored, in groups that K has no say in any more
            recipe = replace(recipe, group=recipe.group or INT4_GROUP)
        return cls(
            recipe=recipe,
            scale_mode={**DEFAULT_SCALE_MODE, **given},
            static=tuple(Rule(p, FP8_STATIC if s else BF16) for p, s in config.get("static_input", {}).items()),
            check_patterns=not checked,
        )

    def part(self, name: str) -> Part | None:
        match = FUSED_EXPERTS.fullmatch(name)
        if match and match["suffix"] in _FUSED_ROLES:
            return Part(match["module"], _FUSED_ROLES[match["suffix"]])
        return super().part(name)


def quantization_config(
    recipe: Recipe,
    scale_mode: Mapping[str, ScaleMode] = DEFAULT_SCALE_MODE,
    static: tuple[Rule, ...] = (),
    checked: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` that `NativeReader` reads back."""
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "recipe": recipe.to_dict(),
        "scale_mode": {element: str(mode) for element, mode in scale_mode.items()},
    }
    if checked:
        config["checked"] = True
    return config | ({"static_input": {r.pattern: r.scheme == FP8_STATIC for r in static}} if static else {})
