"""Reading a config.json: cards and real configs alike, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant import shapes
from sglang_amd_quant.errors import AmdMxError, CheckpointError, ShapeError
from sglang_amd_quant.shapes.facts import ModelFacts
from sglang_amd_quant.shapes.families import FAMILIES

CARDS = {name: json.loads(path.read_text()) for name, path in shapes.cards().items()}

ASKED_FOR = [
    "gpt-oss-20b", "gpt-oss-120b", "MiniMax-M2.5", "MiniMax-M3", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Next",
    "Qwen3.5-397B-A17B", "Qwen3.6-35B-A3B", "DeepSeek-V3", "DeepSeek-R1", "DeepSeek-V4-Flash", "DeepSeek-V4-Pro",
    "Kimi-K2", "GLM-4.7", "GLM-5", "Llama-3.1-8B", "Llama-3.1-70B", "Llama-4-Maverick", "gemma-3-270m", "Gemma-3-27b",
]  # fmt: skip


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_card_for_every_model(name: str) -> None:
    facts = shapes.load(name)
    assert facts.source
    assert facts.name.lower().startswith(name.lower())
    assert set(facts.unconfirmed) <= set(CARDS[facts.name])


def test_folder_file_and_card_read_alike(tmp_path: Path) -> None:
    config = CARDS["gpt-oss-120b"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = shapes.load("GPT-OSS-120b")
    for model in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        assert shapes.load(model).layers == card.layers
    assert shapes.load(tmp_path).name == tmp_path.name


@pytest.mark.parametrize("name", CARDS)
def test_a_text_config_reads_like_a_plain_one(name: str) -> None:
    outer = ("architectures", "source", "unconfirmed")
    inner = {k: v for k, v in CARDS[name].items() if k not in outer}
    nested = {**{k: CARDS[name][k] for k in outer}, "text_config": inner, "vision_config": {"hidden_size": 7}}
    assert ModelFacts.from_config(nested).layers == ModelFacts.from_config(CARDS[name]).layers


def test_gemma3_configs_leave_out_defaults() -> None:
    """google/gemma-3-4b-it's text_config says no more than this."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    facts = ModelFacts.from_config({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    shape = {g.layer: (g.N, g.K) for g in shapes.plan(facts)}
    assert shape["self_attn.qkv_proj"] == ((8 + 2 * 4) * 256, 2560)
    assert shape["lm_head"] == (262208, 2560)


def test_transformers_and_hub_spellings_of_minimax_m3_agree() -> None:
    """transformers 5.19's MiniMaxM3VLTextConfig saves lists where the hub's config.json has flags in objects."""
    saved = {k: v for k, v in CARDS["MiniMax-M3"].items() if k not in ("moe_layer_freq", "sparse_attention_config")}
    saved |= {"index_n_heads": 4, "index_head_dim": 128, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57}
    saved["layer_types"] = ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57
    assert ModelFacts.from_config(saved).layers == ModelFacts.from_config(CARDS["MiniMax-M3"]).layers


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ({}, tuple(range(8))),
        ({"indexer_types": ["full", "shared"] * 4}, (0, 2, 4, 6)),
        ({"index_topk_pattern": "FSSSFSSS"}, (0, 4)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, (0, 1, 2, 6)),
        ({"index_topk_freq": 2}, (0, 1, 3, 5, 7)),
    ],
)
def test_glm5_blocks_that_share_an_indexer(given: dict[str, Any], blocks: tuple[int, ...]) -> None:
    """The rules of SGLang's `dsa_layer_skips_topk` (`configs/model_config.py`, 0.5.23)."""
    facts = ModelFacts.from_config({**CARDS["GLM-5"], "num_hidden_layers": 8, **given})
    assert {g.blocks for g in shapes.plan(facts) if "indexer" in g.layer} == {blocks}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"architectures": []}', "no architectures"),
        ('{"architectures": ["BertModel"]}', "architecture BertModel: not known here; known are DeepseekV2ForCausalLM"),
        ('{"architectures": ["LlamaForCausalLM"]}', "num_hidden_layers is missing"),
        ('{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": -1}', "num_hidden_layers is -1"),
        ('{"architectures": ["LlamaForCausalLM"], "text_config": 3}', "text_config is no object"),
        (json.dumps({**CARDS["DeepSeek-V4-Pro"], "compress_ratios": [4]}), "compress_ratios is no list of 61 entries"),
        (json.dumps({**CARDS["Qwen3-30B-A3B"], "mlp_only_layers": [0]}), "which SGLang does not build"),
        (json.dumps({**CARDS["GLM-5"], "q_lora_rank": None}), "q_lora_rank is missing"),
        (json.dumps({**CARDS["gpt-oss-20b"], "hidden_size": "2880"}), "hidden_size is '2880'"),
    ],
)
def test_bad_configs_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(AmdMxError) as caught:
        shapes.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_are_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder, config.json or model card; cards are DeepSeek-R1, "):
        shapes.load("gpt-6")
    with pytest.raises(CheckpointError, match="fits 2 model cards; cards are gpt-oss-120b, gpt-oss-20b$"):
        shapes.load("gpt-oss")
    with pytest.raises(CheckpointError, match=r"config.json: No such file"):
        shapes.load(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="no UTF-8 text"):
        shapes.load(tmp_path)


def test_quantized_checkpoints_are_told() -> None:
    config = {**CARDS["gpt-oss-20b"], "quantization_config": {"quant_method": "mxfp4"}}
    assert json.loads(ModelFacts.from_config(config).quantization or "") == {"quant_method": "mxfp4"}
    assert shapes.load("gpt-oss-20b").quantization is None


NOISE = st.one_of(st.none(), st.integers(-3, 70), st.text(max_size=3), st.lists(st.integers(0, 5), max_size=4))


@settings(max_examples=300)
@given(data=st.data())
def test_any_config_plans_or_is_refused_in_one_line(data: st.DataObject) -> None:
    """Keys dropped or replaced by noise: facts or an error of ours, never another exception."""
    config = dict(CARDS[data.draw(st.sampled_from(list(CARDS)))])
    keys = [*(k for k in config if k != "architectures"), "unconfirmed"]
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=3, unique=True)):
        config[key] = data.draw(NOISE)
    if data.draw(st.booleans()):
        config["architectures"] = [data.draw(st.sampled_from(list(FAMILIES)))]
    try:
        facts = ModelFacts.from_config(config)
        gemms = shapes.plan(facts, data.draw(st.sampled_from([1, 2, 3, 8])), 1, "w4a8")
    except ShapeError as error:
        refused, gemms = str(error), []
    else:
        refused = ""
    assert "\n" not in refused
    assert bool(refused) != bool(gemms)
    assert all(g.N > 0 and g.K > 0 and g.E_local > 0 and g.count > 0 for g in gemms)
