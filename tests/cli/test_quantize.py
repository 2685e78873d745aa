"""`amd-mx quantize` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_amd_quant.cli.main import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Sixteen layers of one matrix of 1 MB, and a norm."""
    folder = tmp_path / "in"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": torch.randn(512, 1024).bfloat16() for i in range(16)}
    save_file(tensors | {"model.norm.weight": torch.ones(512).bfloat16()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(*args: object) -> int:
    return main(["quantize", *map(str, args)])


def test_summary(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--scheme", "w4a8") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}: 0.02 GB -> 0.00 GB in 1 shards; quantized: 16 w4a8\n"
    assert "100%" in printed.err  # the progress bar
    assert main(["inspect", str(tmp_path / "out")]) == 0


def test_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"default": "mxfp8", "rules": {"*.layers.0.*": "bf16", "*.layers.1.*": "mxfp4"}}))
    assert run(source, tmp_path / "out", "--recipe", recipe, "--max-shard-size", "1MB", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["quantized_tensors"] == {"mxfp4": 1, "mxfp8": 14}
    assert summary["shards"] == len(list((tmp_path / "out").glob("*.safetensors"))) == 15  # mxfp4 and mxfp8 fit in one
    assert summary["source_bytes"] == 16 * 2 * 512 * 1024 + 2 * 512
    assert summary["kept_in_doubt"] == []


def test_scale_mode(source: Path, tmp_path: Path) -> None:
    for mode in ("even", "ceil"):
        assert run(source, tmp_path / mode, "--scheme", "mxfp4", "--scale-mode", mode) == 0
    even, ceil = (load_file(tmp_path / m / "model-00001-of-00001.safetensors") for m in ("even", "ceil"))
    name = "model.layers.0.mlp.down_proj.weight_scale"
    assert bool((ceil[name] >= even[name]).all())
    assert not torch.equal(ceil[name], even[name])
    config = json.loads((tmp_path / "ceil" / "config.json").read_text())["quantization_config"]
    assert config["scale_mode"]["e2m1"] == "ceil"


def test_keep(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--scheme", "mxfp4") == 0
    assert run(tmp_path / "out", tmp_path / "kept", "--scheme", "keep") == 0
    before, after = (load_file(tmp_path / f / "model-00001-of-00001.safetensors") for f in ("out", "kept"))
    assert set(before) == set(after)
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scheme", "mxfp4"], r"nowhere: no such folder; name a folder with config.json"),
        (["--recipe", "nowhere.json"], "no such folder"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "out", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("amd-mx quantize: ")
    assert message in error
    assert error.count("\n") == 1


def test_pytorch_bin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    assert run(tmp_path, tmp_path / "out", "--scheme", "mxfp4") == 2
    assert "no *.safetensors (but pytorch_model.bin); convert" in capsys.readouterr().err


def test_keep_takes_no_scale_mode(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--scheme", "keep", "--scale-mode", "even") == 2
    assert "quantizes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["5 apples", "0", "-1GB", "GB"])
def test_sizes(source: Path, tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", "--scheme", "mxfp4", f"--max-shard-size={size}")
    assert "is no size; write like 5GB" in capsys.readouterr().err


def test_sigkill(source: Path, tmp_path: Path) -> None:
    """A killed process leaves no DST; the same command goes on, and ends with the same bytes."""
    args = ["quantize", str(source), str(tmp_path / "out"), "--scheme", "mxfp4", "--max-shard-size", "300KB"]
    slowed = (
        "import time; from sglang_amd_quant.checkpoints import convert; make = convert._make\n"
        "convert._make = lambda *a: (time.sleep(0.1), make(*a))[1]\n"
        f"from sglang_amd_quant.cli.main import main; main({args!r})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", slowed], env=environment, stderr=subprocess.DEVNULL)
    partial, deadline = tmp_path / "out.partial", time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 3:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "made no shard in a minute"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert not (partial / "config.json").exists()
    kept = {shard.name: shard.stat().st_mtime_ns for shard in partial.glob("*.safetensors")}
    assert main(args) == 0
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert main(["quantize", str(source), str(tmp_path / "anew"), *args[3:]]) == 0
    anew = {p.name: p.read_bytes() for p in (tmp_path / "anew").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == anew
