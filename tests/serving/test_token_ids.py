"""Greedy token ids of real servers against transformers on fake-quantized weights and activations."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch

from bench.agreement import compare
from bench.hf_model import QuantLinear, fake_quantize, load_model
from sglang_amd_quant.recipe import Recipe
from tests.int4_files import rewrite

MIXED = {"default": "mxfp8", "rules": {"*.o_proj": "bf16", "*.mlp.*": "w4a8"}}

EXPERTS_ONLY = {"default": "bf16", "rules": {"*.experts.*": "w4a16"}}
"""What `amd_w4a16` comes to on gpt-oss: SGLang gives its attention no quantization method."""

WITHOUT_TOKENIZER = ["--skip-tokenizer-init"]
"""Gemma's takes three processes several seconds each to read, and ids need none."""


def judge(model, recipe, prompts, outputs, label):
    """Judge ids of a model that is quantized as it loads."""
    reference = load_model(model)
    fake_quantize(reference, recipe)
    judge_by(reference, recipe, prompts, outputs, label)


def judge_by(reference, recipe, prompts, outputs, label):
    """Every token is the reference's own, or lies within the bound that rounding explains (bench/agreement.py)."""
    agreement = compare(reference, prompts, outputs)
    print(f"{label}: {agreement}")
    assert agreement.positions == len(prompts) * 32
    assert agreement.broken == []
    # A wrong weight or layout parts nearly everywhere, rounding seldom. Where activations are e2m1 a last bit moves a
    # code by half its value, the measured noise is of the size of the margins, and only the bound holds.
    if recipe.default != "mxfp4":
        assert len(agreement.partings) <= agreement.positions // 4
    assert max(Counter(token for output in outputs for token in output).values()) < agreement.positions // 2


@pytest.mark.parametrize("scheme", ["w4a16", "mxfp4", "mxfp8", "w4a8"])
def test_gemma(serve, gemma, prompts, generate, clients, scheme):
    ids = prompts(gemma)
    with_client = scheme == "w4a16"
    flags = [] if with_client else WITHOUT_TOKENIZER
    with serve(gemma, "--quantization", f"amd_{scheme}", *flags, command_line=with_client) as server:
        outputs = generate(server, ids, at_once=True)  # eight prompts decode in the time of two
        assert "fast start" in server.log_text()
        if with_client:
            clients.stream_a_chat(server)
    judge(gemma, Recipe.uniform(scheme), ids, outputs, f"gemma-3-270m {scheme}")


@pytest.mark.parametrize(
    ("name", "scheme", "recipe"),
    [
        ("llama", "w4a16", Recipe.uniform("w4a16")),
        ("mixtral", "mxfp8", Recipe.uniform("mxfp8")),
        ("glm4-moe", "w4a16", Recipe.uniform("w4a16")),  # its experts' output is scaled by 4, once
        ("gpt-oss", "w4a16", Recipe.from_dict(EXPERTS_ONLY)),
    ],
    ids=["llama", "mixtral", "glm4-moe", "gpt-oss"],
)
def test_tiny(serve, tiny, prompts, generate, clients, tmp_path, name, scheme, recipe):
    model = tiny(name)
    ids = prompts(model)
    with serve(model, "--quantization", f"amd_{scheme}") as server:
        outputs = generate(server, ids)
        if name == "llama":
            clients.bench_serving(server, model, tmp_path)
    judge(model, recipe, ids, outputs, f"{name} {scheme}")


def test_int4_checkpoint(serve, tiny, prompts, generate, tmp_path):
    """GPTQ's format in fp16, with zero points, against transformers on the numbers that were packed."""
    model, written, recipe = tiny("llama"), tmp_path / "gptq", Recipe.uniform("int4_w4a16", group=128)
    ids = prompts(model)
    layers = rewrite(model, written, "gptq", recipe.group, symmetric=False)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, written)
    with serve(written, "--quantization", "amd_mx") as server:
        outputs = generate(server, ids)
    reference = load_model(model, torch.float16)
    fake_quantize(reference, recipe)
    replaced = {name: module for name, module in reference.named_modules() if isinstance(module, QuantLinear)}
    assert replaced.keys() == layers.keys()
    for name, module in replaced.items():
        module.weight.data.copy_(layers[name].values)
    judge_by(reference, recipe, ids, outputs, "llama gptq")


def test_recipe(serve, tiny, prompts, generate, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(MIXED))
    model = tiny("qwen3")
    ids = prompts(model)
    # Without the fast start, which the other servers have: as SGLang starts if left alone.
    env = {"SGLANG_AMD_MX_RECIPE": str(path), "SGLANG_AMD_MX_FAST_START": "0"}
    with serve(model, "--quantization", "amd_mx", env=env, command_line=True) as server:
        outputs = generate(server, ids)
        assert "fast start" not in server.log_text()
    judge(model, Recipe.from_dict(MIXED), ids, outputs, "qwen3 recipe")
