"""Whatever a newcomer may hand to a command by mistake is answered by one line that says what, why and the remedy."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_amd_quant.cli.main import COMMANDS, main
from sglang_amd_quant.selection.packs import pack_files, shipped_dir

Out = pytest.CaptureFixture[str]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 128, "head_dim": 32,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run: a tiny checkpoint `m`, a text file, and JSON that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    save_file({"model.layers.0.mlp.down_proj.weight": torch.randn(64, 96)}, tmp_path / "m" / "model.safetensors")
    configure(tmp_path)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "latin.json").write_bytes(b'{"default": "\xff"}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "empty").mkdir()
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    (folder / "m" / "config.json").write_text(json.dumps(LLAMA | changes))


def refused(capsys: Out, line: str) -> str:
    """What the command says, in one line, as it gives up with 2."""
    try:
        code = main(line.split())
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect empty", "empty/config.json: No such file or directory; name a folder of a whole checkpoint"),
        ("quantize m text --scheme mxfp4 --force", "text: a file; name a folder"),
        ("quantize m text/x --scheme mxfp4", "text/x.partial: Not a directory; check the path and its rights"),
        ("quantize m m/x --scheme mxfp4", "m/x: lies in the source"),
        ("quantize m o --recipe latin.json", "latin.json: no UTF-8 text; mend the file"),
        ("quantize m o --recipe deep.json", "deep.json: nested too deeply; mend the file"),
        ("quantize m o --scheme int4_w4a16 --scale-mode even", "--scale-mode: scheme int4_w4a16 makes int4 alone"),
        ("quantize m o --scheme int4_w4a16 --tp 0", "--tp: '0': write a whole number of at least 1"),
        ("shapes gpt-oss-120b --recipe latin.json", "latin.json: no UTF-8 text"),
        ("shapes gpt-oss-120b --m 1,,2", "'1,,2': write whole numbers of at least 1, as 1,16,64"),
        ("coverage gpt-oss-120b --m 1, --json", "'1,': write whole numbers of at least 1, as 1,16,64"),
        (
            "coverage gpt-oss-120b --scheme w4a8 --group 64",
            "--group 64: scheme w4a8 makes no int4; drop one of the two",
        ),
        ("shapes gpt-oss-120b --bandwidth inf", "--bandwidth: 'inf': write a number above 0"),
        ("shapes gpt-oss-120b --bandwidth 1e-320", "'1e-320': write a number above 0, of at least 1e-09"),
        pytest.param(
            f"shapes gpt-oss-120b --m 1,{'9' * 400}", "999': write whole numbers of at most 2147483647", id="400 digits"
        ),
        ("coverage gpt-oss-120b --m 2147483648", "'2147483648': write whole numbers of at most 2147483647"),
        ("coverage gpt-oss-120b --m 1,0", "'1,0': write whole numbers of at least 1"),
        ("doctor --arch foo", "'foo' is unknown: use one of gfx950"),
        ("build --jobs 0", "--jobs: '0': write a whole number of at least 1"),
        ("packs lint empty", "empty: holds no *.csv; name packs, or a folder of them"),
    ],
)
def test_one_line(folder: Path, capsys: Out, line: str, message: str) -> None:
    assert message in refused(capsys, line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**30}, "hidden_size is 1e+30; write a whole number of at most 2147483647"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09; write a whole number of at most 10000"),
        ({"quantization_config": {"quant_method": ["awq"]}}, "quant_method ['awq']: no reader for this format"),
    ],
)
def test_absurd_configs(folder: Path, capsys: Out, changes: dict[str, Any], message: str) -> None:
    configure(folder, **changes)
    assert message in refused(capsys, "shapes m")


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("awq", 2),
        (["awq"], 2),
        ("", 2),
        ([], 2),
        (False, 2),
        ({"quant_method": ["awq"]}, 1),
        ({"producer": "modelopt-ish"}, 1),
    ],
)
def test_quantization_configs_that_are_none(folder: Path, capsys: Out, config: Any, code: int) -> None:
    configure(folder, quantization_config=config)
    assert main(["inspect", "m"]) == code
    assert "quantization_config" in "".join(capsys.readouterr())


def test_a_safetensors_header_may_be_nested_too_deeply(folder: Path, capsys: Out) -> None:
    header = b"[" * 100_000
    (folder / "m" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert main(["inspect", "m"]) == 1
    assert "no safetensors header" in capsys.readouterr().out


def test_the_rule_that_nan_weights_ask_for_works(folder: Path, capsys: Out) -> None:
    tensors = {f"model.layers.0.mlp.{name}_proj.weight": torch.randn(64, 64) for name in ("up", "gate", "down")}
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "m" / "model.safetensors")
    message = refused(capsys, "quantize m o --scheme mxfp4")
    assert "holds NaN or Inf" in message
    rule = json.loads("{" + message.rpartition("rule ")[2] + "}")
    (folder / "recipe.json").write_text(json.dumps({"default": "mxfp4", "rules": rule}))
    assert main(["quantize", "m", "o", "--recipe", "recipe.json", "--force"]) == 0


def test_names_that_no_encoding_holds(folder: Path, capsys: Out) -> None:
    name = os.fsdecode(b"m\xff")
    assert "m\\udcff: no such folder; name a folder" in refused(capsys, f"inspect {name}")


def test_a_user_who_stops_a_command_before_it_runs(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", stopped)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "amd-mx doctor: interrupted\n"


def test_a_disk_that_fills_up(folder: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space was enough when the run began; the same command goes on when there is room again."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        message = refused(capsys, "quantize m o --scheme mxfp4")
    assert message.startswith("amd-mx quantize: o.partial/model-00001-of-00001.tmp: No space left on device; make room")
    assert not Path("o").exists()
    assert main(["quantize", "m", "o", "--scheme", "mxfp4"]) == 0


def test_shards_may_be_as_large_as_one_likes(folder: Path) -> None:
    assert main(["quantize", "m", "o", "--scheme", "mxfp4", "--max-shard-size", "9" * 400 + "GB"]) == 0


def test_merge_tells_a_script_too(folder: Path, capsys: Out) -> None:
    pack = str(pack_files([str(shipped_dir())])[0])
    assert main(["packs", "merge", "out.csv", pack, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["undecided"]) == ("out.csv", [])
    assert told["entries"] == sum(line[:1] not in "#" for line in Path("out.csv").read_text().splitlines()) - 1
    assert "cannot be written" in refused(capsys, f"packs merge empty {pack}")
    assert not Path("empty.partial").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: Out) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = capsys.readouterr().out.partition("example:\n")[2].splitlines()
    assert example
    assert all(line.startswith(f"  amd-mx {command}") for line in example)
