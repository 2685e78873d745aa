"""Quark's checkpoints, written by amd-quark; what we decode must be what amd-quark dequantizes to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.schemes import ScaleMode

K = 32


@pytest.fixture(scope="module")
def specs(quark: Any) -> dict[str, Any]:
    from quark.torch.quantization.config.config import (
        FP8E4M3PerTensorSpec,
        OCP_MXFP4Spec,
        OCP_MXFP8E4M3Spec,
        QConfig,
        QLayerConfig,
    )

    def mx(spec: Any, mode: str = "even") -> QLayerConfig:
        weight = spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
        return QLayerConfig(
            weight=weight,
            input_tensors=spec(ch_axis=-1, is_dynamic=True, scale_calculation_mode=mode).to_quantization_spec(),
        )

    fp8 = FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False).to_quantization_spec()
    mxfp4, mxfp8 = mx(OCP_MXFP4Spec), mx(OCP_MXFP8E4M3Spec)
    w4a8 = QLayerConfig(weight=mxfp4.weight, input_tensors=fp8)
    mixed = {"*self_attn*": mxfp8, "model.layers.1.mlp.down_proj": w4a8}
    return {
        "mxfp4": QConfig(global_quant_config=mxfp4, exclude=["lm_head"]),
        "mxfp4 floor": QConfig(global_quant_config=mx(OCP_MXFP4Spec, "floor"), exclude=["lm_head"]),
        "mxfp8": QConfig(global_quant_config=mxfp8, exclude=["lm_head"]),
        "w4a8": QConfig(global_quant_config=w4a8, exclude=["lm_head"]),
        "w4a16": QConfig(global_quant_config=QLayerConfig(weight=mxfp4.weight), exclude=["lm_head"]),
        "mixed": QConfig(
            global_quant_config=mxfp4, layer_quant_config=mixed, exclude=["lm_head", "*layers.0.self_attn*"]
        ),
        "all": QConfig(global_quant_config=mxfp4),
        "fp8 per tensor": QConfig(global_quant_config=QLayerConfig(weight=fp8, input_tensors=fp8)),
    }


@pytest.fixture(scope="module")
def export(
    quark: Any, specs: dict[str, Any], tools: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(model_type, name of a spec) -> folder written by amd-quark."""
    import quark.torch.kernel.hw_emulation.hw_emulation_interface as emulation
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.utils.llm.model_preparation import preprocess_for_quantization

    real = emulation.DTYPE_TO_REAL_QUANTIZE_FUNCS["fp8_e4m3"]

    def with_groups(inputs: torch.Tensor, scale: Any = None, qscheme: Any = None, **rest: Any) -> torch.Tensor:
        """amd-quark 0.13 has an MXFP8 spec and observer, but raises on casting e4m3 per group: cast each group as a
        channel, which it can."""
        if qscheme != "per_group":
            return real(inputs, scale=scale, qscheme=qscheme, **rest)
        channels = {"scale": scale.reshape(-1), "qscheme": "per_channel", "axis": 0, "group_size": None}
        return real(inputs.reshape(-1, K), **(rest | channels)).reshape(inputs.shape)

    made: dict[tuple[str, str], Path] = {}

    def make(model_type: str, spec: str) -> Path:
        if (model_type, spec) not in made:
            folder = tmp_path_factory.mktemp("quark")
            model = tools.tiny_model(model_type)
            preprocess_for_quantization(model)
            quantizer = ModelQuantizer(specs[spec])
            samples = torch.utils.data.DataLoader([torch.arange(i, 64, 3) for i in range(2)], batch_size=1)
            model = quantizer.freeze(quantizer.quantize_model(model, samples))
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setitem(emulation.DTYPE_TO_REAL_QUANTIZE_FUNCS, "fp8_e4m3", with_groups)
                export_safetensors(model, str(folder))
            made[model_type, spec] = folder
        return made[model_type, spec]

    return make


def by_quark(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """amd-quark's own unpacking and dequantization, as its StaticScaledRealQuantizer.forward does."""
    import quark.torch.kernel
    from quark.torch.utils.pack import create_pack_method

    factors = 2 ** (scale.to(torch.int16) - 127).to(torch.float32)
    if weight.dtype == torch.uint8:
        values = create_pack_method(qscheme="per_group", dtype="fp4").unpack(weight, True)
        return quark.torch.kernel.dequantize("fp4", values, factors, None, -1, K, "per_group")
    blocks = weight.reshape(-1, K)  # as channels: see `with_groups`
    flat = quark.torch.kernel.dequantize("fp8_e4m3", blocks, factors.reshape(-1), None, 0, -1, "per_channel")
    return flat.reshape(weight.shape)


@pytest.mark.parametrize(
    ("model_type", "spec", "modules"),
    [
        pytest.param("llama", "mxfp4", 14, id="mxfp4"),
        pytest.param("llama", "mxfp8", 14, id="mxfp8"),
        pytest.param("llama", "w4a8", 14, id="w4a8-static"),
        pytest.param("llama", "w4a16", 14, id="w4a16"),
        pytest.param("llama", "mixed", 10, id="mixed"),
        pytest.param("qwen3_moe", "w4a8", 8 + 2 * 4 * 3, id="experts"),
    ],
)
def test_decodes_as_quark(export: Callable[..., Path], tools: Any, model_type: str, spec: str, modules: int) -> None:
    from safetensors.torch import load_file

    folder = export(model_type, spec)
    stored = load_file(folder / "model.safetensors")
    ours = tools.dequantized(tools.canonical(folder))
    assert len(ours) == modules
    for module, weight in ours.items():
        assert torch.equal(weight, by_quark(stored[f"{module}.weight"], stored[f"{module}.weight_scale"])), module


def test_mixed_recipe(export: Callable[..., Path], tools: Any) -> None:
    config = json.loads((export("llama", "mixed") / "config.json").read_text())
    reader = tools.reader_for(config["quantization_config"])
    names = {
        "model.layers.0.self_attn.q_proj": None,
        "model.layers.1.self_attn.q_proj": "mxfp8",
        "model.layers.0.mlp.down_proj": "mxfp4",
        "model.layers.1.mlp.down_proj": "w4a8",
        "lm_head": None,
    }
    for name, scheme in names.items():
        found = reader.recipe.scheme_for(name)
        assert (found.name if found else None) == scheme, name
    assert [reader.static_input(name) for name in names] == [False, False, False, True, False]


def test_static_input_scales(export: Callable[..., Path], tools: Any) -> None:
    from safetensors.torch import load_file

    folder = export("llama", "w4a8")
    name = "model.layers.1.mlp.down_proj.input_scale"
    scale = tools.canonical(folder)[name]
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    assert scale == load_file(folder / "model.safetensors")[name].float()


def test_scale_mode(export: Callable[..., Path], tools: Any) -> None:
    for spec, mode in (("mxfp4", ScaleMode.EVEN), ("mxfp4 floor", ScaleMode.FLOOR)):
        config = json.loads((export("llama", spec) / "config.json").read_text())
        assert tools.reader_for(config["quantization_config"]).scale_mode["e2m1"] is mode


def test_gpt_oss_experts_are_stacked(export: Callable[..., Path], tools: Any) -> None:
    """Quark writes gpt-oss expert by expert; SGLang loads it fused, [E, 2I, H/2], rows still interleaved."""
    from safetensors.torch import load_file

    folder = export("gpt_oss", "w4a8")
    stored = load_file(folder / "model.safetensors")
    tensors = tools.canonical(folder)
    stem = "model.layers.1.mlp.experts"
    for proj in ("gate_up_proj", "down_proj"):
        for leaf, suffix in {
            "weight": "",
            "weight_scale": "_scale",
            "input_scale": "_input_scale",
            "bias": "_bias",
        }.items():
            stacked = tensors[f"{stem}.{proj}{suffix}"]
            assert stacked.shape[0] == 4
            for e in range(4):
                assert torch.equal(stacked[e], stored[f"{stem}.{e}.{proj}.{leaf}"].to(stacked.dtype))
    assert not any(".experts.0." in name for name in tensors)


def test_quantized_lm_head_is_dequantized(export: Callable[..., Path], tools: Any) -> None:
    """Without an exclude list Quark quantizes lm_head too, which runs in bf16 here: the same values, exactly."""
    from safetensors.torch import load_file

    folder = export("llama", "all")
    stored = load_file(folder / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.uint8
    head = tools.canonical(folder)["lm_head.weight"]
    assert head.dtype == torch.bfloat16
    assert torch.equal(head.float(), by_quark(stored["lm_head.weight"], stored["lm_head.weight_scale"]))


def test_kv_cache_scales_pass(specs: dict[str, Any], tools: Any) -> None:
    """SGLang reads them itself, under Quark's names."""
    config = specs["mxfp4"].to_dict() | {"quant_method": "quark"}
    k_proj = "model.layers.0.self_attn.k_proj"
    stored = {
        f"{k_proj}.weight": torch.zeros(32, 32, dtype=torch.uint8),
        f"{k_proj}.weight_scale": torch.zeros(32, 2, dtype=torch.uint8),
        f"{k_proj}.output_scale": torch.tensor(0.5),
    }
    assert set(dict(tools.reader_for(config).canonical(stored.items()))) == set(stored)


def test_fp8_per_tensor_is_refused(specs: dict[str, Any], tools: Any) -> None:
    config = specs["fp8 per tensor"].to_dict() | {"quant_method": "quark"}
    with pytest.raises(CheckpointError, match=r"global_quant_config.weight: no MX weights \(dtype fp8_e4m3"):
        tools.reader_for(config)
