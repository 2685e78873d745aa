"""int4 checkpoints: GPTQ, AWQ and compressed-tensors against who packs them, broken ones, and our own format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_amd_quant.cli.main import main
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.formats import dequantize_int4, group_words, quantize_int4, split_words
from sglang_amd_quant.recipe import Recipe
from tests.int4_files import Int4, config, rewrite, stored

METHODS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
CT = "compressed-tensors"
GROUP = 32  # all that 64 and 96 columns allow
Q = "model.layers.0.self_attn.q_proj"
Saved = Callable[[str], Path]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("method", METHODS)
class TestFormats:
    def test_decodes(self, saved: Saved, tools: Any, tmp_path: Path, method: str, symmetric: bool) -> None:
        layers = rewrite(saved("llama"), tmp_path / "m", method, GROUP, symmetric)
        canonical = tools.canonical(tmp_path / "m")
        ours = tools.dequantized(canonical)
        assert ours.keys() == layers.keys()
        assert [m for m in layers if not torch.equal(ours[m], layers[m].values)] == []
        assert all(name.rpartition(".")[2] in ("weight", "weight_scale") for name in canonical)
        plain = load_file(tmp_path / "m" / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(canonical["model.embed_tokens.weight"], plain)

    def test_inspect(
        self, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, symmetric: bool
    ) -> None:
        rewrite(saved("qwen3_moe"), tmp_path / "m", method, GROUP, symmetric)
        assert main(["inspect", str(tmp_path / "m")]) == 0
        printed = capsys.readouterr().out
        assert re.search(
            r"model\.layers\.\{0\.\.1\}\.self_attn\.k_proj +int4_w4a16, group 32 +32 x 64 +2 +5\.00", printed
        )

    def test_keep_is_bit_for_bit(self, saved: Saved, tools: Any, tmp_path: Path, method: str, symmetric: bool) -> None:
        rewrite(saved("llama"), tmp_path / "m", method, GROUP, symmetric)
        assert main(["quantize", str(tmp_path / "m"), str(tmp_path / "kept"), "--scheme", "keep"]) == 0
        before, after = tools.canonical(tmp_path / "m"), tools.canonical(tmp_path / "kept")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        written = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
        assert written["recipe"]["group"] == GROUP


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_compressed_tensors_decodes_alike(
    saved: Saved, tools: Any, tmp_path_factory: pytest.TempPathFactory, symmetric: bool
) -> None:
    """Quantized and written by the package itself, with bf16 scales."""
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    folder, model = tmp_path_factory.mktemp("ct"), tools.tiny_model("llama")
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=symmetric)
    group = QuantizationScheme(targets=["Linear"], weights=args)
    apply_quantization_config(model, QuantizationConfig(config_groups={"g": group}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().float().unflatten(-1, (-1, GROUP))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)

    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written["format"] == "pack-quantized"
    tensors = load_file(folder / "model.safetensors")
    ours = tools.dequantized(tools.canonical(folder))
    assert len(ours) == 14
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    for module, weight in ours.items():
        ends = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        state = {end: tensors[f"{module}.{end}"] for end in ends if f"{module}.{end}" in tensors}
        state["weight_scale"] = state["weight_scale"].float()  # it would round the product to the scale's dtype
        assert torch.equal(weight, packer.decompress(state, group)["weight"]), module


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_compressed_tensors_reads_autoawq_alike(saved: Saved, tools: Any, tmp_path: Path, symmetric: bool) -> None:
    """Its converter from AutoAWQ, and our reader on both sides of it."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    rewrite(saved("llama"), tmp_path / "awq", "awq", GROUP, symmetric)
    read = json.loads((tmp_path / "awq" / "config.json").read_text())
    converter = AutoAWQConverter.from_autoawq_config(read["quantization_config"])
    converted = converter.process(load_file(tmp_path / "awq" / "model.safetensors"))
    quantization = json.loads(converter.create_config().model_dump_json())
    reader = tools.reader_for(quantization | {"quant_method": "compressed-tensors"})
    before, after = tools.canonical(tmp_path / "awq"), dict(reader.canonical(converted.items()))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_that_do_not_fill_words(tools: Any) -> None:
    """compressed-tensors packs zero points along N: 36 rows are 5 words."""
    layer = Int4.of(torch.randn(36, 64), GROUP, symmetric=False)
    tensors = [(f"{Q}.{end}", t) for end, t in stored("compressed-tensors", layer, symmetric=False).items()]
    assert dict(tensors)[f"{Q}.weight_zero_point"].shape == (5, 2)
    reader = tools.reader_for(config("compressed-tensors", GROUP, symmetric=False))
    (ours,) = tools.dequantized(dict(reader.canonical(tensors))).values()
    assert torch.equal(ours, layer.values)


@pytest.mark.parametrize("method", METHODS)
def test_scales_and_zero_points_wait_only_for_one_another(tools: Any, method: str) -> None:
    layer = Int4.of(torch.randn(32, 64), GROUP, symmetric=False)
    tensors = list(stored(method, layer, symmetric=False).items())
    for order in (tensors, tensors[::-1]):
        stream = tools.reader_for(config(method, GROUP, symmetric=False)).canonical((f"{Q}.{n}", t) for n, t in order)
        assert sorted(name for name, _ in stream) == [f"{Q}.weight", f"{Q}.weight_scale"]
    reader = tools.reader_for(config(method, GROUP, symmetric=True))
    seen: list[str] = []
    symmetric = stored(method, Int4.of(torch.randn(32, 64), GROUP, symmetric=True), symmetric=True)

    def stream_of() -> Any:
        for name, tensor in symmetric.items():
            yield f"{Q}.{name}", tensor
            if "scale" in name:
                assert f"{Q}.weight_scale" in seen, "held back for nothing"

    for name, _ in reader.canonical(stream_of()):
        seen.append(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lm_head_is_dequantized_to_the_dtype_of_its_scales(tools: Any, dtype: torch.dtype) -> None:
    layer = Int4.of(torch.randn(32, 64), GROUP, symmetric=True)
    tensors = {f"lm_head.{n}": t.to(dtype) if n == "scales" else t for n, t in stored("gptq", layer, True).items()}
    reader = tools.reader_for(config("gptq", GROUP, True, lm_head=True))
    ((name, weight),) = reader.canonical(tensors.items())
    want = dequantize_int4(*quantized_as(layer, dtype), dtype=dtype)
    assert (name, weight.dtype) == ("lm_head.weight", dtype)
    assert torch.equal(weight, want)
    meta = reader.canonical((n, t.to("meta")) for n, t in tensors.items())
    assert [(n, t.shape, t.dtype) for n, t in meta] == [(name, weight.shape, dtype)]


def quantized_as(layer: Int4, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.codes[:, 0::2] | layer.codes[:, 1::2] << 4, layer.scales.to(dtype)


class TestWhatIsQuantized:
    """Which modules a config says are quantized."""

    def scheme(self, tools: Any, method: str, module: str, **more: Any) -> str | None:
        found = tools.reader_for(config(method, GROUP, True, **more)).recipe.scheme_for(module)
        return None if found is None else f"{found.name} {found.block}"

    def test_gptq_dynamic(self, tools: Any) -> None:
        from sglang.srt.layers.quantization.utils import get_dynamic_override

        dynamic = {r"-:.*\.layers\.1\..*": {}, r"+:.*\.mlp\..*": {"bits": 4, "group_size": GROUP}, r"-:model\.x": {}}
        theirs = type("Config", (), {"dynamic": dynamic})()
        for module in (
            "model.layers.0.mlp.up_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.0.a",
            "model.xy.q_proj",
        ):
            excluded = get_dynamic_override(theirs, module) is False
            assert (self.scheme(tools, "gptq", module, dynamic=dynamic) is None) == excluded, module

    @pytest.mark.parametrize(
        ("more", "quantized", "left"),
        [
            ({}, ["model.layers.0.mlp.up_proj"], ["lm_head", "visual.blocks.0.mlp.up_proj", "model.layers.0.mlp.gate"]),
            (
                {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj", "mlp.gate_proj"]]},
                ["model.layers.0.mlp.up_proj", Q],
                ["model.layers.0.mlp.down_proj"],
            ),
            (
                {"modules_in_block_to_quantize": ["mlp.up_proj"], "block_name_to_quantize": "model.layers"},
                ["model.layers.0.mlp.up_proj"],
                ["draft.layers.0.mlp.up_proj", Q],
            ),
            ({"block_name_to_quantize": "model.layers"}, [Q], ["model.merger.up_proj"]),
        ],
    )
    def test_gptq_blocks(self, tools: Any, more: dict[str, Any], quantized: list[str], left: list[str]) -> None:
        assert {self.scheme(tools, "gptq", m, **more) for m in quantized} == {"int4_w4a16 32"}
        assert {self.scheme(tools, "gptq", m, **more) for m in left} == {None}

    @pytest.mark.parametrize("name", ["visual", "mlp.up", "model.layers.1.", "self_attn.q_proj"])
    def test_awq_excludes_as_sglang_does(self, tools: Any, name: str) -> None:
        from sglang.srt.layers.quantization.awq.awq import is_layer_skipped_awq

        for module in ("model.layers.1.mlp.up_proj", Q, "model.layers.11.mlp.down_proj"):
            found = self.scheme(tools, "awq", module, modules_to_not_convert=[name])
            assert (found is None) == is_layer_skipped_awq(module, [name]), module


def refused(method: str, **more: Any) -> dict[str, Any]:
    return config(method, GROUP, True) | more


def group_of(**weights: Any) -> dict[str, Any]:
    made = config("compressed-tensors", GROUP, True)
    made["config_groups"]["group_0"]["weights"] |= weights
    return made


def two_groups() -> dict[str, Any]:
    made = group_of()
    other = json.loads(json.dumps(made["config_groups"]["group_0"]))
    other["weights"]["group_size"] = 64
    made["config_groups"]["group_1"] = other | {"targets": ["re:.*mlp"]}
    return made


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (refused("gptq", bits=8), "bits 8: not 4"),
        (refused("gptq", desc_act=True), "desc_act true: weights in activation order"),
        (refused("gptq", group_size=-1), r"group_size -1 \(one scale a row\): int4 kernels know groups of 32, 64, 128"),
        (refused("gptq", group_size=256), "group_size 256: int4 kernels know groups"),
        (refused("gptq", checkpoint_format="marlin"), "checkpoint_format 'marlin': not one of gptq, gptq_v2"),
        (refused("gptq", dynamic={"+:.*up_proj": {"bits": 8}}), r"dynamic '\+:\.\*up_proj': bits 8, while one setting"),
        (refused("awq", version="gemv"), "version 'gemv': words in another order than gemm's"),
        (refused("awq", bits=3), "bits 3: not 4"),
        (refused("awq", group_size=16), "group_size 16: int4 kernels know groups"),
        (group_of(actorder="group"), r"group_0\.weights actorder 'group': in activation order"),
        (group_of(strategy="channel", group_size=None), r"group_0\.weights group_size -1 \(one scale a row\)"),
        (config(CT, GROUP, True, transform_config={"config_groups": {"u": {}}}), "transform_config: activations"),
        (two_groups(), "group_0 and config_groups.group_1: int4 layers of several group sizes"),
    ],
)
def test_configs_that_are_refused(tools: Any, quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        tools.reader_for(quantization)
    assert "\n" not in str(caught.value)
    assert "quantize the bf16 original" in str(caught.value)


def test_old_names_of_awq(tools: Any) -> None:
    reader = tools.reader_for(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    )
    assert (reader.recipe.group, reader.symmetric) == (64, False)


@pytest.mark.parametrize("order", [None, "weight", "static"])
def test_orders_that_keep_k(tools: Any, order: str | None) -> None:
    assert tools.reader_for(group_of(actorder=order)).recipe.group == GROUP


# ---- broken tensors ----


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """Give a tensor of q_proj another value, or drop it."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        old = tensors.pop(f"{Q}.{name}")
        if value is not None:
            tensors[f"{Q}.{name}"] = value(old).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def say(**settings: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        read = json.loads((folder / "config.json").read_text())
        read["quantization_config"] |= settings
        (folder / "config.json").write_text(json.dumps(read))

    return apply


def value(number: float) -> Callable[[Path], None]:
    return change("scales", lambda t: t.fill_(number))


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # partners
    "no qzeros": ("gptq", change("qzeros", None), f"{Q}: qzeros: missing"),
    "no scales": ("gptq", change("scales", None), f"{Q}: scales: missing"),
    "no qweight": ("awq", change("qweight", None), f"{Q}: qweight: missing"),
    "no zero points": (CT, change("weight_zero_point", None), f"{Q}: weight_zero_point: missing"),
    # shapes and dtypes
    "short scales": (
        "gptq", change("scales", lambda t: t[:1]),
        rf"{Q}.scales \[64, 1\]: the weight has \[64, 2\] blocks of 32",
    ),
    "narrow qweight": ("gptq", change("qweight", lambda t: t[:, :32]), r"the weight has \[32, 2\] blocks of 32"),
    "narrow qzeros": (
        "gptq", change("qzeros", lambda t: t[:, :2]), rf"{Q}.qzeros \[16, 2\]: there are \[64, 2\] scales",
    ),
    "K of no whole groups": (
        "gptq", change("qweight", lambda t: t[:6]),
        rf"{Q}.qweight \[64, 24\]: a stored int4 weight is \[N, K/2\] with K a multiple of 32",
    ),
    "another group": ("awq", say(group_size=64), r"qweight \[64, 48\]: .* with K a multiple of 64"),
    "floats for words": ("gptq", change("qweight", lambda t: t.float()), f"left over: {Q}.qweight"),
    "bytes for words": (
        "gptq", change("qweight", lambda t: t.to(torch.int8)),
        rf"{Q}.qweight .* torch.int8: stored int4 is int32 \[K/8, N\]",
    ),
    "floats for zeros": (
        "awq", change("qzeros", lambda t: t.float()),
        r"qzeros .* torch.float32: stored int4 is int32 \[K/group, N/8\]",
    ),
    "integer scales": ("gptq", change("scales", lambda t: t.to(torch.int16)), "int4 scales are floats"),
    "flat scales": ("awq", change("scales", torch.flatten), r"scales \[128\]: stored scales are \[K/group, N\]"),
    "K of no whole words": ("awq", change("qweight", lambda t: t[:60]), r"stored int4 is int32 \[K, N/8\]"),
    "another shape": (
        CT, change("weight_shape", lambda t: t + 32), rf"{Q}.weight_shape \[96, 3\]: the weight has \[64, 2\]",
    ),
    "no shape": (CT, change("weight_shape", lambda t: t[:1]), "a shape is two integers"),
    # values
    "NaN scales": ("gptq", value(torch.nan), rf"{Q}.scales \[64, 2\]: 128 scales are NaN or Inf"),
    "Inf scales": ("awq", value(torch.inf), rf"{Q}.scales \[64, 2\]: 128 scales are NaN or Inf"),
    "activation order": (
        "gptq", change("g_idx", lambda t: t.flip(0)),
        rf"{Q}.g_idx \[64\]: in activation order \(desc_act\).*desc_act false",
    ),
    "odd order": ("gptq", change("g_idx", lambda t: t.float()), r"g_idx \[64\] torch.float32: groups of K are int32"),
    # config
    "symmetric in config only": (
        "gptq", say(sym=True), r"qzeros \[.*\]: zero points other than 8 \(as \d+\), though the config says symmetric",
    ),
    "zero_point in tensors only": ("awq", say(zero_point=False), "zero points other than 8"),
    "excluded but quantized": (
        "gptq", say(dynamic={"-:.*q_proj": {}}), rf"{Q}.qweight .*: quantized, but the checkpoint's config says bf16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken(saved: Saved, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    method, break_it, message = BROKEN[case]
    folder = tmp_path / "m"
    rewrite(saved("llama"), folder, method, GROUP, symmetric=False)
    break_it(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        tools.canonical(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") >= 1, "what: reason; remedy"
    assert main(["inspect", str(folder)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert any(re.search(message, line) for line in problems), problems


def test_another_version_of_gptq_is_found_where_it_is_symmetric(saved: Saved, tools: Any, tmp_path: Path) -> None:
    rewrite(saved("llama"), tmp_path / "m", "gptq_v2", GROUP, symmetric=True)
    say(checkpoint_format="gptq")(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"qzeros .*: zero points other than 8 \(as 9\).*checkpoint_format"):
        tools.canonical(tmp_path / "m")


def test_zero_points_of_mx_layers_are_left_over(tools: Any) -> None:
    """compressed-tensors mixes formats by group: zero points belong to int4."""
    made = config(CT, GROUP, symmetric=False)
    mx = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    made["config_groups"]["mx"] = {"targets": ["re:.*mlp"], "weights": mx}
    reader = tools.reader_for(made)
    assert reader.recipe.scheme_for("a.mlp.up_proj").name == "w4a16"
    assert reader.recipe.scheme_for(Q).block == GROUP
    tensors = stored(CT, Int4.of(torch.randn(32, 64), GROUP, symmetric=False), symmetric=False)
    with pytest.raises(CheckpointError, match=r"left over: a\.mlp\.up_proj\.weight_zero_point"):
        list(reader.canonical([("a.mlp.up_proj.weight_zero_point", tensors["weight_zero_point"])]))
    with pytest.raises(CheckpointError, match=r"weight_packed \[32, 8\] torch.int32: the config says e2m1"):
        list(reader.canonical([("a.mlp.up_proj.weight_packed", tensors["weight_packed"])]))


class TestOurOwn:
    @pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
    def test_quantize(self, saved: Saved, tools: Any, tmp_path: Path, model_type: str) -> None:
        arguments = [
            "quantize",
            str(saved(model_type)),
            str(tmp_path / "out"),
            "--scheme",
            "int4_w4a16",
            "--group",
            "32",
        ]
        assert main(arguments) == 0
        before, after = load_file(saved(model_type) / "model.safetensors"), tools.canonical(tmp_path / "out")
        ours = tools.dequantized(after)
        assert len(ours) == (14 if model_type == "llama" else 4)
        for module, weight in ours.items():
            source = before[f"{module}.weight"] if model_type == "llama" else before[module].transpose(1, 2)
            assert torch.equal(weight, dequantize_int4(*quantize_int4(source.float(), 32))), module
        assert main(["inspect", str(tmp_path / "out")]) == 0

    def test_recipe_of_both_kinds(self, saved: Saved, tools: Any, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps({"default": "int4_w4a16", "group": 32, "rules": {"*.mlp.*": "mxfp4"}}))
        assert main(["quantize", str(saved("llama")), str(tmp_path / "out"), "--recipe", str(recipe)]) == 0
        after = tools.canonical(tmp_path / "out")
        assert after[f"{Q}.weight_scale"].dtype == torch.int32
        assert after["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.uint8

    @pytest.mark.parametrize(
        ("shapes", "tp", "group"),
        [
            ({"q_proj": (32, 256), "down_proj": (32, 384)}, 1, 128),
            ({"q_proj": (32, 256), "down_proj": (32, 384)}, 2, 64),  # 192 on a rank
            ({"q_proj": (32, 256), "experts.0.w2": (32, 384)}, 2, 128),  # dealt in whole groups
            ({"q_proj": (32, 2880), "down_proj": (32, 384)}, 1, 64),
            ({"q_proj": (32, 128), "down_proj": (32, 96)}, 1, 32),
        ],
    )
    def test_the_largest_group_that_divides_every_k(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        shapes: dict[str, tuple[int, int]],
        tp: int,
        group: int,
    ) -> None:
        (tmp_path / "in").mkdir()
        tensors = {f"model.layers.0.mlp.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "in" / "model.safetensors")
        (tmp_path / "in" / "config.json").write_text("{}")
        out = str(tmp_path / "out")
        assert main(["quantize", str(tmp_path / "in"), out, "--scheme", "int4_w4a16", "--tp", str(tp)]) == 0
        assert f"quantized: 2 int4_w4a16, in groups of {group}\n" in capsys.readouterr().out
        written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert written["recipe"]["group"] == group
        assert main(["inspect", out]) == 0
        assert capsys.readouterr().out.count(f"int4_w4a16, group {group} ") == 2

    def test_written_before_groups_were_always_recorded(self, tools: Any) -> None:
        """A checkpoint of ours without a group holds groups of 128; a recipe written by hand has yet to get one."""
        given = {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "int4_w4a16"}}
        assert tools.reader_for(given | {"checked": True}).recipe.group == 128
        assert tools.reader_for(given).recipe.group is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--scheme", "int4_w4a16", "--group", "128"],
                "is not a multiple of 128, the int4 group; take a smaller --group, or",
            ),
            (["--scheme", "mxfp4", "--group", "32"], "--group 32: scheme mxfp4 makes no int4"),
            (
                ["--scheme", "int4_w4a16", "--tp", "2"],
                "down_proj [64, 96]: K=96 over 2 ranks is not a multiple of 32, the int4 group; lower --tp, or keep",
            ),
            (["--scheme", "keep", "--tp", "2"], "--tp: --scheme keep quantizes nothing"),
            (["--scheme", "keep", "--group", "32"], "--group: --scheme keep quantizes nothing"),
        ],
    )
    def test_errors(
        self, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert main(["quantize", str(saved("llama")), str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_nan_words_are_found(self, tools: Any) -> None:
        data, scales = quantize_int4(torch.randn(32, 64), 32)
        scales[3, 1] = torch.nan
        reader = tools.reader_for(
            {"quant_method": "amd_mx", "version": 1, "recipe": Recipe(default="int4_w4a16", group=32).to_dict()}
        )
        tensors = [(f"{Q}.weight", data), (f"{Q}.weight_scale", group_words(scales))]
        assert split_words(tensors[1][1])[0].isnan().sum() == 1
        with pytest.raises(CheckpointError, match=rf"{Q}.weight_scale \[32, 2\]: 1 scales are NaN or Inf"):
            list(reader.canonical(tensors))
