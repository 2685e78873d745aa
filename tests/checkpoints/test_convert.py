"""Conversion: every weight is what `fake_quantize_mx` makes of transformers' own, nothing else changes; killed runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_amd_quant.checkpoints import convert, job
from sglang_amd_quant.checkpoints.convert import keep_job, quantize_job
from sglang_amd_quant.checkpoints.folder import Folder
from sglang_amd_quant.checkpoints.job import Job
from sglang_amd_quant.checkpoints.native import quantization_config
from sglang_amd_quant.errors import CheckpointError, RecipeError, ShapeError
from sglang_amd_quant.formats import fake_quantize_mx
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import ScaleMode

Saved = Callable[[str], Path]
LAYER = "model.layers.1"


def silent(_: int) -> None:
    pass


def quantized(source: Path, target: Path, recipe: Recipe, **options: Any) -> Job:
    job = quantize_job(Folder.open(source), target, recipe, **options)
    job.execute(silent)
    return job


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


class TestFolder:
    @pytest.fixture
    def source(self, saved: Saved, tmp_path: Path) -> Path:
        """The tiny Llama with the files that models come with."""
        folder = tmp_path / "in"
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "original").mkdir()
        for path in saved("llama").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "additional_chat_templates/tool_use.jinja"):
            (folder / name).write_text(name)
        for name in ("pytorch_model.bin", "original/params.json"):
            (folder / name).write_text(name)
        return folder

    def test_what_is_carried_over(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        before, after = contents(source), contents(tmp_path / "out")
        assert set(after) == (set(before) - {"pytorch_model.bin", "original/params.json", "model.safetensors"}) | {
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
        }
        carried = set(before) & set(after) - {"config.json"}
        assert {name: before[name] for name in carried} == {name: after[name] for name in carried}
        old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
        assert new.pop("quantization_config")["recipe"]["default"] == "mxfp4"
        assert new == old
        assert not (tmp_path / "out.partial").exists()

    def test_shards(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "one", Recipe.uniform("mxfp4"))
        quantized(source, tmp_path / "many", Recipe.uniform("mxfp4"), max_shard_bytes=10_000)
        shards = sorted((tmp_path / "many").glob("*.safetensors"))
        assert len(shards) > 3
        assert all(shard.stat().st_size < 10_000 + 4096 for shard in shards)  # 4096: its header
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        together: dict[str, torch.Tensor] = {}
        for shard in shards:
            tensors = load_file(shard)
            assert all(index["weight_map"][name] == shard.name for name in tensors)
            together |= tensors
        one = load_file(tmp_path / "one" / "model-00001-of-00001.safetensors")
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
        assert set(together) == set(one)
        assert all(torch.equal(together[n].view(torch.uint8), one[n].view(torch.uint8)) for n in one)

    @pytest.mark.parametrize("stop_after", [1, 30_000, 90_000])
    def test_killed_and_repeated(
        self, source: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options: dict[str, Any] = {"max_shard_bytes": 10_000}
        quantized(source, tmp_path / "whole", Recipe.uniform("mxfp4"), **options)

        done = 0

        def killed(count: int) -> None:
            nonlocal done
            done += count
            if done > stop_after:
                raise KeyboardInterrupt

        job = quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"), **options)
        with pytest.raises(KeyboardInterrupt):
            job.execute(killed)
        assert not (tmp_path / "out").exists()
        with pytest.raises(CheckpointError, match=r"config\.json: No such file"):  # nothing that loads as if whole
            Folder.open(job.partial)

        made: list[str] = []
        real = convert._make
        monkeypatch.setattr(convert, "_make", lambda c, *rest: (made.append(c.piece.source.name), real(c, *rest))[1])
        finished = len(list(job.partial.glob("*.safetensors")))
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"), **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert (len(made) < 21) == (finished > 0)  # 21 tensors: whole shards are not made again

    def test_repeated_with_other_arguments(self, source: Path, tmp_path: Path) -> None:
        def killed(_: int) -> None:
            raise KeyboardInterrupt

        target = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            quantize_job(Folder.open(source), target, Recipe.uniform("mxfp4")).execute(killed)
        other = quantize_job(Folder.open(source), target, Recipe.uniform("mxfp8"))
        with pytest.raises(CheckpointError, match="begun by another run, which differs in quantization_config, shards"):
            other.execute(silent)
        (source / "model.safetensors").touch()
        with pytest.raises(CheckpointError, match="which differs in files"):
            quantized(source, target, Recipe.uniform("mxfp4"))
        other.execute(silent, force=True)
        assert target.is_dir()

    def test_existing_target(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        with pytest.raises(CheckpointError, match="out: exists; name another folder, or replace it with --force"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp8"))
        quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp8")).execute(silent, force=True)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"] == {
            "default": "mxfp8",
            "rules": {},
        }

    @pytest.mark.parametrize("name", ["out", "out.partial"])
    def test_other_work_is_never_replaced(self, source: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("")
        with pytest.raises(CheckpointError, match=rf"{name}: holds files, but no .*json; name another folder"):
            quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp8")).execute(silent, force=True)
        assert (tmp_path / name / "thesis").is_file()

    @pytest.mark.parametrize(
        ("link", "to", "message"),
        [
            ("tokenizer_config.json", "nowhere/x.json", "points to nothing; fetch the file, or delete the link"),
            ("code/x.py", "nowhere/x.py", "points to nothing; fetch the file, or delete the link"),
            ("self", ".", "points to a folder that holds it; delete the link"),
            ("code/below/again", "..", "points to a folder that holds it; delete the link"),
        ],
    )
    def test_links_that_cannot_be_copied(self, source: Path, tmp_path: Path, link: str, to: str, message: str) -> None:
        """Told before hours of work, not after."""
        (source / link).parent.mkdir(parents=True, exist_ok=True)
        (source / link).symlink_to(to)
        with pytest.raises(CheckpointError, match=rf"^{source / link}: {message}$"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        assert not (tmp_path / "out.partial").exists()

    def test_links_are_followed(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "x.py").write_text("x")
        (source / "code").symlink_to("../blobs")
        (source / "original" / "params").symlink_to("nowhere")  # what is not carried over
        (source / "pytorch_model-2.bin").symlink_to("nowhere")
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        assert not (tmp_path / "out" / "code").is_symlink()
        assert (tmp_path / "out" / "code" / "x.py").read_text() == "x"

    def test_a_pipe_cannot_be_copied(self, source: Path, tmp_path: Path) -> None:
        os.mkfifo(source / "pipe")
        with pytest.raises(CheckpointError, match="pipe: neither file nor folder; move it elsewhere"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))

    @pytest.mark.parametrize("target", ["elsewhere/..", ".", "link"])
    def test_target_by_another_name(
        self, source: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a rename at the end could not replace is refused before any work."""
        (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
        (tmp_path / "link").symlink_to("elsewhere")
        monkeypatch.chdir(tmp_path / "elsewhere" / "folder")
        path = Path(target) if target == "." else tmp_path / target
        with pytest.raises(CheckpointError, match="stands for another folder; name that folder itself"):
            quantize_job(Folder.open(source), path, Recipe.uniform("mxfp8")).execute(silent, force=True)

    @pytest.mark.parametrize("text_config", [None, []])
    def test_text_config_that_is_none(self, source: Path, tmp_path: Path, text_config: Any) -> None:
        config = json.loads((source / "config.json").read_text()) | {"text_config": text_config}
        (source / "config.json").write_text(json.dumps(config))
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"] == text_config

    @pytest.mark.parametrize("target", ["in", "in/out", "."])
    def test_source_and_target_apart(self, source: Path, tmp_path: Path, target: str) -> None:
        job = quantize_job(Folder.open(source), tmp_path / target, Recipe.uniform("mxfp4"))
        with pytest.raises(CheckpointError, match="lies in the source"):
            job.execute(silent, force=True)
        assert (source / "model.safetensors").is_file()

    def test_one_run_at_a_time(self, source: Path, tmp_path: Path) -> None:
        job = quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"))

        def second(_: int) -> None:
            with pytest.raises(CheckpointError, match="another run is writing it"):
                job.execute(silent)

        job.execute(second)

    def test_no_room(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(CheckpointError, match="make room"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))

    def test_quantized_source(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        with pytest.raises(CheckpointError, match="quantized already; give the bf16 original, or --scheme keep"):
            quantized(tmp_path / "out", tmp_path / "again", Recipe.uniform("mxfp4"))

    def test_keep(self, source: Path, tools: Any, tmp_path: Path) -> None:
        """A compressed-tensors checkpoint in our own format: the same bits, the same schemes."""
        quantized(source, tmp_path / "ours", Recipe.uniform("mxfp8"), max_shard_bytes=10_000)
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        tensors = tools.canonical(tmp_path / "ours")
        save_file({n: t.contiguous() for n, t in tensors.items()}, foreign / "model.safetensors")
        mx = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        group = {"targets": ["Linear"], "weights": mx, "input_activations": mx | {"dynamic": True}}
        quantization = {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": ["lm_head"]}
        (foreign / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
        keep_job(Folder.open(foreign), tmp_path / "kept", 10_000).execute(silent)
        kept = tools.canonical(tmp_path / "kept")
        assert set(kept) == set(tensors)
        assert all(torch.equal(kept[n].view(torch.uint8), tensors[n].view(torch.uint8)) for n in kept)
        reader = Folder.open(tmp_path / "kept").reader()
        assert reader is not None
        assert reader.name == "amd_mx"
        assert reader.recipe.to_dict() == {"default": "mxfp8", "rules": {"lm_head": "bf16"}}

    def test_keep_refuses_nan(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "ours", Recipe.uniform("mxfp8"))
        (file,) = (tmp_path / "ours").glob("*.safetensors")
        tensors = load_file(file)
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name].view(torch.uint8)[3, 7] = 0xFF
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=rf"{name} \[.*\]: holds NaN .*, as at \[3, 7\]; quantize the source"):
            keep_job(Folder.open(tmp_path / "ours"), tmp_path / "kept").execute(silent)
        assert not (tmp_path / "kept").exists()

    def test_keep_needs_a_quantized_source(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nothing to keep"):
            keep_job(Folder.open(source), tmp_path / "kept")

    def test_a_recipe_alone_quantizes_nothing(self, source: Path, tmp_path: Path) -> None:
        """A bf16 checkpoint whose config.json has a recipe, for a server to quantize by."""
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = quantization_config(Recipe.uniform("mxfp4"))
        (source / "config.json").write_text(json.dumps(config))
        message = "nothing quantized, so there is nothing to keep; take quantization_config out of config.json"
        with pytest.raises(CheckpointError, match=message):
            keep_job(Folder.open(source), tmp_path / "kept")
        with pytest.raises(CheckpointError, match=r"no tensor is; take quantization_config out of config\.json$"):
            quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"))
