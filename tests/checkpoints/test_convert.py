"""Conversion: every weight is what `fake_quantize_mx` makes of transformers' own, nothing else changes; killed runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import contents, quantized
from safetensors.torch import load_file, save_file

from sglang_amd_quant.checkpoints import convert
from sglang_amd_quant.checkpoints.convert import quantize_job
from sglang_amd_quant.checkpoints.folder import Folder
from sglang_amd_quant.errors import CheckpointError, RecipeError, ShapeError
from sglang_amd_quant.formats import fake_quantize_mx
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import ScaleMode

Saved = Callable[[str], Path]
LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("model_type", "modules"),
    [
        pytest.param("llama", 14, id="dense"),
        pytest.param("gemma3_text", 14, id="tied"),
        pytest.param("qwen3_moe", 8 + 2 * 4 * 3, id="qwen3_moe"),
        pytest.param("mixtral", 8 + 2 * 4 * 3, id="mixtral"),
        pytest.param("gpt_oss", 2 * 2, id="gpt_oss"),  # SGLang gives its attention no quantization method
        pytest.param("llama4_text", 8 + 2 * 4 * 3 + 2 * 3, id="llama4"),
    ],
)
@pytest.mark.parametrize(("scheme", "element"), [("mxfp4", "e2m1"), ("mxfp8", "e4m3")])
def test_values(
    saved: Saved, tools: Any, tmp_path: Path, model_type: str, modules: int, scheme: str, element: str
) -> None:
    source = saved(model_type)
    quantized(source, tmp_path / "out", Recipe.uniform(scheme))
    before, after = load_file(source / "model.safetensors"), tools.canonical(tmp_path / "out")
    ours = tools.dequantized(after)
    assert len(ours) == modules
    for module, weight in ours.items():
        assert torch.equal(
            weight, fake_quantize_mx(original(before, module, model_type).float().contiguous(), element)
        ), module
    for name in set(before) & set(after):
        if after[name].element_size() > 1:
            assert torch.equal(before[name], after[name]), name
    assert ("lm_head.weight" in after) == ("lm_head.weight" in before)


def original(before: dict[str, torch.Tensor], module: str, model_type: str) -> torch.Tensor:
    """[..., N, K] of a module, as the model type's forward in transformers uses its tensors."""
    if f"{module}.weight" in before:
        return before[f"{module}.weight"]
    if model_type == "gpt_oss":  # hidden @ gate_up_proj[e]: [E, K, N]
        return before[module].transpose(1, 2)
    stem, expert, part = module.rsplit(".", 2)
    if part == "down_proj":  # llama4: torch.bmm(hidden, down_proj)
        return before[f"{stem}.down_proj"][int(expert)].T
    gate, up = before[f"{stem}.gate_up_proj"][int(expert)].chunk(2, dim=-1)  # bmm, then chunk along the columns
    return (gate if part == "gate_proj" else up).T


def test_fused_experts_that_are_not_transposed(saved: Saved, tools: Any, tmp_path: Path) -> None:
    """Qwen3.5-MoE's released form: [E, 2I, H], gate before up. Here: Qwen3-MoE's experts stacked by hand."""
    before = load_file(saved("qwen3_moe") / "model.safetensors")
    stem = f"{LAYER}.mlp.experts"
    halves = [torch.cat([before[f"{stem}.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in range(4)]
    downs = [before[f"{stem}.{e}.down_proj.weight"] for e in range(4)]
    fused = {f"{stem}.gate_up_proj": torch.stack(halves), f"{stem}.down_proj": torch.stack(downs)}
    (tmp_path / "in").mkdir()
    save_file(fused, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "qwen3_5_moe"}')
    quantized(tmp_path / "in", tmp_path / "out", Recipe.uniform("mxfp4"))
    ours = tools.dequantized(tools.canonical(tmp_path / "out"))
    assert len(ours) == 12
    for module, weight in ours.items():
        assert torch.equal(weight, fake_quantize_mx(before[f"{module}.weight"].float(), "e2m1")), module


@pytest.mark.parametrize("model_type", ["gpt_oss", "stablelm"])
@pytest.mark.parametrize("attention", [True, False])
def test_attention_that_sglang_runs_in_bf16(tools: Any, tmp_path: Path, model_type: str, attention: bool) -> None:
    """It stays so; and where there is none, nobody is asked about a pattern that nobody wrote."""
    (tmp_path / "in").mkdir()
    tensors = {f"{LAYER}.mlp.down_proj.weight": torch.ones(64, 64)}
    if attention:
        tensors |= {f"{LAYER}.self_attn.{part}_proj.weight": torch.ones(64, 64) for part in "qkvo"}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": model_type}))
    quantized(tmp_path / "in", tmp_path / "out", Recipe.uniform("int4_w4a16"))
    assert list(tools.dequantized(tools.canonical(tmp_path / "out"))) == [f"{LAYER}.mlp.down_proj"]


def test_many_chunks_make_the_same(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(saved("gpt_oss"), tmp_path / "whole", Recipe.uniform("w4a8"))
    monkeypatch.setattr(convert, "CHUNK_BYTES", 1000)
    quantized(saved("gpt_oss"), tmp_path / "chunks", Recipe.uniform("w4a8"))
    assert contents(tmp_path / "whole") == contents(tmp_path / "chunks")


def test_recipe_and_scale_mode(saved: Saved, tools: Any, tmp_path: Path) -> None:
    rules = (Rule("*.experts.*", "w4a8"), Rule("*.layers.0.*", "bf16"))
    modes = {"e2m1": ScaleMode.CEIL, "e4m3": ScaleMode.FLOOR}
    quantized(saved("qwen3_moe"), tmp_path / "out", Recipe(rules, "mxfp8"), scale_mode=modes)
    before = load_file(saved("qwen3_moe") / "model.safetensors")
    after = tools.canonical(tmp_path / "out")
    reader = Folder.open(tmp_path / "out").reader()
    assert reader is not None
    assert reader.scale_mode == modes
    assert after["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert after[f"{LAYER}.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert after["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.uint8  # the first rule that matches
    for module, weight in tools.dequantized(after).items():
        element = "e2m1" if ".experts." in module else "e4m3"
        assert torch.equal(weight, fake_quantize_mx(before[f"{module}.weight"].float(), element, modes[element]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_source_dtypes(saved: Saved, tools: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "in").mkdir()
    tensors = {n: t.to(dtype) for n, t in load_file(saved("llama") / "model.safetensors").items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text((saved("llama") / "config.json").read_text())
    quantized(tmp_path / "in", tmp_path / "out", Recipe.uniform("mxfp4"))
    after = tools.canonical(tmp_path / "out")
    assert after["model.norm.weight"].dtype == dtype
    for module, weight in tools.dequantized(after).items():
        assert torch.equal(weight, fake_quantize_mx(tensors[f"{module}.weight"].float(), "e2m1"))


class TestWhatIsQuantized:
    """Names decide; what is not known to be a linear layer stays, and the written recipe says so."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        matrices = (
            "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.kv_b_proj", "model.layers.0.mlp.gate",
            "model.layers.0.mixer.strange_proj", "model.layers.1.mixer.strange_proj", "model.pos_embed",
            "visual.blocks.0.attn.o_proj", "lm_head", "model.embed_tokens",
        )  # fmt: skip
        tensors = {f"{name}.weight": torch.randn(32, 64).bfloat16() for name in matrices}
        tensors["model.layers.0.conv.weight"] = torch.randn(32, 32, 32).bfloat16()
        tensors["model.layers.0.experts.gate_up_proj"] = torch.randn(2, 64, 64).bfloat16()
        tensors["model.layers.0.position_ids"] = torch.arange(64).reshape(2, 32)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
        return tmp_path

    def test_in_doubt_stays(self, source: Path, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
        target = tmp_path_factory.mktemp("out") / "out"
        job = quantized(source, target, Recipe.uniform("mxfp4"))
        assert list(tools.dequantized(tools.canonical(target))) == ["model.layers.0.self_attn.q_proj"]
        assert job.plan is not None
        assert sorted(job.plan.in_doubt) == [
            "model.layers.0.conv",
            "model.layers.0.experts.gate_up_proj",
            "model.layers.0.mixer.strange_proj",
            "model.layers.1.mixer.strange_proj",
            "model.pos_embed",
            "visual.blocks.0.attn.o_proj",
        ]
        recipe = json.loads((target / "config.json").read_text())["quantization_config"]["recipe"]
        assert r"re:model\.layers\.\d+\.mixer\.strange_proj" in recipe["rules"]

    def test_a_rule_that_names_it_decides(
        self, source: Path, tools: Any, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        target = tmp_path_factory.mktemp("out") / "out"
        quantized(source, target, Recipe((Rule("re:.*(strange|kv_b)_proj", "mxfp4"),)))
        assert sorted(tools.dequantized(tools.canonical(target))) == [
            "model.layers.0.mixer.strange_proj",
            "model.layers.1.mixer.strange_proj",  # and never MLA's kv_b_proj
        ]

    @pytest.mark.parametrize(
        ("recipe", "error", "message"),
        [
            (
                Recipe((Rule("*.qq_proj", "mxfp4"),)),
                RecipeError,
                r"'\*\.qq_proj': matches no module of the checkpoint; modules are named like model\.layers\.0",
            ),
            (
                Recipe((Rule("*.kv_b_proj", "mxfp4"),), "mxfp8"),
                RecipeError,
                r"^recipe: '\*\.kv_b_proj' -> 'mxfp4': matches only what always stays bf16, as model.*kv_b_proj; drop",
            ),
            (
                Recipe.uniform("int4_w4a16", group=128),
                ShapeError,
                r"K=64 is not a multiple of 128, the int4 group; take a smaller",
            ),
        ],
    )
    def test_bad_recipes(self, source: Path, recipe: Recipe, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            quantize_job(Folder.open(source), source.with_name("out"), recipe)


def test_fused_parts_need_one_scheme(saved: Saved, tmp_path: Path) -> None:
    for model_type, rule in (("llama", "*.q_proj"), ("qwen3_moe", "*.experts.2.up_proj")):
        recipe = Recipe((Rule(rule, "mxfp4"),), "mxfp8")
        with pytest.raises(RecipeError, match="run as one fused layer but get mxfp4, mxfp8"):
            quantize_job(Folder.open(saved(model_type)), tmp_path / "out", recipe)


MLP = "model.layers.0.mlp"


@pytest.fixture
def down_proj(tmp_path: Path) -> Callable[[torch.Tensor], Path]:
    """A checkpoint whose down_proj is to be tried."""

    def make(weight: torch.Tensor) -> Path:
        (tmp_path / "in").mkdir()
        tensors = {f"{MLP}.down_proj.weight": weight, f"{MLP}.up_proj.weight": torch.ones(64, 64)}
        save_file(tensors, tmp_path / "in" / "model.safetensors")
        (tmp_path / "in" / "config.json").write_text("{}")
        return tmp_path / "in"

    return make


def test_k_not_a_multiple_of_32(down_proj: Callable[[torch.Tensor], Path], tmp_path: Path) -> None:
    source = down_proj(torch.randn(64, 80))
    message = (
        r"^layer model.layers.0.mlp.down_proj \[64, 80\]: K=80 is not a multiple of 32, the MX block; keep it in bf16"
    )
    with pytest.raises(ShapeError, match=message):
        quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"))
    quantized(source, tmp_path / "out", Recipe((Rule("*.down_proj", "bf16"),), "mxfp4"))


@pytest.mark.parametrize("shape", [(64, 0), (0, 64)])
def test_empty_weights(down_proj: Callable[[torch.Tensor], Path], tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(
        ShapeError, match=r"down_proj \[\d+, \d+\]: holds no weights; fetch the checkpoint again, or keep"
    ):
        quantize_job(Folder.open(down_proj(torch.ones(shape))), tmp_path / "out", Recipe.uniform("int4_w4a16"))


def test_nothing_to_quantize(down_proj: Callable[[torch.Tensor], Path], tmp_path: Path) -> None:
    """Written all the same, it would be a checkpoint that `amd-mx inspect` finds fault with."""
    message = rf"^recipe: quantizes none of 2 modules; name layers .* like {MLP}\.down_proj, {MLP}\.up_proj$"
    with pytest.raises(RecipeError, match=message):
        quantize_job(Folder.open(down_proj(torch.ones(64, 64))), tmp_path / "out", Recipe())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_no_format_holds(down_proj: Callable[[torch.Tensor], Path], tmp_path: Path, value: float) -> None:
    weight = torch.randn(64, 64)
    weight[3, 5] = value
    with pytest.raises(CheckpointError, match=r"down_proj.weight \[64, 64\]: holds NaN or Inf"):
        quantized(down_proj(weight), tmp_path / "out", Recipe.uniform("mxfp4"))


@pytest.mark.parametrize("value", [1e300, 3.3e38, -3.3e38])
def test_values_beyond_what_a_format_has(
    down_proj: Callable[[torch.Tensor], Path], tmp_path: Path, value: float
) -> None:
    """1e300 is Inf in fp32, and 3.3e38 rounds to 2^128 in e2m1."""
    weight = torch.ones(64, 64, dtype=torch.float64)
    weight[3, 5] = value
    message = (
        rf"down_proj.weight \[64, 64\]: holds {re.escape(f'{abs(value):.3g}')}, beyond the 2\^127 .*; mend the source"
    )
    with pytest.raises(CheckpointError, match=message):
        quantized(down_proj(weight), tmp_path / "out", Recipe.uniform("mxfp4"))


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "int4_w4a16"])
@pytest.mark.parametrize("mode", list(ScaleMode))
def test_largest_value_of_all_formats(
    down_proj: Callable[[torch.Tensor], Path], tools: Any, tmp_path: Path, scheme: str, mode: ScaleMode
) -> None:
    source = down_proj(torch.full((64, 64), 2.0**127, dtype=torch.float64))
    quantized(source, tmp_path / "out", Recipe.uniform(scheme), scale_mode={"e2m1": mode, "e4m3": mode})
    assert all(w.isfinite().all() for w in tools.dequantized(tools.canonical(tmp_path / "out")).values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_integers_are_no_source(down_proj: Callable[[torch.Tensor], Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """What a config.json has lost its quantization_config of, not weights."""
    source = down_proj(torch.ones(64, 64, dtype=dtype))
    message = rf"down_proj.weight \[64, 64\] {dtype}: quantized, though config.json has no quantization_config; give"
    with pytest.raises(CheckpointError, match=message):
        quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"))
    quantized(source, tmp_path / "out", Recipe((Rule("*.down_proj", "bf16"),), "mxfp4"))


def test_an_output_that_the_source_holds_too(saved: Saved, tmp_path: Path) -> None:
    name = f"{MLP}.down_proj.weight_scale"
    (tmp_path / "in").mkdir()
    tensors = load_file(saved("llama") / "model.safetensors") | {name: torch.ones(64, 1).bfloat16()}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "llama"}')
    message = rf"^{name}: is what a quantized layer's output is called, but the source holds it too; drop it"
    with pytest.raises(CheckpointError, match=message):
        quantize_job(Folder.open(tmp_path / "in"), tmp_path / "out", Recipe.uniform("mxfp4"))
    quantized(tmp_path / "in", tmp_path / "out", Recipe((Rule("*.layers.0.mlp.*", "bf16"),), "mxfp4"))


def test_gate_and_up_are_halves(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts"
    tensors = {f"{stem}.gate_up_proj": torch.ones(2, 64, 65), f"{stem}.down_proj": torch.ones(2, 32, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama4"}')
    with pytest.raises(ShapeError, match=r"gate_up_proj \[2, 64, 65\]: N=65 is odd, so that gate and up are no halves"):
        quantize_job(Folder.open(tmp_path), tmp_path / "out", Recipe.uniform("mxfp4"))
