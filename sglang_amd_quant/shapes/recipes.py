"""Which recipe a model is planned with, when commands are not told one. No torch, unless a checkpoint is quantized."""

from __future__ import annotations

import json

from sglang_amd_quant.recipe import Recipe, default_recipe
from sglang_amd_quant.schemes import BF16, scheme
from sglang_amd_quant.shapes.facts import ModelFacts
from sglang_amd_quant.shapes.layers import Experts

AMD_MX = "amd_mx"


def recipe_for(facts: ModelFacts, name: str, arch: str) -> Recipe:
    """The recipe that `--quantization` NAME stands for.

    Args:
        facts: the model; a quantized checkpoint brings its own recipe.
        name: `amd_mx` (the checkpoint's own, else the default of the arch), a scheme, or `bf16`.
        arch: as in `recipe.DEFAULT_RECIPES`.

    Raises:
        SchemeError: no such scheme.
        CheckpointError: the checkpoint is quantized in a format that no reader knows.
    """
    if name == BF16:
        return Recipe(source=BF16)
    if name != AMD_MX:
        return Recipe.uniform(scheme(name).name)
    if facts.quantization is None:
        return default_recipe(arch)
    from sglang_amd_quant.checkpoints import reader_for  # imports torch

    return reader_for(json.loads(facts.quantization)).recipe


def unmatched(facts: ModelFacts, recipe: Recipe) -> list[str]:
    """Patterns of the recipe that match no layer which is planned: misspelt, or about a vision tower."""
    modules: list[str] = []
    for layer in facts.layers:
        named = (*layer.gate_up, layer.down) if isinstance(layer, Experts) else [part.module for part in layer.parts]
        stems = [""] if layer.blocks is None else [facts.block.format(i) for i in layer.blocks]
        modules += (stem + name for stem in stems for name in named)
    return recipe.unmatched(modules)
