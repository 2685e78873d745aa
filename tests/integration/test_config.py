"""Which scheme each layer gets: names, recipes, checkpoints, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from sglang_amd_quant.errors import CheckpointError, RecipeError, SchemeError, UnsupportedError
from sglang_amd_quant.integration.loading import CopyBudget
from sglang_amd_quant.recipe import Recipe, Rule

NATIVE = {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "mxfp4", "rules": {"*.o_proj": "bf16"}}}


@pytest.fixture
def linear(rank):
    """A layer for get_quant_method to look at."""
    from sglang.srt.layers.linear import ReplicatedLinear

    with rank():
        return ReplicatedLinear(64, 64, bias=False)


def scheme_of(config, layer, prefix):
    method = config.get_quant_method(layer, prefix)
    return getattr(getattr(method, "scheme", None), "name", "bf16" if method is not None else None)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "w4a8", "w4a16", "int4_w4a16"])
def test_forced_schemes(sglang_context, linear, name):
    from sglang_amd_quant.integration.config import CONFIGS

    assert scheme_of(CONFIGS[f"amd_{name}"](), linear, "model.layers.0.mlp.gate_up_proj") == name


@pytest.mark.parametrize(
    ("arch", "dense"),
    [("gfx950", "mxfp8"), ("gfx942", "w4a16"), ("gfx1100", "w4a16"), ("sm_90", "w4a16"), ("cpu", "w4a16")],
)
def test_default_by_arch(sglang_context, linear, monkeypatch, arch, dense):
    from sglang_amd_quant.integration import config

    monkeypatch.setattr(config, "current_arch", lambda: arch)
    made = config.AmdMxConfig()
    assert scheme_of(made, linear, "model.layers.0.self_attn.qkv_proj") == dense
    expert = made.recipe.scheme_for("model.layers.0.mlp.experts.0.up_proj")
    assert expert.name == ("w4a8" if arch == "gfx950" else "w4a16")


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.0.mlp.gate",
        "model.layers.3.mlp.router",
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.0.mlp.shared_expert_gate",
        "lm_head",
        "model.embed_tokens",
    ],
)
def test_always_bf16(make_config, linear, prefix):
    assert scheme_of(make_config("mxfp4"), linear, prefix) == "bf16"


def test_encoders_of_other_modalities_stay_bf16_unless_a_rule_names_them(make_config, linear):
    """As `amd-mx quantize` leaves them, so that both routes give one model."""
    prefix = "model.visual.blocks.0.attn.qkv_proj"
    assert scheme_of(make_config("mxfp8"), linear, prefix) == "bf16"
    assert scheme_of(make_config(Recipe((Rule("*.visual.*", "mxfp8"),))), linear, prefix) == "mxfp8"
    written = {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "mxfp8"}}
    assert scheme_of(make_config(quantization_config=written), linear, prefix) == "bf16"
    assert scheme_of(make_config(quantization_config=written | {"checked": True}), linear, prefix) == "mxfp8"


def test_embeddings_and_heads_get_no_method(make_config, rank):
    assert make_config("mxfp4").get_quant_method(torch.nn.Linear(4, 4), "lm_head") is None


def test_fused_modules_follow_their_parts(make_config, linear):
    config = make_config(Recipe((Rule("*.q_proj", "mxfp8"), Rule("*.k_proj", "mxfp8")), default="w4a8"))
    assert scheme_of(config, linear, "model.layers.0.mlp.gate_up_proj") == "w4a8"
    with pytest.raises(RecipeError, match=r"q_proj, .*k_proj, .*v_proj.*one fused layer but get mxfp8, w4a8"):
        scheme_of(config, linear, "model.layers.0.self_attn.qkv_proj")


def test_rules_may_name_a_fused_layer_as_sglang_does(make_config, linear):
    """For each part the first rule that names it or the whole decides."""
    qkv, gate_up = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"
    config = make_config(
        Recipe((Rule(qkv, "bf16"), Rule("*.q_proj", "mxfp8"), Rule("*.gate_up_proj", "mxfp4")), "w4a8")
    )
    assert [scheme_of(config, linear, name) for name in (qkv, gate_up)] == ["bf16", "mxfp4"]
    config = make_config(Recipe((Rule("*.q_proj", "mxfp8"), Rule("*.qkv_proj", "bf16")), "w4a8"))
    with pytest.raises(RecipeError, match=r"one fused layer but get bf16, mxfp8"):
        scheme_of(config, linear, qkv)
    config = make_config(Recipe((Rule("*.visual.*.qkv_proj", "mxfp8"),)))
    assert scheme_of(config, linear, "model.visual.blocks.0.qkv_proj") == "mxfp8"


def test_rules_may_name_all_experts(make_config, rank):
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    config = make_config(Recipe((Rule("*.mlp.experts", "bf16"), Rule("*.experts.*", "mxfp8")), default="w4a8"))
    with rank():
        layer = FusedMoE(4, 64, 64, 0, 2, quant_config=config, prefix="model.layers.0.mlp.experts")
    assert not hasattr(layer.quant_method, "scheme")
    assert not config.can_fuse_shared_expert()


def test_mixtral_is_named_as_its_checkpoint_names_it(make_config, linear):
    """SGLang leaves out the `model.`"""
    config = make_config(Recipe((Rule("model.layers.0.*", "bf16"),), default="w4a8"), model_type="mixtral")
    assert scheme_of(config, linear, "layers.0.self_attn.qkv_proj") == "bf16"
    method = config.get_quant_method(linear, "layers.1.self_attn.qkv_proj")
    assert (method.scheme.name, method.prefix) == ("w4a8", "model.layers.1.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen3_moe", "3.up_proj"), ("mixtral", "0.w1"), ("gpt_oss", "gate_up_proj")],
)
def test_experts_are_named_as_the_checkpoint_names_them(make_config, rank, model_type, name):
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    rule = Rule(f"*.experts.{name}".replace("3.", "*."), "mxfp8")
    rest = [Rule("*.experts.*", "mxfp8")]
    config = make_config(Recipe((rule, *rest), default="bf16"), model_type=model_type)
    with rank():
        layer = FusedMoE(4, 64, 64, 0, 2, quant_config=config, prefix="model.layers.0.mlp.experts")
    assert layer.quant_method.scheme.name == "mxfp8"
    assert not config.recipe.unmatched(config._seen)


def test_pattern_without_layer_is_an_error_at_load(make_config, linear, sglang_context, rank):
    config = make_config(Recipe((Rule("*.q_porj", "mxfp8"),), default="w4a8", source="r.json"))
    scheme_of(config, linear, "model.layers.0.self_attn.qkv_proj")
    with rank(), pytest.raises(RecipeError, match=r"r\.json: pattern '\*\.q_porj': matches no layer.*qkv_proj"):
        config.prepare_weights(torch.nn.Module(), [])


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.mlp.gate"])
def test_scheme_for_what_is_always_bf16_is_an_error_at_load(make_config, linear, rank, name):
    config = make_config(Recipe((Rule(name, "mxfp8"),), default="w4a8", source="r.json"))
    scheme_of(config, linear, "model.layers.0.self_attn.qkv_proj")
    scheme_of(config, torch.nn.Embedding(4, 4) if name == "lm_head" else linear, name)
    with rank(), pytest.raises(RecipeError, match=rf"r\.json: pattern '{name}': gives mxfp8 to {name}, which always"):
        config.prepare_weights(torch.nn.Module(), [])


def test_recipe_from_environment(sglang_context, linear, monkeypatch, tmp_path):
    from sglang_amd_quant.integration.config import CONFIGS, RECIPE_ENV

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"default": "mxfp8", "rules": {"*.o_proj": "bf16"}}))
    monkeypatch.setenv(RECIPE_ENV, str(path))
    config = CONFIGS["amd_mx"]()
    assert scheme_of(config, linear, "m.o_proj") == "bf16"
    assert scheme_of(config, linear, "m.down_proj") == "mxfp8"
    with pytest.raises(RecipeError, match="forces a scheme while"):
        CONFIGS["amd_mxfp4"]()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"default": "mxfp5"}', "'default' -> 'mxfp5': unknown scheme; use one of mxfp4"),
        ('{"rules": {"re:(": "mxfp4"}}', "no regular expression"),
        ('{"rulez": {}}', "not a recipe"),
        ("{", "no JSON"),
    ],
)
def test_bad_recipes(sglang_context, monkeypatch, tmp_path, text, match):
    from sglang_amd_quant.integration.config import RECIPE_ENV, AmdMxConfig

    path = tmp_path / "recipe.json"
    path.write_text(text)
    monkeypatch.setenv(RECIPE_ENV, str(path))
    with pytest.raises(RecipeError, match=match) as error:
        AmdMxConfig()
    assert "\n" not in str(error.value)


def test_recipe_in_config_json(make_config, linear):
    config = make_config(quantization_config=dict(NATIVE))
    assert scheme_of(config, linear, "m.o_proj") == "bf16"
    assert scheme_of(config, linear, "m.down_proj") == "mxfp4"


class TestForeignCheckpoints:
    def test_taken_over_only_when_asked_by_name(self, sglang_context):
        from sglang_amd_quant.integration.config import CONFIGS

        assert CONFIGS["amd_mx"].override_quantization_method(dict(NATIVE), "amd_mx") == "amd_mx"
        assert CONFIGS["amd_mx"].override_quantization_method(dict(NATIVE), None) is None
        assert CONFIGS["amd_w4a8"].override_quantization_method(dict(NATIVE), "amd_mx") is None

    def test_unknown_format_is_refused(self, sglang_context):
        from sglang_amd_quant.integration.config import AmdMxConfig

        with pytest.raises(CheckpointError, match="'bitsandbytes'.*no reader"):
            AmdMxConfig.override_quantization_method({"quant_method": "bitsandbytes"}, "amd_mx")

    def test_other_activations_are_fine_other_weights_are_not(self, sglang_context, linear):
        from sglang_amd_quant.integration.config import CONFIGS

        config = CONFIGS["amd_w4a16"].from_config(dict(NATIVE))
        assert scheme_of(config, linear, "m.down_proj") == "w4a16"
        assert scheme_of(config, linear, "m.o_proj") == "bf16"
        with pytest.raises(SchemeError, match="wants e4m3 weights where it holds e2m1"):
            CONFIGS["amd_mxfp8"].from_config(dict(NATIVE))

    @pytest.mark.parametrize(("scheme", "held"), [("bf16", "e2m1"), ("mxfp8", "e2m1"), ("mxfp4", "e4m3")])
    def test_a_recipe_that_wants_other_weights_of_a_layer(
        self, sglang_context, linear, monkeypatch, tmp_path, scheme, held
    ):
        """In a checkpoint with both element formats, so that the recipe as a whole asks for nothing it lacks."""
        from sglang_amd_quant.integration.config import RECIPE_ENV, AmdMxConfig

        rules = {"*.o_proj": {"e2m1": "w4a16", "e4m3": "mxfp8"}[held], "*.up_proj": "mxfp8", "*.down_proj": "mxfp4"}
        written = {"quant_method": "amd_mx", "version": 1, "checked": True, "recipe": {"rules": rules}}
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps({"rules": {"*.o_proj": scheme, "*.down_proj": "w4a8"}}))
        monkeypatch.setenv(RECIPE_ENV, str(path))
        config = AmdMxConfig.from_config(written)
        assert scheme_of(config, linear, "m.down_proj") == "w4a8"
        with pytest.raises(SchemeError, match=rf"layer m\.o_proj: {scheme} by .*json: its weights are {held} in"):
            scheme_of(config, linear, "m.o_proj")


def test_tokenizer_workers_are_refused(sglang_context, monkeypatch):
    from sglang_amd_quant.integration.config import AmdMxConfig

    args = type("Args", (), {"tokenizer_worker_num": 2})()
    monkeypatch.setattr(sglang_context, "get_server_args", lambda: args)
    with pytest.raises(UnsupportedError, match="--tokenizer-worker-num 2.*load no plugins"):
        AmdMxConfig()


def test_renamed_checkpoints(make_config, linear):
    """A model class that renames modules: patterns written for either name work."""
    from sglang.srt.models.utils import WeightsMapper

    config = make_config(Recipe((Rule("model.language_model.*.o_proj", "mxfp8"),), default="w4a8"))
    config.apply_weight_name_mapper(
        WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
    )
    assert scheme_of(config, linear, "language_model.model.layers.0.o_proj") == "mxfp8"
    assert scheme_of(config, linear, "language_model.model.layers.0.down_proj") == "w4a8"


@pytest.mark.parametrize("text", ["much", "nan", "-1"])
def test_memory_for_copies_that_is_no_number(monkeypatch, text):
    monkeypatch.setenv("SGLANG_AMD_MX_CPU_COPIES_GB", text)
    with pytest.raises(
        UnsupportedError, match=f"SGLANG_AMD_MX_CPU_COPIES_GB={text}: no number of gigabytes; write one"
    ):
        CopyBudget().take(1)
