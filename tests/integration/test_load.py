"""Whole checkpoints through SGLang's own loader: ours and foreign formats, online quantization, and broken ones."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_amd_quant.cli.main import main
from sglang_amd_quant.errors import AmdMxError, CheckpointError, RecipeError, UnsupportedError
from sglang_amd_quant.formats import quantize_mx
from sglang_amd_quant.schemes import ScaleMode
from tests.int4_files import rewrite as rewrite_int4

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2}
MODELS = {
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 96}),
    "mixtral": ("Mixtral", {**EXPERTS, "num_local_experts": 4}),
    "gpt_oss": ("GptOss", {**EXPERTS, "num_local_experts": 4, "sliding_window": 32}),
}
UNASKED = ("StableLm", {})
"""SGLang gives this one's attention no quantization method."""


@pytest.fixture(scope="session")
def originals(sglang_context, tmp_path_factory):
    """A tiny bf16 checkpoint of each architecture, written by transformers."""
    import transformers

    folders = {}
    for name, (prefix, extra) in {**MODELS, "stablelm": UNASKED}.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**SIZES, **extra)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).bfloat16()
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def rewrite(source, target, change, quantization_config):
    """Copy a checkpoint, passing its tensors through `change(dict) -> dict`."""
    config = json.loads((source / "config.json").read_text())
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (target / "config.json").write_text(json.dumps(config))
    tensors = change(load_file(source / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def without(name):
    """A `change` that leaves one tensor out."""
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def linears(tensors):
    keep = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "moe.gate.", "router")
    return [n for n in tensors if n.endswith(".weight") and tensors[n].dim() == 2 and not any(k in n for k in keep)]


def quark(tensors):
    for name in linears(tensors):
        tensors[name], tensors[f"{name}_scale"] = quantize_mx(tensors[name], "e2m1", ScaleMode.EVEN)
    return tensors


QUARK = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1},
        "input_tensors": {
            "dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1,
            "is_dynamic": True,
        },
    },
    "exclude": ["lm_head", "*.mlp.gate"],
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
}  # fmt: skip


def gpt_oss(tensors):
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        data, scales = quantize_mx(tensors.pop(name).transpose(1, 2), "e2m1", ScaleMode.EVEN)
        tensors[f"{name}_blocks"] = data.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = scales
    return tensors


GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def parameters(model):
    return {
        name: p.detach().view(torch.uint8) if p.element_size() == 1 else p.detach()
        for name, p in model.named_parameters()
    }


def same(got, want):
    got, want = parameters(got), parameters(want)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ["amd_mxfp4", "amd_mxfp8"])
def test_online(originals, load_model, name, scheme):
    model = load_model(originals[name], scheme)
    held = [n for n, m in model.named_modules() if hasattr(m, "weight_scale") or hasattr(m, "w2_weight_scale")]
    attention = {"qkv_proj", "o_proj"} if name != "gpt_oss" else set()  # SGLang gives gpt-oss's attention no method
    mlp = {"gate_up_proj", "down_proj"} if name == "qwen3" else {"experts"}
    assert {n.rpartition(".")[2] for n in held} == attention | mlp
    stored = [p for n in held for part, p in model.get_submodule(n).named_parameters() if "bias" not in part]
    assert all(p.element_size() == 1 for p in stored)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "w4a8", "w4a16"])
def test_written_by_amd_mx_quantize(originals, load_model, tmp_path, name, scheme):
    """Needs no flag, and is bit for bit what online quantization of the source is: weights, methods and activations."""
    written = tmp_path / "written"
    assert main(["quantize", str(originals[name]), str(written), "--scheme", scheme]) == 0
    got, want = load_model(written), load_model(originals[name], f"amd_{scheme}")
    same(got, want)
    assert schemes(got) == schemes(want)
    assert set(schemes(want).values()) == {scheme}


@pytest.fixture
def int4_recipe(tmp_path):
    """A file that asks for int4 in the largest group that 64 and 96 columns allow."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"default": "int4_w4a16", "group": 32}))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_int4_written_and_online(originals, load_model, tmp_path, int4_recipe, monkeypatch, name):
    written = tmp_path / "written"
    assert main(["quantize", str(originals[name]), str(written), "--recipe", str(int4_recipe)]) == 0
    got = load_model(written)
    monkeypatch.setenv("SGLANG_AMD_MX_RECIPE", str(int4_recipe))
    want = load_model(originals[name], "amd_mx")
    same(got, want)
    assert schemes(got) == schemes(want)
    assert set(schemes(want).values()) == {"int4_w4a16"}


def test_int4_by_name_takes_the_group_that_each_k_allows(originals, load_model):
    layer = load_model(originals["qwen3"], "amd_int4_w4a16").model.layers[0]
    assert layer.mlp.gate_up_proj.weight_scale.shape == (192, 1)  # K = 64
    assert layer.mlp.down_proj.weight_scale.shape == (64, 3)  # K = 96


def test_int4_by_name_is_what_is_written_where_one_group_serves_all(originals, load_model, tmp_path):
    written = tmp_path / "written"
    assert main(["quantize", str(originals["gpt_oss"]), str(written), "--scheme", "int4_w4a16"]) == 0
    same(load_model(written), load_model(originals["gpt_oss"], "amd_int4_w4a16"))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "mixtral"])
def test_int4_checkpoints(originals, load_model, tmp_path, name, method, symmetric):
    """A model in fp16, as these formats have them: every layer computes with the numbers that were packed."""
    layers = rewrite_int4(originals[name], tmp_path / "m", method, 32, symmetric)
    model = load_model(tmp_path / "m", "amd_mx")
    assert set(schemes(model).values()) == {"int4_w4a16"}
    assert model.lm_head.weight.dtype == torch.float16
    layer = model.model.layers[0]
    stem = "model.layers.0"
    attention = torch.cat([layers[f"{stem}.self_attn.{part}_proj"].values for part in "qkv"])
    assert torch.equal(layer.self_attn.qkv_proj.amd_mx.values(), attention)
    x = torch.randn(3, 64).half()
    out = layer.self_attn.qkv_proj.quant_method.apply(layer.self_attn.qkv_proj, x)
    # fp32 sums of 64 products, rounded once: at most one step of fp16 beside the exact sum, rounded
    torch.testing.assert_close(out, (x.double() @ attention.double().T).half(), rtol=2**-10, atol=2**-16)
    if name == "qwen3":
        mlp = torch.cat([layers[f"{stem}.mlp.{part}_proj"].values for part in ("gate", "up")])
        assert torch.equal(layer.mlp.gate_up_proj.amd_mx.values(), mlp)
        return
    experts, parts = ("mlp", ("gate_proj", "up_proj", "down_proj")) if name == "qwen3_moe" else (
        "block_sparse_moe", ("w1", "w3", "w2")
    )  # fmt: skip
    moe = getattr(layer, experts).experts.amd_mx
    for expert in range(4):
        gate, up, down = (layers[f"{stem}.{experts}.experts.{expert}.{part}"].values for part in parts)
        assert torch.equal(moe.values[0](expert), torch.cat([gate, up]))
        assert torch.equal(moe.values[1](expert), down)


def test_int4_lm_head(originals, load_model, tmp_path):
    """`lm_head: true`: SGLang runs it unquantized, with the numbers that were packed."""
    from tests.int4_files import Int4, stored

    rewrite_int4(originals["qwen3"], tmp_path, "gptq", 32, symmetric=False, lm_head=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = Int4.of(tensors.pop("lm_head.weight"), 32, symmetric=False)
    tensors |= {f"lm_head.{end}": t for end, t in stored("gptq", head, symmetric=False).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(tmp_path, "amd_mx").lm_head.weight, head.values.half())


def test_a_checkpoints_group_is_the_one(originals, load_model, tmp_path, monkeypatch):
    """A recipe of one's own may leave layers out, but says nothing of the group that is stored."""
    rewrite_int4(originals["qwen3"], tmp_path / "m", "awq", 32, symmetric=False)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"default": "int4_w4a16"}))
    monkeypatch.setenv("SGLANG_AMD_MX_RECIPE", str(recipe))
    assert load_model(tmp_path / "m", "amd_mx").model.layers[0].mlp.down_proj.weight_scale.shape == (64, 3)


def schemes(model):
    methods = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
    return {name: method.scheme.name for name, method in methods.items() if hasattr(method, "scheme")}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "mixtral"])
def test_quark(originals, load_model, name, tmp_path):
    folder = rewrite(originals[name], tmp_path, quark, QUARK)
    same(load_model(folder, "amd_mx"), load_model(originals[name], "amd_mxfp4"))


def test_gpt_oss(originals, load_model, tmp_path, monkeypatch):
    """Experts come packed, attention in bf16; the online twin is told so by a recipe."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"default": "bf16", "rules": {"*.experts.*": "w4a16"}}))
    (tmp_path / "model").mkdir()
    folder = rewrite(originals["gpt_oss"], tmp_path / "model", gpt_oss, GPT_OSS)
    got = load_model(folder, "amd_mx")
    monkeypatch.setenv("SGLANG_AMD_MX_RECIPE", str(recipe))
    want = load_model(originals["gpt_oss"], "amd_mx")
    assert got.model.layers[0].mlp.experts.w13_weight_scale.shape == (4, 192, 2)
    same(got, want)


def test_recipe_in_config_json_of_a_bf16_checkpoint(originals, load_model, tmp_path):
    recipe = {"default": "mxfp8", "rules": {"*.o_proj": "bf16", "*.experts.*": "w4a8"}}
    config = {"quant_method": "amd_mx", "version": 1, "recipe": recipe}
    model = load_model(rewrite(originals["qwen3_moe"], tmp_path, dict, config))
    layer = model.model.layers[0]
    assert layer.self_attn.o_proj.weight.dtype == torch.bfloat16
    assert layer.self_attn.qkv_proj.weight.dtype == torch.float8_e4m3fn
    assert layer.mlp.experts.w13_weight.dtype == torch.uint8


def test_layers_that_sglang_asks_no_method_for(originals, load_model, tmp_path, monkeypatch, caplog):
    """They are told, not served in bf16 in silence; a rule that leaves them so is none too many."""
    load_model(originals["stablelm"], "amd_w4a16")
    told = (
        r"1 o_proj, 1 qkv_proj stay bf16, as SGLang builds them without asking for a method; the first is model\.layers"
    )
    assert re.search(told, caplog.text)
    caplog.clear()
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"default": "w4a16", "rules": {"*.self_attn.*": "bf16"}}))
    monkeypatch.setenv("SGLANG_AMD_MX_RECIPE", str(recipe))
    load_model(originals["stablelm"], "amd_mx")
    assert "without asking" not in caplog.text
    recipe.write_text(json.dumps({"default": "bf16", "rules": {"*.o_proj": "w4a16"}}))
    with pytest.raises(
        RecipeError, match=r"gives w4a16 to model\.layers\.0\.self_attn\.o_proj, which always stays bf16"
    ):
        load_model(originals["stablelm"], "amd_mx")


def test_quantized_layers_that_sglang_asks_no_method_for(originals, load_model, tmp_path):
    folder = rewrite(originals["stablelm"], tmp_path, quark, QUARK)
    match = (
        r'layer model\.layers\.0\.self_attn\.\w+: .*without asking for a method; .*"model\.\S+\.[qkvo]_proj": "bf16"'
    )
    with pytest.raises(UnsupportedError, match=match):
        load_model(folder, "amd_mx")


Q = "model.layers.0.self_attn.q_proj.weight"


def with_tensor(name, change):
    def apply(tensors):
        tensors = quark(tensors)
        value = change(tensors)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        return tensors

    return apply


BROKEN = {
    "missing scales": (with_tensor(f"{Q}_scale", lambda t: None), r"q_proj"),
    "missing weight": (with_tensor(Q, lambda t: None), r"q_proj"),
    "NaN scale": (with_tensor(f"{Q}_scale", lambda t: torch.full_like(t[f"{Q}_scale"], 255)), r"q_proj"),
    "narrow weight": (with_tensor(Q, lambda t: t[Q][:, :16]), r"qkv_proj"),
    "short weight": (with_tensor(Q, lambda t: t[Q][:32]), r"q"),
    "wrong dtype": (with_tensor(Q, lambda t: t[Q].float()), r"qkv_proj"),
    "unknown tensor": (with_tensor(f"{Q}_zero_point", lambda t: torch.zeros(1)), r"q_proj\.weight_zero_point"),
    "narrow scales": (with_tensor(f"{Q}_scale", lambda t: t[f"{Q}_scale"][:, :1]), r"q_proj"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_give_one_line(originals, load_model, tmp_path, case):
    change, match = BROKEN[case]
    folder = rewrite(originals["qwen3"], tmp_path, change, QUARK)
    with pytest.raises(AmdMxError, match=match) as error:
        load_model(folder, "amd_mx")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [QUARK, {"quant_method": "awq", "bits": 4, "group_size": 32}], ids=["quark", "awq"])
def test_a_config_that_survived_dequantizing(originals, load_model, tmp_path, config):
    """bf16 tensors under a config that says they are quantized: nobody asked for quantizing them here."""
    folder = rewrite(originals["qwen3"], tmp_path, dict, config)
    with pytest.raises(
        CheckpointError, match=r"q_proj.*: stored unquantized, but .* says quantized and nothing is; take"
    ):
        load_model(folder, "amd_mx")


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_quantized_weights_that_no_config_tells_of(originals, load_model, tmp_path, name):
    assert main(["quantize", str(originals[name]), str(tmp_path / "m"), "--scheme", "mxfp8"]) == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_proj.* torch\.float8_e4m3fn: quantized, though config\.json has no"):
        load_model(tmp_path / "m", "amd_mx")


def test_truncated_file(originals, load_model, tmp_path):
    folder = rewrite(originals["qwen3"], tmp_path, quark, QUARK)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = r"model\.safetensors: truncated: \d+ bytes where its header tells of \d+"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, "amd_mx")


@pytest.mark.parametrize("bias", ["gate_up_proj_bias", "down_proj_bias"])
def test_missing_expert_bias(originals, load_model, tmp_path, bias):
    folder = rewrite(originals["gpt_oss"], tmp_path, without(f"model.layers.0.mlp.experts.{bias}"), None)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.experts\.w\d+: \d+ of \d+ biases: are NaN or were never"
    ):
        load_model(folder, "amd_w4a16")


def test_a_tensor_of_the_index_that_no_file_holds(originals, load_model, tmp_path):
    """A norm: nothing of this layer is quantized, so no scale tells of the hole."""
    name, file = "model.layers.0.input_layernorm.weight", "model-00001-of-00001.safetensors"
    folder = rewrite(originals["qwen3"], tmp_path, without(name), None)
    (folder / "model.safetensors").rename(folder / file)
    index = {"weight_map": dict.fromkeys(load_file(originals["qwen3"] / "model.safetensors"), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: .*input_layernorm.*: not in the file it names"):
        load_model(folder, "amd_w4a16")
    del index["weight_map"][name], index["weight_map"]["lm_head.weight"]  # what an index forgets does no harm
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(folder, "amd_w4a16")


def test_misspelt_recipe(originals, load_model, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"default": "mxfp4", "rules": {"*.qkv_porj": "mxfp8"}}))
    monkeypatch.setenv("SGLANG_AMD_MX_RECIPE", str(recipe))
    with pytest.raises(RecipeError, match=r"recipe\.json: pattern '\*\.qkv_porj': matches no layer"):
        load_model(originals["qwen3"], "amd_mx")


def test_a_recipe_that_can_quantize_nothing(originals, load_model, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": {"lm_head": "w4a16"}}))
    monkeypatch.setenv("SGLANG_AMD_MX_RECIPE", str(recipe))
    with pytest.raises(RecipeError, match=r"pattern 'lm_head': gives w4a16 to lm_head, which always stays bf16; drop"):
        load_model(originals["qwen3"], "amd_mx")


def test_weight_update_in_place(originals, load_model):
    """`update_weights_from_disk` runs the same loader again on the live model."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    model = load_model(originals["qwen3"], "amd_mxfp4")
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(2, 64)
    before = layer.quant_method.apply(layer, x)
    tensors = load_file(originals["qwen3"] / "model.safetensors")
    doubled = {name: t * 2 if name.endswith("o_proj.weight") else t for name, t in tensors.items()}
    DefaultModelLoader.load_weights_and_postprocess(model, iter(doubled.items()), torch.device("cpu"))
    torch.testing.assert_close(layer.quant_method.apply(layer, x), 2 * before, rtol=0, atol=0)


@pytest.fixture
def update(sglang_context):
    """`update(model, folder)`: what `/update_weights_from_disk` does, as (success, message)."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    def run(model, folder):
        nothing = dict.fromkeys(
            ("update_model_fields", "recapture_cuda_graph", "get_model_runner"), lambda *_, **__: None
        )
        config = ModelConfig.from_server_args(sglang_context.get_server_args())
        updater = WeightUpdater(
            tp_rank=0, device="cpu", gpu_id=0, model_config=config, custom_weight_loaders={}, get_model=lambda: model,
            **nothing,
        )  # fmt: skip
        served = config.model_path
        success, message = updater.update_weights_from_disk(str(folder), "auto")
        assert config.model_path == (str(folder) if success else served)
        return success, message

    return run


def test_a_failed_update_goes_back_to_the_weights_served(originals, load_model, update, tmp_path):
    """SGLang goes back to what it noted as the model's path, which is the new one from the start."""
    model = load_model(originals["qwen3"], "amd_w4a16")
    before = {name: value.clone() for name, value in parameters(model).items()}

    def broken(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"][3, 7] = torch.nan
        return {name: tensor * (2 if "norm" in name else 1) for name, tensor in tensors.items()}

    success, message = update(model, rewrite(originals["qwen3"], tmp_path, broken, None))
    assert not success
    assert re.search(r"layer model\.layers\.0\.mlp\.down_proj: .*holds NaN or Inf", message)
    assert [name for name, value in parameters(model).items() if not torch.equal(value, before[name])] == []


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen3", "mlp.down_proj.weight"),
        ("gpt_oss", "mlp.experts.down_proj"),
        ("gpt_oss", "mlp.experts.down_proj_bias"),
    ],
)
def test_an_update_that_lacks_a_tensor_is_refused(originals, load_model, update, tmp_path, name, tensor):
    """Not served with what the layer held before."""
    model = load_model(originals[name], "amd_w4a16")
    folder = rewrite(originals[name], tmp_path, without(f"model.layers.0.{tensor}"), None)
    success, message = update(model, folder)
    assert not success
    assert "or were never loaded" in message
    assert update(model, originals[name])[0]


def test_an_update_does_not_ask_for_the_files_that_were_served(originals, load_model, update, tmp_path):
    folder = rewrite(originals["qwen3"], tmp_path, dict, None)
    model = load_model(folder, "amd_w4a16")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert update(model, originals["qwen3"]) == (True, "Succeeded to update model weights.")


def test_an_update_whose_index_names_what_is_not_there_changes_nothing(originals, load_model, update, tmp_path):
    model = load_model(originals["qwen3"], "amd_w4a16")
    folder = rewrite(originals["qwen3"], tmp_path, dict, None)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert update(model, folder)[0] is False
    assert update(model, originals["qwen3"]) == (True, "Succeeded to update model weights.")
