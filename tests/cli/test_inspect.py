"""`amd-mx inspect` on sound checkpoints; tests/checkpoints/test_broken.py has the broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_amd_quant.checkpoints.folder import TensorInfo
from sglang_amd_quant.cli.main import main


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    folder = tmp_path / "bf16"
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": torch.randn(64, 64).bfloat16()}
    for layer in (0, 1, 2, 5):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(32, 64).bfloat16()
        for expert in range(3):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
            tensors[name] = torch.randn(64, 96).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def mixed(bf16: Path, tmp_path: Path) -> Path:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"default": "mxfp8", "rules": {"*.experts.*": "w4a8", "*.layers.5.self*": "bf16"}}))
    assert main(["quantize", str(bf16), str(tmp_path / "mixed"), "--recipe", str(recipe)]) == 0
    return tmp_path / "mixed"


def test_text(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(mixed)]) == 0
    weights = {4.25: 12 * 64 * 96, 8.25: 3 * 32 * 64, 16.0: 64 * 64 + 32 * 64}
    bits = sum(bits * n for bits, n in weights.items()) / sum(weights.values())
    first, *table, last = capsys.readouterr().out.splitlines()
    assert f": amd_mx, 0.000 GB in 1 files, 32 tensors, {bits:.2f} bits per weight (4.56 where quantized)" in first
    assert [" ".join(line.split()) for line in table] == [
        "layers scheme shape count bits MB",
        "model.embed_tokens bf16 64 x 64 1 16.00 0.0",
        "model.layers.{0..2,5}.mlp.experts.{0..2}.down_proj w4a8 64 x 96 12 4.25 0.0",
        "model.layers.5.self_attn.q_proj bf16 32 x 64 1 16.00 0.0",
        "model.layers.{0..2}.self_attn.q_proj mxfp8 32 x 64 3 8.25 0.0",
    ]
    assert last == "no problems found"


def test_json(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(mixed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "amd_mx"
    assert found["problems"] == []
    experts = found["groups"][1]
    assert (experts["scheme"], experts["count"], experts["bits_per_weight"]) == ("w4a8", 12, 4.25)
    assert experts["nbytes"] == 12 * 64 * 96 * 17 // 32  # 16 bytes of elements and one of scale to 32 weights


def test_unquantized(bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bf16)]) == 0
    assert "not quantized, 0.000 GB in 1 files, 17 tensors, 16.00 bits per weight\n" in capsys.readouterr().out


def test_weights_are_not_read(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = TensorInfo.read_bytes

    def noting(self: TensorInfo, first: int, count: int) -> torch.Tensor:
        read.append(self.name)
        return real(self, first, count)

    monkeypatch.setattr(TensorInfo, "read_bytes", noting)
    assert main(["inspect", str(mixed)]) == 0
    assert len(read) == 15
    assert all(name.endswith("_scale") for name in read)


def test_raw_weights_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.q_proj.weight": torch.zeros(4, 16, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert main(["inspect", str(tmp_path)]) == 1
    assert (
        "problem: a.q_proj.weight: quantized, though config.json has no quantization_config" in capsys.readouterr().out
    )


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_config_claims_what_is_not_there(bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bf16 / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp8"}}')
    assert main(["inspect", str(bf16)]) == 1
    (problem,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert "stored unquantized, but the checkpoint's config says quantized and nothing is; take quant" in problem
    excluded = {"quant_method": "mxfp8", "ignored_layers": ["model"]}
    (bf16 / "config.json").write_text(json.dumps({"quantization_config": excluded}))
    assert main(["inspect", str(bf16)]) == 1
    assert "mxfp8, but holds no quantized layer" in capsys.readouterr().out


def test_a_recipe_for_online_quantization_is_no_problem(bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "mxfp8"}}
    (bf16 / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert main(["inspect", str(bf16)]) == 0
    assert "no problems found" in capsys.readouterr().out
