"""The judge of token ids (bench/agreement.py) is itself judged: right ids pass, a wrong token or weight does not."""

from __future__ import annotations

import pytest
import torch

from bench.agreement import compare, compare_pair, logits
from bench.hf_model import fake_quantize, load_model
from sglang_amd_quant.recipe import Recipe

RECIPE = Recipe.uniform("w4a16")
COUNT = 8


@pytest.fixture(scope="module")
def reference(tiny):
    model = load_model(tiny("llama"))
    fake_quantize(model, RECIPE)
    return model


@pytest.fixture(scope="module")
def asked(tiny, prompts):
    return prompts(tiny("llama"))[:3]


def greedy(model, prompt):
    output = []
    for _ in range(COUNT):
        output.append(int(logits(model, prompt, [*output, 0])[-1].argmax()))
    return output


@pytest.fixture(scope="module")
def outputs(reference, asked):
    return [greedy(reference, prompt) for prompt in asked]


def test_its_own_ids_agree(reference, asked, outputs):
    agreement = compare(reference, asked, outputs)
    assert agreement.partings == ()
    assert agreement.positions == len(asked) * COUNT
    assert compare_pair(reference, asked, outputs, outputs).partings == ()


def test_a_token_that_is_not_nearly_best_is_found(reference, asked, outputs):
    worst = int(logits(reference, asked[1], outputs[1])[4].argmin())
    changed = [list(output) for output in outputs]
    changed[1][4] = worst
    (broken,) = [p for p in compare(reference, asked, changed).broken if p.token == worst]
    assert (broken.prompt, broken.position, broken.wanted) == (1, 4, outputs[1][4])
    between = compare_pair(reference, asked, outputs, changed)
    (parting,) = between.broken
    assert (parting.prompt, parting.position) == (1, 4)
    assert between.positions == 2 * COUNT + 5  # what follows a parting has another prefix


def test_a_wrong_weight_is_found(reference, asked, tiny):
    other = load_model(tiny("llama"))
    fake_quantize(other, RECIPE)
    weight = other.model.layers[0].mlp.down_proj.weight
    weight.data.copy_(torch.cat([weight[:, 32:], weight[:, :32]], dim=1))  # blocks of K in the wrong place
    got = [greedy(other, prompt) for prompt in asked]
    assert len(compare(reference, asked, got).broken) > COUNT // 2
