"""Recipes apart from any model; how SGLang's layers use them is tested in tests/integration/test_config.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_amd_quant.errors import RecipeError
from sglang_amd_quant.recipe import ALWAYS_BF16, Recipe, Rule
from sglang_amd_quant.schemes import BF16, SCHEMES

NAMES = st.from_regex(r"model\.layers\.[0-9]{1,2}\.(self_attn|mlp)\.[a-z]{1,8}_proj", fullmatch=True)


@given(st.lists(st.tuples(NAMES, st.sampled_from([*SCHEMES, BF16])), max_size=6), NAMES, st.sampled_from([*SCHEMES]))
def test_first_match_then_default(rules, name, default):
    recipe = Recipe(tuple(Rule(p, s) for p, s in rules), default)
    want = next((s for p, s in rules if p == name), default)
    got = recipe.scheme_for(name)
    assert (got.name if got else BF16) == want
    assert Recipe.from_dict(recipe.to_dict()).scheme_for(name) == got or len({p for p, _ in rules}) < len(rules)


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.1.mlp.gate", "model.norm", "model.layers.0.self_attn.kv_b_proj"]
)
def test_no_rule_quantizes_what_must_stay_bf16(name):
    assert Recipe((Rule("*", "mxfp4"),), "mxfp4").scheme_for(name) is None
    assert Recipe((Rule("re:.*", "mxfp4"),)).scheme_for(name) is None


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate_up_proj", "m.kv_a_proj_with_mqa"]
)
def test_neighbours_of_those_names_are_quantized(name):
    assert Recipe.uniform("mxfp4").scheme_for(name).name == "mxfp4"


def test_unmatched_patterns():
    recipe = Recipe((Rule("*.o_proj", "mxfp8"), Rule("re:.*[.]oproj", "mxfp4")))
    assert recipe.unmatched(["a.o_proj"]) == ["re:.*[.]oproj"]


def test_parts_must_agree():
    recipe = Recipe((Rule("*.q_proj", "mxfp8"),), "mxfp4")
    with pytest.raises(RecipeError, match="get mxfp4, mxfp8; give them one scheme"):
        recipe.scheme_for("a.q_proj", "a.k_proj")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "No such file"),
        ("[1", r"r\.json:1: no JSON"),
        ("[1]", "not a recipe"),
        ('{"rules": []}', "not an object"),
        ('{"group": 64.0}', r"group 64\.0: no int4 group"),
        ('{"group": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"rules": {"*.q": "bf16", "*.q": "mxfp4"}}', r"'\*\.q' stands there twice, with different values; mend"),
        ('{"rules": {"re:a{99999999999}": "bf16"}}', "no regular expression"),
        ('{"rules": {"re:' + "(" * 5000 + ")" * 5000 + '": "bf16"}}', "no regular expression"),
    ],
    ids=lambda text: str(text)[:40],
)
def test_unreadable_files(tmp_path, content, match):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=match):
        Recipe.load(path)


@given(st.lists(st.integers(1, 90).map(lambda blocks: 32 * blocks), min_size=1, max_size=3))
def test_int4_takes_the_largest_group_that_divides_every_k(ks):
    scheme = Recipe.uniform("int4_w4a16").scheme_for("a.q_proj")
    block = Recipe.uniform("int4_w4a16").fitted(scheme, *ks).block
    assert not any(k % block for k in ks)
    assert block == 128 or any(k % (2 * block) for k in ks)
    for group in (32, 64, 128):
        asked = Recipe.uniform("int4_w4a16", group=group)
        assert asked.fitted(asked.scheme_for("a.q_proj"), *ks).block == group


def test_mx_blocks_follow_from_nothing():
    recipe = Recipe.uniform("w4a8")
    assert recipe.fitted(SCHEMES["w4a8"], 48) == SCHEMES["w4a8"]
    assert recipe.to_dict() == {"default": "w4a8", "rules": {}}


@pytest.mark.parametrize("group", [16, "64", 256, 0])
def test_no_such_group(group):
    with pytest.raises(RecipeError, match="no int4 group; use one of 32, 64, 128"):
        Recipe.from_dict({"default": "int4_w4a16", "group": group})


def test_always_bf16_is_about_modules_not_tensors():
    assert not any(p.endswith((".weight", ".bias")) for p in ALWAYS_BF16)
