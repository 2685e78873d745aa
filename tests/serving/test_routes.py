"""One model by every route to its weights and ranks: online, written by `amd-mx quantize`, TP2, TP2 EP2."""

from __future__ import annotations

import subprocess
import sys

import torch

from bench.agreement import compare, compare_pair
from bench.hf_model import fake_quantize, load_model
from sglang_amd_quant.recipe import Recipe

SCHEME = "w4a16"
FP16 = ["--dtype", "float16"]
"""Ranks round their partial sums before they add them. In fp16 that is 8 times finer than in bf16, and ids then part
so seldom that a wrong shard cannot hide behind near ties."""


def test_every_route_gives_the_same_ids(serve, tiny, prompts, generate, tmp_path):
    model, written = tiny("qwen3-moe"), tmp_path / "written"
    ids = prompts(model)
    command = [sys.executable, "-m", "sglang_amd_quant.cli.main", "quantize", str(model), str(written)]
    subprocess.run([*command, "--scheme", SCHEME], check=True, capture_output=True)
    routes = {
        "online": (model, "--quantization", f"amd_{SCHEME}"),
        "written": (written,),  # needs no flag
        "tp2": (model, "--quantization", f"amd_{SCHEME}", "--tp", "2"),
        "tp2 ep2": (written, "--tp", "2", "--ep-size", "2"),
    }
    outputs = {}
    for route, (folder, *flags) in routes.items():
        with serve(folder, *flags, *FP16, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}) as server:
            outputs[route] = generate(server, ids)
    assert outputs["written"] == outputs["online"]
    reference = load_model(model, torch.float16)
    fake_quantize(reference, Recipe.uniform(SCHEME))
    agreement = compare(reference, ids, outputs["online"])
    print(f"qwen3-moe {SCHEME}: {agreement}")
    assert agreement.broken == []
    for route in ("tp2", "tp2 ep2"):
        between = compare_pair(reference, ids, outputs["online"], outputs[route])
        print(f"qwen3-moe {SCHEME}, {route} against one rank: {between}")
        assert between.broken == []
        assert len(between.partings) <= len(ids) // 4
