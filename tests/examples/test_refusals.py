"""What examples and benches say of arguments that they cannot use: one line and exit code 2, as commands do."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from examples import serve, tiny_models


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("examples.tiny_models file/x --only llama", "tiny_models: file/x: Not a directory; check the path"),
        ("examples.fetch_gemma --out file/x", "fetch_gemma: file/x.partial: Not a directory; check the path"),
        ("examples.serve --timeout nan", "--timeout: 'nan': write a number above 0"),
        ("examples.serve --model m --port 31999", "m/config.json: quantization_config: no JSON object; mend config"),
        ("bench.quantize_checkpoint --folder nowhere", "bench.quantize_checkpoint: nowhere/tmp"),
        ("bench.online_memory --folder nowhere", "bench.online_memory: nowhere/tmp"),
        ("bench.perplexity --model nowhere", "bench.perplexity: nowhere: no directory with a config.json"),
        ("bench.serving --model qwen3-8b --input 0", "--input: '0': write a whole number of at least 1"),
    ],
)
def test_one_line(tmp_path, monkeypatch, capsys, command, message):
    module, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": "mxfp4"}))
    arguments = [f"./{word}" if word == "m" else word for word in arguments]
    monkeypatch.delitem(sys.modules, module, raising=False)  # it is run anew
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line


def test_what_an_interrupted_start_left_is_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "STATE", tmp_path)
    (tmp_path / "31999.json").write_text('{"pid": ')
    assert serve.running(31999) is None


def test_a_bug_is_no_refusal(tmp_path, monkeypatch):
    """Only what a user can mend is told in one line: the traceback of anything else is worth having."""

    def broken(*_):
        raise RuntimeError("of ours")

    monkeypatch.setattr(tiny_models, "make_model", broken)
    with pytest.raises(RuntimeError, match="of ours"):
        tiny_models.main([str(tmp_path)])
