"""A quantization_config with any value in any place gives a reader that works, or one line."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from sglang_amd_quant.checkpoints import READERS, reader_for
from sglang_amd_quant.errors import AmdMxError

_MX = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
_DYNAMIC = _FP4 | {"is_dynamic": True, "scale_calculation_mode": "even"}

CONFIGS: dict[str, dict[str, Any]] = {
    "amd_mx": {
        "version": 1, "recipe": {"default": "mxfp4", "rules": {"a": "bf16"}, "group": 32}, "checked": True,
        "scale_mode": {"e2m1": "even"}, "static_input": {"a": True},
    },
    "quark": {
        "global_quant_config": {"weight": _FP4, "input_tensors": _DYNAMIC}, "exclude": ["lm_head", "re:a"],
        "layer_quant_config": {"*.x": {"weight": _FP4}}, "layer_type_quant_config": {"Linear": {"weight": _FP4}},
    },
    "mxfp4": {"modules_to_not_convert": ["a"]},
    "compressed-tensors": {
        "config_groups": {
            "mx": {"targets": ["Linear", "re:a"], "weights": _MX, "input_activations": _MX | {"dynamic": True}},
            "int4": {"targets": ["b"], "weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}},
        },
        "ignore": ["lm_head", "re:x"], "transform_config": {"config_groups": {}},
    },
    "modelopt": {
        "quant_algo": "MIXED_PRECISION", "ignore": ["a"], "quantized_layers": {"x": {"quant_algo": "MXFP8"}},
    },
    "mxfp8": {"weight_block_size": [1, 32], "activation_scheme": "dynamic", "ignored_layers": ["a"]},
    "gptq": {
        "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq",
        "dynamic": {"-:a": {}, "+:b": {"bits": 4}}, "modules_in_block_to_quantize": [["a"], "b"],
        "block_name_to_quantize": "model.layers",
    },
    "awq": {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["a"]},
}  # fmt: skip
"""quant_method -> a config of that format that uses all of it."""

MODEL = {"model_type": "gpt_oss", "num_local_experts": 4}

ABSURD: list[Any] = [
    None, True, 0, -1, 3.5, float("nan"), 10**30, "", "x", "re:(", "a\nb", "\ud800",
    [], [None], [[1]], ["x"], {}, {"x": 1}, {"x": None}, {"": {}},
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree, its root's excluded."""
    if path:
        yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value there."""
    copy = at = deepcopy(tree)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


def read(config: dict[str, Any], model: dict[str, Any]) -> None:
    reader = reader_for(config, model)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj", "lm_head"):
        reader.recipe.scheme_for(module)
        reader.static_input(module)


def test_every_format_is_here() -> None:
    assert CONFIGS.keys() == READERS.keys()


@pytest.mark.parametrize("method", CONFIGS)
def test_absurd_values(method: str) -> None:
    config = {"quant_method": method} | CONFIGS[method]
    read(config, MODEL)
    cases = [(changed(config, path, value), MODEL) for path in places(config) for value in ABSURD]
    cases += [(config, changed(MODEL, path, value)) for path in places(MODEL) for value in ABSURD]
    refusals = set()
    for case in cases:
        try:
            read(*case)
        except AmdMxError as error:
            refusals.add(str(error))
    assert refusals
    assert not [line for line in refusals if "\n" in line]
