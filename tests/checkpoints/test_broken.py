"""Truncated, misnamed, wrongly shaped, NaN-scaled and contradictory checkpoints: each one line, from the reader and
from `amd-mx inspect`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_amd_quant.checkpoints.folder import INDEX
from sglang_amd_quant.checkpoints.native import quantization_config
from sglang_amd_quant.cli.main import main
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe, Rule

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    *lead, k = shape
    return torch.full((*lead, k // 2), 0x21, dtype=torch.uint8), torch.full((*lead, k // 32), 120, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of our own format in two shards: dense, static inputs, fused experts, bf16 layers."""
    q, q_scale = mxfp4(32, 64)
    down, down_scale = mxfp4(64, 96)
    fused, fused_scale = mxfp4(2, 96, 64)
    shards: list[dict[str, torch.Tensor]] = [
        {f"{Q}.weight": q, f"{Q}.weight_scale": q_scale, "model.embed_tokens.weight": torch.ones(64, 64).bfloat16()},
        {
            f"{DOWN}.weight": down,
            f"{DOWN}.weight_scale": down_scale,
            f"{DOWN}.input_scale": torch.tensor(0.5),
            EXPERTS: fused,
            f"{EXPERTS}_scale": fused_scale,
            "model.norm.weight": torch.ones(64).bfloat16(),
        },
    ]
    for file, tensors in zip(SHARDS, shards, strict=True):
        save_file(tensors, tmp_path / file)
    index(tmp_path)
    recipe = Recipe((Rule("*.mlp.*", "w4a8"),), "mxfp4")
    write_config(tmp_path, quantization_config(recipe, static=(Rule("*.down_proj", "fp8_static"),)))
    return tmp_path


def index(folder: Path) -> None:
    weight_map = {name: file for file in SHARDS for name in load_file(folder / file)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_config(folder: Path, quantization: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))


def change(folder: Path, shard: int, name: str, value: torch.Tensor | str | None) -> None:
    """Give a shard's tensor another value or another name, or drop it; the index follows."""
    tensors = load_file(folder / SHARDS[shard])
    old = tensors.pop(name, None)
    if isinstance(value, str):
        assert old is not None
        tensors[value] = old
    elif value is not None:
        tensors[name] = value
    save_file(tensors, folder / SHARDS[shard])
    index(folder)


def edit_header(folder: Path, name: str, **fields: Any) -> None:
    path = folder / SHARDS[0]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[name] |= fields
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def rewrite_header(folder: Path, header: str, data: int) -> None:
    """Make the first shard a file of this header over so many bytes."""
    text = header.encode()
    (folder / SHARDS[0]).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def header(**tensors: list[Any]) -> str:
    """Of uint8 tensors, by their data_offsets."""
    entries = {n: {"dtype": "U8", "shape": [4], "data_offsets": offsets} for n, offsets in tensors.items()}
    return json.dumps(entries)


def cut(folder: Path, size: int) -> None:
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:size])


def recipe_says(folder: Path, **recipe: Any) -> None:
    write_config(folder, quantization_config(Recipe.from_dict(recipe)))


SCALE = torch.full((32, 2), 120, dtype=torch.uint8)

CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    # files
    "truncated data": (lambda f: cut(f, -100), rf"{SHARDS[1]}: truncated: \d+ bytes where its header tells of \d+"),
    "truncated header": (lambda f: cut(f, 40), rf"{SHARDS[1]}: truncated: 40 bytes"),
    "empty file": (lambda f: cut(f, 0), rf"{SHARDS[1]}: no safetensors file"),
    "no safetensors": (lambda f: (f / SHARDS[1]).write_bytes(b"\x89PNG" * 99), "no safetensors file"),
    "header no JSON": (lambda f: (f / SHARDS[1]).write_bytes(b"\4" + b"\0" * 7 + b"oops"), "no safetensors header"),
    "absurd shape": (
        lambda f: edit_header(f, f"{Q}.weight", shape=[32, 1 << 40]),
        rf"{Q}.weight \[32, 1099511627776\] U8: its shape needs \d+ bytes, its offsets hold 1024",
    ),
    "absurd shape of nothing": (
        lambda f: rewrite_header(f, f'{{"a": {{"dtype": "U8", "shape": [0, {2**63}], "data_offsets": [0, 0]}}}}', 0),
        rf"a \[0, {2**63}\] U8: no tensor is so large",
    ),
    "negative shape": (lambda f: edit_header(f, f"{Q}.weight", shape=[-32, -32]), "its shape needs"),
    "negative offsets": (lambda f: rewrite_header(f, header(a=[-4, 0]), 4), r"a \[4\] U8: its shape needs"),
    "broken offsets": (lambda f: rewrite_header(f, header(a=[0.0, 4.0]), 4), r"a \[4\] U8: its shape needs"),
    "hole before the first tensor": (lambda f: rewrite_header(f, header(a=[4, 8]), 8), "a: does not start where"),
    "hole after the last tensor": (
        lambda f: rewrite_header(f, header(a=[0, 4]), 8),
        rf"{SHARDS[0]}: \d+ bytes where its header tells of \d+; fetch",
    ),
    "name twice in a header": (
        lambda f: rewrite_header(f, f"{header(a=[0, 4])[:-1]},{header(a=[4, 8])[1:]}", 8),
        "no safetensors header .'a' stands there twice, with different values",
    ),
    "name of several lines": (
        lambda f: rewrite_header(f, header(**{"a\nb": [0, 4]}), 4),
        r"'a\\nb': no name of a tensor",
    ),
    "no tensors": (
        lambda f: [save_file({}, f / file) for file in SHARDS] and (f / INDEX).unlink(),
        "holds no tensors; fetch the checkpoint again",
    ),
    "missing shard, no index": (
        lambda f: ((f / SHARDS[1]).unlink(), (f / INDEX).unlink()),
        r"model-\*-of-2: 1 of 2 shards are there",
    ),
    "one file and numbered ones, no index": (
        lambda f: ((f / INDEX).unlink(), save_file(load_file(f / SHARDS[0]), f / "model.safetensors")),
        r"also holds model-\*-of-2 and no index; delete one set, or fetch the index",
    ),
    "index names other folders": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        r"index\.json: no weight_map of tensor names to \*\.safetensors beside it",
    ),
    "index contradicts itself": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        r"index\.json: 'a' stands there twice, with different values",
    ),
    "config with an absurd number": (
        lambda f: (f / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"),
        r"config\.json: Exceeds the limit \(4300 digits\).*; mend the file",
    ),
    "unknown dtype": (lambda f: edit_header(f, f"{Q}.weight", dtype="F7"), rf"{Q}.weight \[32, 32\] F7: unknown dtype"),
    "overlapping tensors": (
        lambda f: edit_header(f, f"{Q}.weight_scale", data_offsets=[0, 64]),
        "does not start where the tensor before it ends",
    ),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), rf"{SHARDS[1]}: No such file"),
    "index names a missing tensor": (
        lambda f: (index(f), (save_file({}, f / SHARDS[0]))),
        rf"index.json: .*{Q}.weight.*: not in the file it names",
    ),
    "index no JSON": (lambda f: (f / INDEX).write_text("{"), "index.json:1: no JSON"),
    "tensor not in the index": (
        lambda f: save_file(load_file(f / SHARDS[0]) | {"extra.weight": torch.ones(2)}, f / SHARDS[0]),
        "extra.weight: stored, but not in the index",
    ),
    "stored twice": (
        lambda f: change(f, 1, f"{Q}.weight", torch.zeros(32, 32, dtype=torch.uint8)),
        rf"{Q}.weight: stored in {SHARDS[0]} as well",
    ),
    # names
    "missing scale": (lambda f: change(f, 0, f"{Q}.weight_scale", None), f"{Q}: weight_scale: missing"),
    "missing weight": (lambda f: change(f, 0, f"{Q}.weight", None), f"{Q}: weight: missing"),
    "missing input scale": (lambda f: change(f, 1, f"{DOWN}.input_scale", None), f"{DOWN}: input_scale: missing"),
    "misspelt scale": (
        lambda f: change(f, 0, f"{Q}.weight_scale", f"{Q}.weight_scael"),
        rf"1 tensors left over: {Q}.weight_scael: no part of the amd_mx format",
    ),
    "misspelt module": (
        lambda f: change(f, 0, f"{Q}.weight", "model.layers.0.self_attn.q_porj.weight"),
        "q_porj: weight_scale: missing",
    ),
    "another format's tensor": (
        lambda f: change(f, 0, f"{Q}.weight_global_scale", torch.ones(1)),
        rf"left over: {Q}.weight_global_scale",
    ),
    "another format's layer": (
        lambda f: change(f, 0, "model.layers.0.self_attn.k_proj.qweight", torch.zeros(4, 4, dtype=torch.int32)),
        "left over: model.layers.0.self_attn.k_proj.qweight",
    ),
    # shapes and dtypes
    "short scales": (
        lambda f: change(f, 0, f"{Q}.weight_scale", SCALE[:, :1].contiguous()),
        rf"{Q}.weight_scale \[32, 1\]: the weight has \[32, 2\] blocks of 32",
    ),
    "weight of another layer": (
        lambda f: change(f, 0, f"{Q}.weight", torch.zeros(16, 32, dtype=torch.uint8)),
        rf"{Q}.weight_scale \[32, 2\]: the weight has \[16, 2\]",
    ),
    "K no multiple of 32": (
        lambda f: change(f, 0, f"{Q}.weight", torch.zeros(32, 24, dtype=torch.uint8)),
        rf"{Q}.weight \[32, 24\]: a stored e2m1 weight is \[N, K/2\] with K a multiple of 32",
    ),
    "flat weight": (
        lambda f: change(f, 0, f"{Q}.weight", torch.zeros(1024, dtype=torch.uint8)),
        rf"{Q}.weight \[1024\]: a stored e2m1 weight is \[N, K/2\]",
    ),
    "experts not stacked": (
        lambda f: change(f, 1, EXPERTS, torch.zeros(96, 32, dtype=torch.uint8)),
        rf"{EXPERTS} \[96, 32\]: a stored e2m1 weight is \[E, N, K/2\]",
    ),
    "float scales": (
        lambda f: change(f, 0, f"{Q}.weight_scale", torch.ones(32, 2)),
        r"block scales are e8m0 bytes \(uint8\) \[N, K/32\]",
    ),
    "fp8 weight under mxfp4": (
        lambda f: change(f, 0, f"{Q}.weight", torch.zeros(32, 64).to(torch.float8_e4m3fn)),
        rf"{Q}.weight \[32, 64\] torch.float8_e4m3fn: the config says e2m1 weights",
    ),
    # values
    "NaN scale": (
        lambda f: change(f, 0, f"{Q}.weight_scale", torch.full_like(SCALE, 255)),
        rf"{Q}.weight_scale \[32, 2\]: 64 scale bytes are 255, e8m0's NaN",
    ),
    "NaN expert scale": (
        lambda f: change(f, 1, f"{EXPERTS}_scale", torch.full((2, 96, 2), 255, dtype=torch.uint8)),
        rf"{EXPERTS}_scale \[2, 96, 2\]: 384 scale bytes are 255",
    ),
    "NaN input scale": (
        lambda f: change(f, 1, f"{DOWN}.input_scale", torch.tensor(float("nan"))),
        rf"{DOWN}.input_scale = nan: no positive finite scale",
    ),
    "input scale of many": (
        lambda f: change(f, 1, f"{DOWN}.input_scale", torch.ones(64)),
        rf"{DOWN}.input_scale \[64\] torch.float32: an input scale is one float",
    ),
    # config
    "config says bf16": (
        lambda f: recipe_says(f, default="w4a8", rules={"*.q_proj": "bf16"}),
        rf"{Q}.weight .*: quantized, but the checkpoint's config says bf16",
    ),
    "config says quantized": (
        lambda f: change(f, 0, "model.layers.1.self_attn.q_proj.weight", torch.ones(32, 64).bfloat16()),
        "model.layers.1.self_attn.q_proj: stored unquantized, but the checkpoint's config says quantized",
    ),
    "config says another linear is quantized": (
        lambda f: change(f, 0, "model.layers.0.self_attn.o_proj.weight", torch.ones(32, 64).bfloat16()),
        "model.layers.0.self_attn.o_proj: stored unquantized, but the checkpoint's config says quantized; add",
    ),
    "unknown format": (lambda f: write_config(f, {"quant_method": "hqq"}), "quant_method 'hqq': no reader"),
    "unknown version": (lambda f: write_config(f, {"quant_method": "amd_mx", "version": 9}), "version 9: this release"),
    "unknown scheme": (
        lambda f: write_config(f, {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "mxfp5"}}),
        "'default' -> 'mxfp5': unknown scheme",
    ),
    "config no JSON": (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json:1: no JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
}  # fmt: skip

UNREADABLE = {
    "index no JSON", "index names other folders", "index contradicts itself",
    "config no JSON", "config with an absurd number", "no config",
}  # fmt: skip
"""Nothing can be told of these, so `amd-mx inspect` ends with 2."""


def test_sound(folder: Path, tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(tools.canonical(folder)) == 9
    assert main(["inspect", str(folder)]) == 0
    assert "no problems found" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["transformer.blocks.0.ffn.experts.mlp.w1", "vision_tower.layers.0.mlp.fc1.weight"])
def test_what_may_be_no_linear(folder: Path, tools: Any, name: str) -> None:
    """DBRX's experts, all in one matrix that is no layer of its own, and encoders of images are served as they are."""
    change(folder, 0, name, torch.ones(64, 64).bfloat16())
    assert len(tools.canonical(folder)) == 10


@pytest.mark.parametrize("case", CASES)
def test_reader(folder: Path, tools: Any, case: str) -> None:
    break_it, message = CASES[case]
    break_it(folder)
    with pytest.raises(ValueError, match=message) as caught:
        tools.canonical(folder)
    assert case == "unknown scheme" or isinstance(caught.value, CheckpointError)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") >= 1, "what: reason; remedy"


@pytest.mark.parametrize("code", [0x7E, 0x7F, 0xFF])
def test_nan_weight_that_is_dequantized(folder: Path, tools: Any, code: int) -> None:
    """MLA's kv_b_proj runs in bf16, so no later check sees its codes; the largest number (0x7e, 448) passes."""
    name = "model.layers.0.self_attn.kv_b_proj"
    weight = torch.full((32, 64), 0x38, dtype=torch.uint8)  # 1.0
    weight[2, 40] = code
    stored = {f"{name}.weight": weight.view(torch.float8_e4m3fn), f"{name}.weight_scale": SCALE}
    save_file(load_file(folder / SHARDS[0]) | stored, folder / SHARDS[0])
    index(folder)
    if code == 0x7E:
        assert tools.canonical(folder)[f"{name}.weight"][2, 40] == 448 * 2.0 ** (120 - 127)
        return
    with pytest.raises(CheckpointError, match=rf"{name}.weight \[32, 64\]: holds NaN .*, as at \[2, 40\]; quantize"):
        tools.canonical(folder)


@pytest.mark.parametrize("case", CASES)
def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    break_it, message = CASES[case]
    break_it(folder)
    code = main(["inspect", str(folder)])
    printed = capsys.readouterr()
    if case in UNREADABLE:
        assert code == 2
        assert re.match(rf"amd-mx inspect: .*{message}.*\n$", printed.err)
        return
    assert code == 1
    problems = [line for line in printed.out.splitlines() if line.startswith("problem: ")]
    assert any(re.search(message, line) for line in problems), printed.out
    assert main(["inspect", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [line.removeprefix("problem: ") for line in problems]
