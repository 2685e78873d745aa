"""`amd-mx shapes`, run as users do but in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_amd_quant import shapes
from sglang_amd_quant.cli.main import main

Out = pytest.CaptureFixture[str]


def run(capsys: Out, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(["shapes", *argv])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_card_and_parallelism_answers(capsys: Out) -> None:
    for card in shapes.cards():
        for tp in ("1", "2", "4", "8"):
            for ep in ("1", "2", "4", "8"):
                code, out, err = run(capsys, card, "--tp", tp, "--ep", ep)
                assert code in (0, 2)
                if code:
                    assert (out, err.count("\n")) == ("", 1)
                    assert err.startswith(f"amd-mx shapes: {card}")
                else:
                    assert "weights of these GEMMs" in out


def test_table_of_gpt_oss_at_tp8(capsys: Out) -> None:
    code, out, _ = run(capsys, "gpt-oss-120b", "--tp", "8", "--scheme", "w4a8", "--m", "1,64")
    assert code == 0
    cells = {line.split()[0]: line.split() for line in out.splitlines()[3:-1]}
    assert cells["mlp.experts.down_proj"][2:9] == ["moe_down", "2880", "384", "128", "4", "w4a8", "75.2"]
    assert "last rank uses 192 of 384" in out
    assert out.splitlines()[2].split()[:3] == ["layer", "blocks", "op"]
    assert "us M=1  us M=64" in out
    assert "modelled at 8 TB/s" in out


def test_json_has_what_a_script_needs(capsys: Out) -> None:
    code, out, _ = run(capsys, "MiniMax-M3", "--tp", "4", "--scheme", "mxfp8", "--arch", "gfx942", "--m", "1", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["tp"], report["bandwidth_tbps"], report["floor"]) == (4, 5.3, "modelled")
    rows = {row["layer"]: row for row in report["gemms"]}
    fused = rows["self_attn.fused_qkv_index_proj"]
    assert (fused["N"], fused["K"], fused["count"]) == (2560, 6144, 57)
    assert [rows for _, rows in fused["parts"]] == [2048, 128, 128, 128, 128]
    experts = rows["mlp.experts.gate_up_proj"]
    assert (experts["E_local"], experts["top_k"], experts["padded_256"]) == (129, 5, [1536, 6144])
    assert report["total_bytes"] == sum(row["bytes"] * row["count"] for row in report["gemms"])


def test_scheme_recipe_and_arch_defaults(capsys: Out, tmp_path: Path) -> None:
    def schemes(*argv: str) -> set[str]:
        return {row["scheme"] for row in json.loads(run(capsys, "Qwen3-30B-A3B", "--json", *argv)[1])["gemms"]}

    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"default": "mxfp4", "rules": {"*.o_proj": "int4_w4a16"}}')
    assert schemes() == {"mxfp8", "w4a8", "bf16"}
    assert schemes("--arch", "gfx942") == {"w4a16", "bf16"}
    assert schemes("--scheme", "bf16") == {"bf16"}
    assert schemes("--recipe", str(recipe)) == {"mxfp4", "int4_w4a16", "bf16"}


@pytest.mark.parametrize("command", ["shapes", "coverage"])
def test_patterns_of_no_layer_are_told(capsys: Out, tmp_path: Path, command: str) -> None:
    """A server would refuse them; a plan may be right without, as with a vision tower's."""
    recipe = tmp_path / "recipe.json"
    rules = '{"*.q_porj": "mxfp8", "*.layers.3.*": "bf16", "*.experts.0.up_proj": "w4a8", "lm_head": "bf16"}'
    recipe.write_text(f'{{"default": "w4a8", "rules": {rules}}}')
    assert main([command, "Qwen3-30B-A3B", "--recipe", str(recipe), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert err == f"note: {recipe}: '*.q_porj' matches no layer of Qwen3-30B-A3B that is planned\n"


def test_a_quantized_checkpoint_brings_its_recipe(capsys: Out, tmp_path: Path) -> None:
    config = json.loads(shapes.cards()["Llama-3.1-8B"].read_text())
    own = {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "mxfp4", "rules": {"*.o_proj": "bf16"}}}
    own["scale_mode"] = {"e2m1": "even", "e4m3": "rceil"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": own}))
    rows = json.loads(run(capsys, str(tmp_path), "--json")[1])["gemms"]
    assert {row["layer"]: row["scheme"] for row in rows} == {
        "self_attn.qkv_proj": "mxfp4",
        "self_attn.o_proj": "bf16",
        "mlp.gate_up_proj": "mxfp4",
        "mlp.down_proj": "mxfp4",
        "lm_head": "bf16",
    }


def test_list_names_cards_and_what_is_unconfirmed(capsys: Out) -> None:
    code, out, _ = run(capsys, "--list")
    assert code == 0
    assert len(out.splitlines()) == 1 + len(shapes.cards())
    rows = json.loads(run(capsys, "--list", "--json")[1])
    assert {row["name"]: row["unconfirmed"] for row in rows}["gemma-3-27b"] == ["vocab_size"]
    assert all(row["source"] for row in rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "MODEL: not given"),
        (["nowhere"], "nowhere: no folder, config.json or model card"),
        (["gemma-3-270m", "--tp", "8"], "self_attn.qkv_proj at TP 8: 4 attention heads do not divide by it"),
        (["gpt-oss-20b", "--ep", "2"], "TP 1, EP 2: EP groups are made of the TP ranks"),
        (["gpt-oss-20b", "--m", "0"], "'0': write whole numbers of at least 1"),
        (["gpt-oss-20b", "--m", "1,x"], "'1,x': write whole numbers of at least 1"),
        (["gpt-oss-20b", "--bandwidth", "nan"], "'nan': write a number above 0"),
        (["gpt-oss-20b", "--bandwidth", "fast"], "'fast': write a number above 0"),
        (["gpt-oss-20b", "--recipe", "r.json", "--scheme", "w4a8"], "not allowed with argument"),
        (["gpt-oss-20b", "--recipe", "missing.json"], "missing.json: No such file"),
        (["Llama-3.1-8B", "--fuse-shared"], "it has no shared experts to fuse"),
    ],
)
def test_mistakes_are_one_line(capsys: Out, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
