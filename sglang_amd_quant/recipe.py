"""Which layer gets which scheme: name patterns -> scheme or `bf16`. No torch here.

A recipe is JSON, in a file or as `quantization_config.recipe` of a config.json:

    {"default": "mxfp8", "rules": {"*.experts.*": "w4a8", "*.layers.0.*": "bf16", "re:.*[.]o_proj": "mxfp4"}}
    {"default": "int4_w4a16", "group": 64}

Patterns are shell globs over the checkpoint's module names (`model.layers.0.self_attn.q_proj`), or regular expressions
that must match the whole name after `re:`. The first rule that matches wins; then `default`. `group` is how many
elements share a scale in all int4 layers: 32, 64 or 128. If it is not given, it follows from K (`Recipe.fitted`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang_amd_quant.errors import RecipeError
from sglang_amd_quant.json_file import read_json
from sglang_amd_quant.schemes import BF16, INT4_GROUP, INT4_GROUPS, SCHEMES, Scheme

RECIPE_ENV = "SGLANG_AMD_MX_RECIPE"
"""Environment variable that names a server's recipe file."""

ALWAYS_BF16 = (
    "lm_head", "*.lm_head", "embed_tokens", "*.embed_tokens", "*.embed_tokens_per_layer", "wte", "*.wte",
    "*norm", "*norm.*", "*layernorm*",
    "*.gate", "*.router", "*.router.*", "*.shared_expert_gate",
    "*.kv_b_proj",
    "*.in_proj_ba", "*.in_proj_a", "*.in_proj_b",
)  # fmt: skip
"""Never quantized: what a router, an embedding, MLA's absorbed kv_b_proj or the per-head gates of linear attention lose
costs more than it saves."""

TOWERS = (
    "*visual.*", "*vision_tower.*", "*vision_model.*", "*vision_encoder.*", "*image_encoder.*",
    "*audio_tower.*", "*audio_encoder.*", "*speech_encoder.*", "*multi_modal_projector.*", "*embed_vision.*",
)  # fmt: skip
"""Encoders of other modalities: small, run once a request, and often of widths that no block of 32 divides."""

_ALWAYS_BF16, _IN_TOWER = (re.compile("|".join(map(fnmatch.translate, names))) for names in (ALWAYS_BF16, TOWERS))


def always_bf16(module: str) -> bool:
    """Whether one of `ALWAYS_BF16` matches the module's name."""
    return _ALWAYS_BF16.match(module) is not None


def in_tower(module: str) -> bool:
    """Whether one of `TOWERS` matches the module's name."""
    return _IN_TOWER.match(module) is not None


@dataclass(frozen=True)
class Rule:
    """One pattern and what it gives: a scheme's name or `bf16`."""

    pattern: str
    scheme: str

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        body = self.pattern[3:] if self.pattern.startswith("re:") else fnmatch.translate(self.pattern)
        return re.compile(body)

    def matches(self, module: str) -> bool:
        return self._regex.fullmatch(module) is not None


@dataclass(frozen=True)
class Recipe:
    """Rules in order, then a default.

    Attributes:
        rules: the first that matches a module's name decides.
        default: scheme name or `bf16` for modules that no rule names.
        source: where it was read, for messages.
        group: elements of K that share a scale in int4 layers; None: as many as K allows.
    """

    rules: tuple[Rule, ...] = ()
    default: str = BF16
    source: str = "recipe"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.group is not None and (type(self.group) is not int or self.group not in INT4_GROUPS):
            raise RecipeError(
                f"{self.source}: group {self.group}", "no int4 group", f"use one of {', '.join(map(str, INT4_GROUPS))}"
            )
        for rule in (*self.rules, Rule("default", self.default)):
            if rule.scheme != BF16 and rule.scheme not in SCHEMES:
                raise RecipeError(
                    f"{self.source}: {rule.pattern!r} -> {rule.scheme!r}",
                    "unknown scheme",
                    f"use one of {', '.join(SCHEMES)} or {BF16}",
                )
            try:
                rule.matches("")
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(
                    f"{self.source}: pattern {rule.pattern!r}", f"no regular expression ({error})", "mend the pattern"
                ) from None

    @classmethod
    def uniform(cls, scheme: str, group: int | None = None) -> Recipe:
        """Every quantizable layer gets the same scheme."""
        return cls(default=scheme, source=f"scheme {scheme}", group=group)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Build from parsed JSON.

        Raises:
            RecipeError: not of the documented form, or naming an unknown scheme.
        """
        if not isinstance(data, Mapping) or set(data) - {"default", "rules", "group"}:
            raise RecipeError(source, "not a recipe", 'write {"default": SCHEME, "rules": {PATTERN: SCHEME, ...}}')
        rules, default, group = data.get("rules", {}), data.get("default", BF16), data.get("group")
        if not isinstance(rules, Mapping) or not all(isinstance(s, str) for s in (*rules.values(), default)):
            raise RecipeError(f"{source}: rules", "not an object of strings", 'write {"PATTERN": "SCHEME", ...}')
        return cls(tuple(Rule(p, s) for p, s in rules.items()), default, source, group)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a JSON recipe file.

        Raises:
            RecipeError: the file is missing, is no JSON, or no recipe.
        """
        return cls.from_dict(read_json(Path(path), "name a readable JSON file", RecipeError), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        group = {"group": self.group} if self.group and "int4" in self.weights else {}
        return {"default": self.default, "rules": {r.pattern: r.scheme for r in self.rules}} | group

    @property
    def weights(self) -> frozenset[str]:
        """Element formats of all weights that it quantizes."""
        names = (self.default, *(rule.scheme for rule in self.rules))
        return frozenset(SCHEMES[name].weight for name in names if name in SCHEMES)

    def scheme_for(self, *names: str) -> Scheme | None:
        """Scheme of a module, with this recipe's group (else 128) as the block of int4, or None where it stays bf16.

        Args:
            names: the module's checkpoint name; for a fused module the names of all its parts, which must agree.

        Raises:
            RecipeError: the parts of a fused module get different schemes.
        """
        found = {self._name_for(name) for name in names}
        if len(found) != 1:
            raise RecipeError(
                f"{self.source}: {', '.join(names)}",
                f"run as one fused layer but get {', '.join(sorted(found))}",
                "give them one scheme",
            )
        scheme = SCHEMES.get(found.pop())
        return scheme if scheme is None or scheme.weight != "int4" else replace(scheme, block=self.group or INT4_GROUP)

    def fitted(self, scheme: Scheme, *ks: int, dealt: int = INT4_GROUP, ranks: int = 1) -> Scheme:
        """What `scheme_for` gave, for a layer of these K: int4 in this recipe's group, or else as `Scheme.served_block`
        has it, which tells the arguments too."""
        if self.group is not None or scheme.weight != "int4":
            return scheme
        return replace(scheme, block=scheme.served_block(*ks, dealt=dealt, ranks=ranks))

    def _name_for(self, module: str) -> str:
        if always_bf16(module):
            return BF16
        return next((rule.scheme for rule in self.rules if rule.matches(module)), self.default)

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Patterns that match none of the given modules: most likely misspelt."""
        modules = list(modules)
        return [r.pattern for r in self.rules if not any(r.matches(m) for m in modules)]

    def idle(self, modules: Iterable[str], quantizable: Iterable[str]) -> tuple[Rule, str] | None:
        """The first rule that gives a scheme to some of the modules and to none that may have one; and the first such
        module."""
        modules, quantizable = list(modules), [m for m in quantizable if not always_bf16(m)]
        for rule in self.rules:
            named = next(filter(rule.matches, modules), None)
            if rule.scheme != BF16 and named is not None and not any(map(rule.matches, quantizable)):
                return rule, named
        return None


DEFAULT_RECIPES: dict[str, Recipe] = {
    "gfx950": Recipe((Rule("*.experts.*", "w4a8"),), default="mxfp8", source="default of gfx950"),
}
"""arch -> what plain `amd_mx` does to bf16 weights."""


def default_recipe(arch: str) -> Recipe:
    """What plain `amd_mx` does to bf16 weights on an arch; without an entry `w4a16`, which needs no MX hardware."""
    return DEFAULT_RECIPES.get(arch, Recipe.uniform("w4a16"))
