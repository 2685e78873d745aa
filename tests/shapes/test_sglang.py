"""The planner against SGLang itself: its models, built as ranks of TP x EP, must have the very shapes we plan."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_amd_quant import shapes
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.shapes.facts import ModelFacts

pytest.importorskip("sglang")
SCRIPT = Path(__file__).with_name("sglang_parameters.py")
spec = importlib.util.spec_from_file_location("shapes_sglang_parameters", SCRIPT)
assert spec is not None
assert spec.loader is not None
sglang_parameters = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sglang_parameters)

NO_GEMM = re.compile(
    r"embed_tokens|norm|bias|conv1d|A_log|dt_bias|sinks|attn_sink|\.ape$|hc_|tid2eid|_weight_scale$|\.weight_scale$"
)
"""Parameters that no GEMM of ours reads: embeddings, norms, biases, states, scales, DeepSeek-V4's mHC mixing (fp32)."""

INDEX_PARTS = ("self_attn.qkv_proj", "self_attn.index_qkv_proj")
"""What SGLang loads MiniMax-M3's `fused_qkv_index_proj` as, before it concatenates them."""

UNNAMED_ATTENTION = re.compile(r"(layers\.\d+\.)(qkv_proj|o_proj)")
"""Qwen3-Next and Qwen3.5 keep attention in the block itself, though its prefix has `self_attn`."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("sglang") / "parameters.json"
    env = {**os.environ, "SGLANG_PLATFORM": "amd_mx_cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, out], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def sglang_weights(parameters: dict[str, list[int]], pack: int) -> dict[str, tuple[int, ...]]:
    """SGLang's GEMM weights as {module: shape}, with K in elements rather than bytes."""
    weights = {}
    for name, shape in parameters.items():
        if not NO_GEMM.search(name):
            module = name.replace("w13_weight", "gate_up_proj").replace("w2_weight", "down_proj")
            module = UNNAMED_ATTENTION.sub(r"\1self_attn.\2", module)
            quantized = f"{name}_scale" in parameters
            weights[module.removesuffix(".weight")] = (*shape[:-1], shape[-1] * (pack if quantized else 1))
    return weights


def planned_weights(facts: ModelFacts, gemms: list[shapes.Gemm]) -> dict[str, tuple[int, ...]]:
    """The same of our plan, a module a decoder block."""
    weights: dict[str, tuple[int, ...]] = {}
    for g in gemms:
        shape = (g.N, g.K) if g.op == "linear" else (g.E_local, g.N, g.K)
        weights |= {facts.block.format(i) + g.layer: shape for i in g.blocks} or {g.layer: shape}
    return weights


@pytest.mark.parametrize(("architecture", "variant", "tp", "ep"), sglang_parameters.cases())
def test_parameters_have_the_planned_shapes(
    built: dict[str, Any], architecture: str, variant: str, tp: int, ep: int
) -> None:
    facts = ModelFacts.from_config(sglang_parameters.config_of(architecture))
    scheme = variant if variant in SCHEMES else "bf16"
    parameters = built[f"{architecture} {variant} {tp} {ep}"]
    theirs = sglang_weights(parameters, SCHEMES[scheme].pack if scheme in SCHEMES else 1)
    ours = planned_weights(facts, shapes.plan(facts, tp, ep, scheme, fuse_shared=variant == "fused", rank=tp - 1))
    for module in [m for m in ours if m.endswith("fused_qkv_index_proj")]:
        parts = [theirs.pop(module.replace("self_attn.fused_qkv_index_proj", part)) for part in INDEX_PARTS]
        theirs[module] = (sum(n for n, _ in parts), parts[0][1])
    if "lm_head" not in theirs:  # tied
        theirs["lm_head"] = tuple(parameters["model.embed_tokens.weight"])
    assert ours == theirs


@pytest.mark.parametrize("architecture", sglang_parameters.CONFIGS)
def test_gemms_that_may_activate_are_those_that_sglang_asks(built: dict[str, Any], architecture: str) -> None:
    facts = ModelFacts.from_config(sglang_parameters.config_of(architecture))
    ours = [facts.block.format(i) + g.layer for g in shapes.plan(facts) for i in g.blocks if g.activated]
    assert sorted(ours) == sorted(built["activated"][architecture])
