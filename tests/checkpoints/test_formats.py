"""gpt-oss, compressed-tensors, ModelOpt and mxfp8 checkpoints against the packages that define them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_amd_quant.errors import CheckpointError


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TestGptOss:
    """Names and shapes as of the released openai/gpt-oss-20b and transformers' `Mxfp4GptOssExperts`."""

    E, H, I = 3, 64, 96  # noqa: E741

    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        stem = "model.layers.0.mlp.experts"
        made: dict[str, torch.Tensor] = {"model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64).bfloat16()}
        for proj, n, k in (("gate_up_proj", 2 * self.I, self.H), ("down_proj", self.H, self.I)):
            made[f"{stem}.{proj}_blocks"] = torch.randint(0, 256, (self.E, n, k // 32, 16), dtype=torch.uint8)
            made[f"{stem}.{proj}_scales"] = torch.randint(110, 130, (self.E, n, k // 32), dtype=torch.uint8)
            made[f"{stem}.{proj}_bias"] = torch.randn(self.E, n).bfloat16()
        return made

    @pytest.fixture
    def folder(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
        excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": excluded}
        return write(tmp_path, tensors, {"model_type": "gpt_oss", "quantization_config": quantization})

    def test_decodes_as_transformers(self, folder: Path, tensors: dict[str, torch.Tensor], tools: Any) -> None:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        canonical = tools.canonical(folder)
        for module, weight in tools.dequantized(canonical).items():
            theirs = convert_moe_packed_tensors(tensors[f"{module}_blocks"], tensors[f"{module}_scales"])
            assert torch.equal(weight.bfloat16(), theirs.transpose(1, 2)), module
            assert torch.equal(canonical[f"{module}_bias"], tensors[f"{module}_bias"])
        assert len(tools.dequantized(canonical)) == 2

    def test_recipe(self, folder: Path, tools: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        recipe = tools.reader_for(config["quantization_config"]).recipe
        assert recipe.scheme_for("model.layers.7.mlp.experts.gate_up_proj").name == "w4a16"
        for module in ("model.layers.7.self_attn.q_proj", "model.layers.7.mlp.router", "lm_head"):
            assert recipe.scheme_for(module) is None


class TestCompressedTensors:
    @pytest.fixture(scope="class")
    def export(self, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams

        made: dict[str, Path] = {}

        def make(preset: str) -> Path:
            if preset not in made:
                made[preset] = tmp_path_factory.mktemp(preset)
                model = tools.tiny_model("llama")
                groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
                ignore = ["lm_head", "re:.*layers.0.self_attn"]
                apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=ignore))
                for module in model.modules():
                    if hasattr(module, "weight_scale"):
                        blocks = module.weight.detach().float().unflatten(-1, (-1, 32))
                        args = module.quantization_scheme.weights
                        module.weight_scale.data.copy_(calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)[0])
                compressor = ModelCompressor.from_pretrained_model(model)
                compressor.compress_model(model)
                model.save_pretrained(made[preset])
                compressor.update_config(made[preset])
            return made[preset]

        return make

    @pytest.mark.parametrize(
        ("preset", "scheme", "data"),
        [
            ("MXFP4", "mxfp4", "weight_packed"),
            ("MXFP4A16", "w4a16", "weight_packed"),
            ("MXFP8", "mxfp8", "weight"),
        ],
    )
    def test_decodes_as_its_compressor(
        self, export: Callable[[str], Path], tools: Any, preset: str, scheme: str, data: str
    ) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        folder = export(preset)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        group = QuantizationScheme(**config["config_groups"]["group_0"])
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        stored = load_file(folder / "model.safetensors")
        ours = tools.dequantized(tools.canonical(folder))
        assert len(ours) == 10
        for module, weight in ours.items():
            state = {data: stored[f"{module}.{data}"], "weight_scale": stored[f"{module}.weight_scale"]}
            assert torch.equal(weight, compressor.decompress(state, group)["weight"].float()), module
        recipe = tools.reader_for(config).recipe
        assert recipe.scheme_for("model.layers.1.self_attn.q_proj").name == scheme
        assert recipe.scheme_for("model.layers.0.self_attn.q_proj") is None

    @pytest.mark.parametrize(
        ("ignore", "module", "kept"),
        [
            ("re:.*self_attn", "model.layers.0.self_attn.q_proj", True),  # re: matches at the start, not in full
            ("re:.*self_attn$", "model.layers.0.self_attn.q_proj", False),
            ("self_attn", "model.layers.0.self_attn.q_proj", False),  # a plain name matches in full
            ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ],
    )
    def test_ignore_matches_as_the_package_does(self, tools: Any, ignore: str, module: str, kept: bool) -> None:
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        from compressed_tensors.utils.match import match_name

        group = json.loads(preset_name_to_scheme("MXFP8", ["Linear"]).model_dump_json())
        config = {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": [ignore]}
        assert match_name(module, ignore) == kept
        assert (tools.reader_for(config).recipe.scheme_for(module) is None) == kept

    def test_exact_targets_go_before_patterns_before_the_class(self, tools: Any) -> None:
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

        groups = {
            name: json.loads(preset_name_to_scheme(name, targets).model_dump_json())
            for name, targets in {"MXFP4": ["Linear"], "MXFP8": ["re:.*mlp"], "MXFP4A16": ["a.mlp.down_proj"]}.items()
        }
        recipe = tools.reader_for({"quant_method": "compressed-tensors", "config_groups": groups}).recipe
        names = ("a.mlp.down_proj", "a.mlp.up_proj", "a.self_attn.q_proj")
        assert [recipe.scheme_for(name).name for name in names] == ["w4a16", "mxfp8", "mxfp4"]

    @pytest.mark.parametrize("preset", ["MXFP8A16", "NVFP4", "FP8", "W8A16", "W4A8"])
    def test_other_presets_are_refused(self, tools: Any, preset: str) -> None:
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

        group = json.loads(preset_name_to_scheme(preset, ["Linear"]).model_dump_json())
        with pytest.raises(CheckpointError, match=r"config_groups\.g.*amd-mx quantize"):
            tools.reader_for({"quant_method": "compressed-tensors", "config_groups": {"g": group}})


class TestModelOpt:
    @pytest.fixture(scope="class")
    def export(self, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        made: dict[str, Path] = {}

        def make(model_type: str) -> Path:
            if model_type not in made:
                made[model_type] = tmp_path_factory.mktemp("modelopt")
                model = tools.tiny_model(model_type)
                mtq.quantize(model, mtq.MXFP8_DEFAULT_CFG, forward_loop=lambda m: m(torch.arange(64)[None]))
                export_hf_checkpoint(model, export_dir=made[model_type])
            return made[model_type]

        return make

    @pytest.mark.parametrize(("model_type", "modules"), [("llama", 14), ("qwen3_moe", 8 + 2 * 4 * 3)])
    def test_mxfp8(self, export: Callable[[str], Path], tools: Any, model_type: str, modules: int) -> None:
        from modelopt.torch.quantization.qtensor import MXFP8QTensor

        folder = export(model_type)
        stored = load_file(folder / "model.safetensors")
        ours = tools.dequantized(tools.canonical(folder))
        assert len(ours) == modules
        for module, weight in ours.items():
            data = stored[f"{module}.weight"]
            theirs = MXFP8QTensor(data.shape, torch.float32, data).dequantize(scale=stored[f"{module}.weight_scale"])
            assert torch.equal(weight, theirs), module

    def test_both_config_files(self, export: Callable[[str], Path], tools: Any) -> None:
        folder = export("qwen3_moe")
        flat = tools.reader_for(json.loads((folder / "config.json").read_text())["quantization_config"])
        nested = tools.reader_for(json.loads((folder / "hf_quant_config.json").read_text()))
        assert flat.recipe == nested.recipe
        assert flat.recipe.scheme_for("model.layers.0.mlp.gate") is None
        assert flat.recipe.scheme_for("model.layers.0.mlp.experts.0.gate_proj").name == "mxfp8"

    def test_mixed_precision(self, tools: Any) -> None:
        config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
        reader = tools.reader_for(config | {"quantized_layers": {"a.q_proj": {"quant_algo": "MXFP8"}}})
        assert reader.recipe.scheme_for("a.q_proj").name == "mxfp8"
        assert reader.recipe.scheme_for("a.up_proj") is None
        with pytest.raises(CheckpointError, match=r"quant_algo of 'a\.q_proj': FP8, not one of"):
            tools.reader_for(config | {"quantized_layers": {"a.q_proj": {"quant_algo": "FP8"}}})

    def test_as_sglang_hands_it_over(self, export: Callable[[str], Path], tools: Any) -> None:
        """SGLang's ModelConfig rewrites this config to `quant_method: mxfp8`; the tensors keep ModelOpt's names."""
        from sglang.srt.configs.model_config import ModelConfig

        folder = export("qwen3_moe")
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        parsed = config | ModelConfig._parse_modelopt_quant_config(None, {"quantization": config})
        assert parsed["quant_method"] == "mxfp8"
        rewritten = dict(tools.reader_for(parsed).canonical(load_file(folder / "model.safetensors").items()))
        expected = tools.canonical(folder)
        assert set(rewritten) == set(expected)
        assert all(torch.equal(rewritten[n].view(torch.uint8), expected[n].view(torch.uint8)) for n in expected)
        assert tools.reader_for(parsed).recipe.scheme_for("model.layers.0.mlp.gate") is None

    def test_nvfp4_is_refused(self, tools: Any) -> None:
        with pytest.raises(CheckpointError, match="NVFP4, not one of MXFP8"):
            tools.reader_for({"quant_method": "modelopt", "quant_algo": "NVFP4"})


class TestMxfp8:
    """Written here after sglang 0.5.23 `fp8.py` (weight_scale_inv, uint8); quantized by ModelOpt."""

    def test_decodes(self, tmp_path: Path, tools: Any) -> None:
        from modelopt.torch.quantization.qtensor import MXFP8QTensor

        torch.manual_seed(2)
        weight = torch.randn(48, 96)
        quantized, scale = MXFP8QTensor.quantize(weight)
        tensors = {
            "model.layers.0.mlp.down_proj.weight": quantized._quantized_data,
            "model.layers.0.mlp.down_proj.weight_scale_inv": scale,
            "model.layers.0.mlp.gate.weight": torch.randn(4, 96).bfloat16(),
        }
        config = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic"}
        folder = write(tmp_path, tensors, {"quantization_config": config})
        (ours,) = tools.dequantized(tools.canonical(folder)).values()
        assert torch.equal(ours, quantized.dequantize(torch.float32, scale=scale))

    @pytest.mark.parametrize("ignored", ["mlp.gate_up_proj", "mlp", "model.layers.0.mlp", "layers.0"])
    def test_ignored_layers_match_as_sglang_does(self, tools: Any, ignored: str) -> None:
        from sglang.srt.layers.quantization.utils import _module_path_match

        recipe = tools.reader_for({"quant_method": "mxfp8", "ignored_layers": [ignored]}).recipe
        for module in ("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.fc"):
            assert (recipe.scheme_for(module) is None) == _module_path_match(ignored, module), (ignored, module)

    def test_one_scale_under_two_names(self, tools: Any) -> None:
        scales = [
            (f"a.q_proj.{name}", torch.ones(4, 1, dtype=torch.uint8)) for name in ("weight_scale", "weight_scale_inv")
        ]
        with pytest.raises(CheckpointError, match=r"weight_scale_inv: says what a\.q_proj\.weight_scale says already"):
            list(tools.reader_for({"quant_method": "mxfp8"}).canonical(scales))

    def test_other_blocks_are_refused(self, tools: Any) -> None:
        with pytest.raises(CheckpointError, match="weight_block_size"):
            tools.reader_for({"quant_method": "mxfp8", "weight_block_size": [128, 128]})


@pytest.mark.parametrize("method", ["fp8", "hqq", None])
def test_unknown_formats_name_the_known_ones(tools: Any, method: str | None) -> None:
    with pytest.raises(
        CheckpointError, match="no reader for this format; give a bf16 checkpoint or one of amd_mx, quark"
    ):
        tools.reader_for({"quant_method": method})


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "quark", "global_quant_config": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"g": "MXFP4"}},
        {"quant_method": "modelopt", "quantization": "MXFP8"},
    ],
)
def test_malformed_configs_are_one_line(tools: Any, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not as that format writes it"):
        tools.reader_for(config)
