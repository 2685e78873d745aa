import json
import pickle
from dataclasses import replace

import pytest

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.selection import Config, Epilogue, GemmProblem, KernelChoice
from sglang_amd_quant.selection.problem import Refused

MOE = GemmProblem("moe_gate_up", "w4a8", "gfx950", 64, 5760, 2880, e_local=16, e_total=128, top_k=4, tp=8, ep=8)


def test_equal_problems_are_one_key():
    again = GemmProblem("moe_gate_up", "w4a8", "gfx950", 64, 5760, 2880, 256, 16, 128, 4, 8, 8)
    assert MOE == again
    assert hash(MOE) == hash(again)
    assert {MOE: 1}[again] == 1
    assert replace(MOE, m=65) != MOE
    assert pickle.loads(pickle.dumps(MOE)) == MOE


def test_arch_is_taken_as_the_driver_reports_it():
    assert GemmProblem("linear", "w4a16", "gfx942:sramecc+:xnack-", 1, 64, 64).arch == "gfx942"
    assert GemmProblem("linear", "w4a16", "gfx1151", 1, 64, 64).cu_count == 40
    assert GemmProblem("linear", "w4a16", "gfx90a", 1, 64, 64).arch == "gfx90a"


def test_derived():
    assert (MOE.rows, MOE.a_div, MOE.moe_tp) == (256, 4, 1)
    down = replace(MOE, op="moe_down")
    assert (down.rows, down.a_div) == (256, 1)
    assert MOE.weight_bytes == 16 * 5760 * 2880 // 2
    assert GemmProblem("moe_gate_up", "w4a8", "gfx950", 1, 1472, 2880, e_total=2).padded(256) == (1536, 3072)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"m": -1}, ShapeError),
        ({"n": 0}, ShapeError),
        ({"n": 5761, "epilogue": Epilogue(activation="silu")}, ShapeError),
        ({"k": 360}, ShapeError),
        ({"k": 2880 + 16}, ShapeError),
        ({"e_local": 129}, ShapeError),
        ({"top_k": 129}, ShapeError),
        ({"top_k": 0}, ShapeError),
        ({"op": "linear"}, ShapeError),
        ({"group": 128}, ShapeError),
        ({"scheme": "int4_w4a16", "group": 48}, ShapeError),
        ({"scheme": "int4_w4a16", "group": 128, "k": 2880}, ShapeError),
        ({"op": "conv"}, SchemeError),
        ({"scheme": "w3a3"}, SchemeError),
        ({"layout": "swizzled"}, SchemeError),
        ({"out_dtype": "fp64"}, SchemeError),
        ({"act": "int8"}, SchemeError),
        ({"epilogue": Epilogue(activation="tanh")}, SchemeError),
        ({"epilogue": Epilogue(activation="")}, SchemeError),
        ({"epilogue": Epilogue(activation="silu", clamp="after")}, SchemeError),
    ],
)
def test_what_no_gemm_is_raises_in_one_line(change, error):
    with pytest.raises(error) as caught:
        GemmProblem(**{**MOE.to_json(), **change})
    assert "\n" not in str(caught.value)


def test_json_round_trip():
    rich = replace(MOE, epilogue=Epilogue(True, "swigluoai", interleaved=True, limit=7.0, alpha=1.702), weighted=True)
    for problem in (MOE, rich, replace(MOE, layout="cdna4_scale", out_dtype="mxfp8", block_m=32, act="fp8_static")):
        assert GemmProblem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


@pytest.mark.parametrize(
    "change", [{"m": "64"}, {"m": True}, {"extra": 1}, {"epilogue": {"gamma": 1}}, {"weighted": 1}]
)
def test_json_of_another_form_is_refused(change):
    with pytest.raises(ShapeError):
        GemmProblem.from_json({**MOE.to_json(), **change})
    with pytest.raises(ShapeError):
        GemmProblem.from_json({k: v for k, v in MOE.to_json().items() if k != "n"})


def test_config_over_fills_what_is_not_stated():
    config = Config(16, num_stages=1, params=(("n_sub", 2),)).over(Config(32, 128, params=(("kpack", 1), ("n_sub", 1))))
    assert config == Config(16, 128, num_stages=1, params=(("kpack", 1), ("n_sub", 2)))
    assert str(config) == "block_m=16 block_n=128 num_stages=1 kpack=1 n_sub=2"


def test_reasons_hold_the_choice_and_every_refusal():
    refused = Refused("exact", "k", Config(16), ("too wide",))
    choice = KernelChoice("reference", Config(), "strided", "reference", ("none left",), (refused,))
    assert choice.reasons == ("none left", "exact: k [block_m=16] refused: too wide")
    assert KernelChoice.from_json(json.loads(json.dumps(choice.to_json()))) == replace(choice, refused=())
