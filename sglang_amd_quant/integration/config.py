"""`AmdMxConfig`: decides, layer by layer, which scheme SGLang's loader gives it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod

from sglang_amd_quant.checkpoints import READERS, Reader, reader_for
from sglang_amd_quant.errors import RecipeError, SchemeError, UnsupportedError
from sglang_amd_quant.integration.plugin import METHODS, check_hooks
from sglang_amd_quant.integration.stream import canonical
from sglang_amd_quant.recipe import RECIPE_ENV, Recipe, Rule, default_recipe, in_tower
from sglang_amd_quant.runtime.detect import current_arch
from sglang_amd_quant.schemes import BF16, DEFAULT_SCALE_MODE, SCHEMES, ScaleMode, Scheme

logger = logging.getLogger(__name__)

FUSED_MODULES: dict[str, list[str]] = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
}
"""SGLang's fused linears and their parts in the checkpoint, for models that do not say so themselves."""

EXPERT_PARTS: dict[str, list[str]] = {
    "gpt_oss": ["gate_up_proj", "down_proj"],
    "mixtral": ["0.w1", "0.w3", "0.w2"],
    "minimax_m2": ["0.w1", "0.w3", "0.w2"],
    "minimax_m3": ["0.w1", "0.w3", "0.w2"],
    "llama4_text": ["gate_up_proj", "down_proj"],
}
"""model_type -> checkpoint names of an expert layer's parts, below `...experts.`, where not as below."""
DEFAULT_EXPERT_PARTS = ["0.gate_proj", "0.up_proj", "0.down_proj"]

ADDED_BY_SGLANG = ("hf_config", "packed_modules_mapping")
"""Keys that SGLang puts into a quantization_config beside the checkpoint's own."""


class AmdMxConfig(QuantizationConfig):
    """What SGLang knows of a model's quantization.

    Args:
        recipe: layer name -> scheme.
        reader: the checkpoint's format; None for bf16 weights, which are quantized while they load.
        hf_config: the model's config, for its model_type.
        check_patterns: whether a pattern that matches no layer is an error (recipes a user wrote) or not (a
            checkpoint's own exclude list).
    """

    NAME = "amd_mx"
    FORCED: str | None = None

    def __init__(
        self,
        recipe: Recipe | None = None,
        reader: Reader | None = None,
        hf_config: Any = None,
        check_patterns: bool = False,
    ) -> None:
        super().__init__()
        check_hooks()
        _check_server_args()
        if recipe is None:  # SGLang calls cls() for a checkpoint without quantization_config
            recipe, check_patterns = self._chosen_recipe(None)
        self.recipe, self.reader, self.check_patterns = recipe, reader, check_patterns
        self.scale_mode: dict[str, ScaleMode] = dict(reader.scale_mode) if reader else dict(DEFAULT_SCALE_MODE)
        self.packed_modules_mapping = dict(FUSED_MODULES)
        self.hf_config = hf_config
        self._seen: set[str] = set()
        self._linear: set[str] = set()
        self._unasked: dict[str, str] = {}
        self._told: set[int] = set()
        self._quantized: dict[str, Scheme] = {}

    # ---- what SGLang asks of the class ----

    def get_name(self) -> str:
        return self.NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bf16; AMD archs report 94 (gfx942), 95 (gfx950), 110 (gfx1100)

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # no quantization_config in config.json: quantize while loading

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AmdMxConfig:
        """Build from a checkpoint's `quantization_config`, ours or a foreign one that we read.

        Raises:
            CheckpointError: no reader knows the format.
            SchemeError: the forced scheme does not fit the checkpoint's weights.
        """
        hf_config = config.get("hf_config")
        own = {key: value for key, value in config.items() if key not in ADDED_BY_SGLANG}
        reader = reader_for(own, getattr(hf_config, "to_dict", dict)())
        recipe, check = cls._chosen_recipe(reader)
        made = cls(recipe, reader, hf_config, check)
        made.packed_modules_mapping.update(config.get("packed_modules_mapping") or {})
        return made

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None) -> str | None:
        """Take over a checkpoint that some other format's method owns, where the user asked for us by name."""
        if user_quant != cls.NAME:
            return None
        if hf_quant_cfg.get("quant_method") not in READERS:
            reader_for(hf_quant_cfg)  # raises, with the formats there are
        return cls.NAME

    @classmethod
    def _chosen_recipe(cls, reader: Reader | None) -> tuple[Recipe, bool]:
        """The recipe and whether a user wrote it: environment, then `--quantization`, then checkpoint, then arch."""
        path = os.environ.get(RECIPE_ENV)
        if path and cls.FORCED:
            raise RecipeError(
                f"--quantization {cls.NAME}", f"forces a scheme while {RECIPE_ENV}={path} is set", "drop one of the two"
            )
        if path:
            return _fitting(Recipe.load(path), reader), True
        if cls.FORCED:
            return _fitting(_forced(cls.FORCED, reader), reader), False
        if reader is not None:
            return reader.recipe, reader.check_patterns
        return default_recipe(current_arch()), False

    # ---- layer by layer ----

    def apply_weight_name_mapper(self, mapper: Any) -> None:
        """Follow a model class that renames checkpoint modules: patterns then match either name."""
        mapped = (Rule(mapper.apply_list([r.pattern])[0], r.scheme) for r in self.recipe.rules)
        extra = tuple(rule for rule in mapped if rule not in self.recipe.rules)
        self.recipe = replace(self.recipe, rules=(*self.recipe.rules, *extra))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer: ours, SGLang's unquantized one where the recipe says bf16, None for other layers."""
        from sglang_amd_quant.integration.linear import AmdMxLinearMethod
        from sglang_amd_quant.integration.moe import AmdMxMoEMethod

        prefix = _in_checkpoint(prefix)
        layer.amd_mx_asked = True  # type: ignore[assignment]
        names = self._checkpoint_names(prefix, isinstance(layer, FusedMoE))
        self._seen.update(names, [prefix])
        if not isinstance(layer, LinearBase | FusedMoE):
            return None
        self._linear.update(names, [prefix])
        scheme = None if self._in_tower([*names, prefix]) else _scheme_of(self.recipe, prefix, names)
        self._check_held(prefix, names, scheme)
        if isinstance(layer, LinearBase):
            if scheme is None:
                return UnquantizedLinearMethod()
            self._quantized[prefix] = scheme
            return AmdMxLinearMethod(self, scheme, prefix)
        if scheme is None:
            return UnquantizedFusedMoEMethod(layer.use_triton_kernels)
        self._quantized[prefix] = scheme
        return AmdMxMoEMethod(self, scheme, prefix)

    def note_unasked(self, model: torch.nn.Module) -> None:
        """Find the linear layers that SGLang built without asking for a method; warn of those the recipe quantizes."""
        warned: dict[str, list[str]] = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, LinearBase) or hasattr(layer, "amd_mx_asked"):
                continue
            prefix, parts = _in_checkpoint(name), self._checkpoint_names(name, False)
            self._unasked.update(dict.fromkeys(parts, prefix))
            if not self._in_tower([*parts, prefix]) and any(_scheme_of(self.recipe, prefix, [p]) for p in parts):
                warned.setdefault(name.rpartition(".")[2], []).append(prefix)
        if warned:
            logger.warning(
                "amd_mx: %s stay bf16, as SGLang builds them without asking for a method; the first is %s",
                ", ".join(f"{len(layers)} {kind}" for kind, layers in sorted(warned.items())),
                min(warned.items())[1][0],
            )

    def fitted(self, scheme: Scheme, prefix: str, *ks: int, **dealt: int) -> Scheme:
        """`Recipe.fitted` for a layer; another int4 group than the usual one is logged, once each."""
        fitted = self.recipe.fitted(scheme, *ks, **dealt)
        if fitted != scheme and fitted.block not in self._told:
            self._told.add(fitted.block)
            text = "amd_mx: int4 in groups of %d where a rank's K is no multiple of %d, first in layer %s"
            logger.info(text, fitted.block, scheme.block, prefix)
        return fitted

    def _in_tower(self, names: list[str]) -> bool:
        """Whether a layer that is bf16 in the checkpoint stays so, as `amd-mx quantize` would leave it."""
        if self.reader is not None and not self.check_patterns:  # what is stored decides
            return False
        named = any(rule.matches(name) for rule in self.recipe.rules for name in names)
        return not named and any(map(in_tower, names))

    def _check_held(self, prefix: str, names: list[str], scheme: Scheme | None) -> None:
        """A layer that the checkpoint holds quantized can have other activations, not other weights (`_fitting`).

        Raises:
            SchemeError: its weights would have to be others.
        """
        if self.reader is None or self.reader.check_patterns or self.recipe is self.reader.recipe:
            return
        held = _scheme_of(self.reader.recipe, prefix, names)
        if held is not None and (scheme is None or scheme.weight != held.weight):
            wanted = BF16 if scheme is None else scheme.name
            raise SchemeError(
                f"layer {prefix}: {wanted} by {self.recipe.source}",
                f"its weights are {held.weight} in the {self.reader.name} checkpoint",
                "choose a scheme with these weights for it, or quantize the bf16 original",
            )

    def _checkpoint_names(self, prefix: str, is_moe: bool) -> list[str]:
        prefix = _in_checkpoint(prefix)
        stem, _, last = prefix.rpartition(".")
        if is_moe:
            parts = EXPERT_PARTS.get(self._model_type(), DEFAULT_EXPERT_PARTS)
            return [f"{prefix}.{part}" for part in parts]
        dot = f"{stem}." if stem else ""
        return [f"{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def can_fuse_shared_expert(self) -> bool:
        """Whether SGLang may run shared experts as routed ones: only where both get the same scheme."""
        experts, shared = (
            _scheme_of(self.recipe, f"model.layers.0.mlp.{layer}", [f"model.layers.0.mlp.{part}"])
            for layer, part in (
                ("experts", "experts.0.gate_proj"),
                ("shared_experts.gate_up_proj", "shared_experts.gate_proj"),
            )
        )
        return experts == shared

    def has_static_input(self, prefix: str, is_moe: bool = False) -> bool:
        """Whether the checkpoint stores a static fp8 scale for this layer's activations."""
        return self.reader is not None and any(map(self.reader.static_input, self._checkpoint_names(prefix, is_moe)))

    def _model_type(self) -> str:
        if self.hf_config is None:
            from sglang.srt.runtime_context import process_model_config

            self.hf_config = process_model_config().hf_config
        return str(getattr(self.hf_config, "model_type", ""))

    @property
    def quantized_layers(self) -> tuple[list[str], int]:
        """Kinds of layers quantized, and how many: SGLang logs it."""
        return sorted({name.rpartition(".")[2] for name in self._quantized}), len(self._quantized)

    # ---- the checkpoint's tensors ----

    def prepare_weights(
        self, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Check the recipe against the model, then pass the checkpoint's tensors on in canonical form.

        Raises:
            RecipeError: a pattern matches no layer of the model.
            CheckpointError: as the format's reader says, a file is broken, or weights are quantized unannounced.
        """
        if self.check_patterns:
            self._check_patterns()
        return canonical(weights, self.reader, self._model_type(), self._unasked)

    def _check_patterns(self) -> None:
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().pp_size > 1:  # a pipeline stage sees some layers only
            return
        seen = {*self._seen, *self._unasked, *self._unasked.values()}
        unmatched = self.recipe.unmatched(seen)
        if unmatched:
            raise RecipeError(
                f"{self.recipe.source}: pattern {', '.join(map(repr, unmatched))}",
                "matches no layer of this model",
                f"layers are named like {', '.join(sorted(self._quantized or self._seen)[:2])}",
            )
        if idle := self.recipe.idle(sorted(seen), self._linear):
            rule, named = idle
            raise RecipeError(
                f"{self.recipe.source}: pattern {rule.pattern!r}",
                f"gives {rule.scheme} to {named}, which always stays {BF16}",
                "drop the rule",
            )


def _in_checkpoint(prefix: str) -> str:
    """A layer's name as checkpoints have it: SGLang 0.5.23 names Mixtral's from `layers` on, its only such model."""
    return f"model.{prefix}" if prefix.startswith("layers.") else prefix


def _scheme_of(recipe: Recipe, prefix: str, names: list[str]) -> Scheme | None:
    """`Recipe.scheme_for` a layer of SGLang's: rules name its parts, or the whole by SGLang's own name (`qkv_proj`,
    `mlp.experts`). For each part the first rule that matches either name decides."""
    first = ((name, next((r for r in recipe.rules if r.matches(name) or r.matches(prefix)), None)) for name in names)
    rules = tuple(Rule(f"re:{re.escape(name)}", rule.scheme) for name, rule in first if rule)
    return replace(recipe, rules=rules).scheme_for(*names)


def _forced(name: str, reader: Reader | None) -> Recipe:
    """A forced scheme leaves alone what the checkpoint itself left in bf16."""
    if reader is None:
        return Recipe.uniform(name)
    own = reader.recipe
    swap = {s: name if s in SCHEMES else s for s in (own.default, *(r.scheme for r in own.rules))}
    rules = tuple(Rule(r.pattern, swap[r.scheme]) for r in own.rules)
    return Recipe(rules, swap[own.default], f"scheme {name}", own.group)


def _fitting(recipe: Recipe, reader: Reader | None) -> Recipe:
    """A quantized checkpoint can be served with other activations, never with another weight format or int4 group."""
    if reader is None:
        return recipe
    held, wanted = reader.recipe.weights, recipe.weights
    if held and wanted - held:
        raise SchemeError(
            f"{recipe.source} on a {reader.name} checkpoint",
            f"wants {', '.join(sorted(wanted - held))} weights where it holds {', '.join(sorted(held))}",
            "choose a scheme with these weights, or quantize the bf16 original",
        )
    return replace(recipe, group=reader.recipe.group) if "int4" in held else recipe


def _check_server_args() -> None:
    """Refuse what cannot work, with the reason.

    Raises:
        UnsupportedError: several tokenizer workers, which SGLang starts without loading plugins.
    """
    from sglang.srt.runtime_context import get_server_args

    try:
        args = get_server_args()
    except ValueError:  # no server in this process: tools and tests
        return
    if getattr(args, "tokenizer_worker_num", 1) > 1:
        raise UnsupportedError(
            f"--tokenizer-worker-num {args.tokenizer_worker_num}",
            "SGLang's tokenizer workers load no plugins and do not know amd_mx",
            "start with --tokenizer-worker-num 1",
        )


def config_of(model: torch.nn.Module) -> AmdMxConfig | None:
    """The config that a model was built with (`built.py`) or whose methods its layers carry, or None."""
    built_with = getattr(model, "amd_mx_config", None)
    if isinstance(built_with, AmdMxConfig):
        return built_with
    for module in model.modules():
        config = getattr(getattr(module, "quant_method", None), "config", None)
        if isinstance(config, AmdMxConfig):
            return config
    return None


def _named(name: str) -> type[AmdMxConfig]:
    scheme = name.removeprefix("amd_")
    return type(
        f"AmdMxConfig_{scheme}", (AmdMxConfig,), {"NAME": name, "FORCED": scheme if scheme in SCHEMES else None}
    )


CONFIGS: dict[str, type[AmdMxConfig]] = {name: AmdMxConfig if name == "amd_mx" else _named(name) for name in METHODS}
