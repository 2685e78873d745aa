"""What a conversion does around the weights: files beside them, killed runs, other work, links, and `keep`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import contents, quantized, silent
from safetensors.torch import load_file, save_file

from sglang_amd_quant.checkpoints import convert, job
from sglang_amd_quant.checkpoints.convert import keep_job, quantize_job
from sglang_amd_quant.checkpoints.folder import Folder
from sglang_amd_quant.checkpoints.native import quantization_config
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe

Saved = Callable[[str], Path]


class TestFolder:
    @pytest.fixture
    def source(self, saved: Saved, tmp_path: Path) -> Path:
        """The tiny Llama with the files that models come with."""
        folder = tmp_path / "in"
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "original").mkdir()
        for path in saved("llama").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "additional_chat_templates/tool_use.jinja"):
            (folder / name).write_text(name)
        for name in ("pytorch_model.bin", "original/params.json"):
            (folder / name).write_text(name)
        return folder

    def test_what_is_carried_over(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        before, after = contents(source), contents(tmp_path / "out")
        assert set(after) == (set(before) - {"pytorch_model.bin", "original/params.json", "model.safetensors"}) | {
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
        }
        carried = set(before) & set(after) - {"config.json"}
        assert {name: before[name] for name in carried} == {name: after[name] for name in carried}
        old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
        assert new.pop("quantization_config")["recipe"]["default"] == "mxfp4"
        assert new == old
        assert not (tmp_path / "out.partial").exists()

    def test_shards(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "one", Recipe.uniform("mxfp4"))
        quantized(source, tmp_path / "many", Recipe.uniform("mxfp4"), max_shard_bytes=10_000)
        shards = sorted((tmp_path / "many").glob("*.safetensors"))
        assert len(shards) > 3
        assert all(shard.stat().st_size < 10_000 + 4096 for shard in shards)  # 4096: its header
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        together: dict[str, torch.Tensor] = {}
        for shard in shards:
            tensors = load_file(shard)
            assert all(index["weight_map"][name] == shard.name for name in tensors)
            together |= tensors
        one = load_file(tmp_path / "one" / "model-00001-of-00001.safetensors")
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
        assert set(together) == set(one)
        assert all(torch.equal(together[n].view(torch.uint8), one[n].view(torch.uint8)) for n in one)

    @pytest.mark.parametrize("stop_after", [1, 30_000, 90_000])
    def test_killed_and_repeated(
        self, source: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options: dict[str, Any] = {"max_shard_bytes": 10_000}
        quantized(source, tmp_path / "whole", Recipe.uniform("mxfp4"), **options)

        done = 0

        def killed(count: int) -> None:
            nonlocal done
            done += count
            if done > stop_after:
                raise KeyboardInterrupt

        job = quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"), **options)
        with pytest.raises(KeyboardInterrupt):
            job.execute(killed)
        assert not (tmp_path / "out").exists()
        with pytest.raises(CheckpointError, match=r"config\.json: No such file"):  # nothing that loads as if whole
            Folder.open(job.partial)

        made: list[str] = []
        real = convert._make
        monkeypatch.setattr(convert, "_make", lambda c, *rest: (made.append(c.piece.source.name), real(c, *rest))[1])
        finished = len(list(job.partial.glob("*.safetensors")))
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"), **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert (len(made) < 21) == (finished > 0)  # 21 tensors: whole shards are not made again

    def test_repeated_with_other_arguments(self, source: Path, tmp_path: Path) -> None:
        def killed(_: int) -> None:
            raise KeyboardInterrupt

        target = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            quantize_job(Folder.open(source), target, Recipe.uniform("mxfp4")).execute(killed)
        other = quantize_job(Folder.open(source), target, Recipe.uniform("mxfp8"))
        with pytest.raises(CheckpointError, match="begun by another run, which differs in quantization_config, shards"):
            other.execute(silent)
        (source / "model.safetensors").touch()
        with pytest.raises(CheckpointError, match="which differs in files"):
            quantized(source, target, Recipe.uniform("mxfp4"))
        other.execute(silent, force=True)
        assert target.is_dir()

    def test_existing_target(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        with pytest.raises(CheckpointError, match="out: exists; name another folder, or replace it with --force"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp8"))
        quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp8")).execute(silent, force=True)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"] == {
            "default": "mxfp8",
            "rules": {},
        }

    @pytest.mark.parametrize("name", ["out", "out.partial"])
    def test_other_work_is_never_replaced(self, source: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("")
        with pytest.raises(CheckpointError, match=rf"{name}: holds files, but no .*json; name another folder"):
            quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp8")).execute(silent, force=True)
        assert (tmp_path / name / "thesis").is_file()

    @pytest.mark.parametrize(
        ("link", "to", "message"),
        [
            ("tokenizer_config.json", "nowhere/x.json", "points to nothing; fetch the file, or delete the link"),
            ("code/x.py", "nowhere/x.py", "points to nothing; fetch the file, or delete the link"),
            ("self", ".", "points to a folder that holds it; delete the link"),
            ("code/below/again", "..", "points to a folder that holds it; delete the link"),
        ],
    )
    def test_links_that_cannot_be_copied(self, source: Path, tmp_path: Path, link: str, to: str, message: str) -> None:
        """Told before hours of work, not after."""
        (source / link).parent.mkdir(parents=True, exist_ok=True)
        (source / link).symlink_to(to)
        with pytest.raises(CheckpointError, match=rf"^{source / link}: {message}$"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        assert not (tmp_path / "out.partial").exists()

    def test_links_are_followed(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "x.py").write_text("x")
        (source / "code").symlink_to("../blobs")
        (source / "original" / "params").symlink_to("nowhere")  # what is not carried over
        (source / "pytorch_model-2.bin").symlink_to("nowhere")
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        assert not (tmp_path / "out" / "code").is_symlink()
        assert (tmp_path / "out" / "code" / "x.py").read_text() == "x"

    def test_a_pipe_cannot_be_copied(self, source: Path, tmp_path: Path) -> None:
        os.mkfifo(source / "pipe")
        with pytest.raises(CheckpointError, match="pipe: neither file nor folder; move it elsewhere"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))

    @pytest.mark.parametrize("target", ["elsewhere/..", ".", "link"])
    def test_target_by_another_name(
        self, source: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a rename at the end could not replace is refused before any work."""
        (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
        (tmp_path / "link").symlink_to("elsewhere")
        monkeypatch.chdir(tmp_path / "elsewhere" / "folder")
        path = Path(target) if target == "." else tmp_path / target
        with pytest.raises(CheckpointError, match="stands for another folder; name that folder itself"):
            quantize_job(Folder.open(source), path, Recipe.uniform("mxfp8")).execute(silent, force=True)

    @pytest.mark.parametrize("text_config", [None, []])
    def test_text_config_that_is_none(self, source: Path, tmp_path: Path, text_config: Any) -> None:
        config = json.loads((source / "config.json").read_text()) | {"text_config": text_config}
        (source / "config.json").write_text(json.dumps(config))
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"] == text_config

    @pytest.mark.parametrize("target", ["in", "in/out", "."])
    def test_source_and_target_apart(self, source: Path, tmp_path: Path, target: str) -> None:
        job = quantize_job(Folder.open(source), tmp_path / target, Recipe.uniform("mxfp4"))
        with pytest.raises(CheckpointError, match="lies in the source"):
            job.execute(silent, force=True)
        assert (source / "model.safetensors").is_file()

    def test_one_run_at_a_time(self, source: Path, tmp_path: Path) -> None:
        job = quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"))

        def second(_: int) -> None:
            with pytest.raises(CheckpointError, match="another run is writing it"):
                job.execute(silent)

        job.execute(second)

    def test_no_room(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(CheckpointError, match="make room"):
            quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))

    def test_quantized_source(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "out", Recipe.uniform("mxfp4"))
        with pytest.raises(CheckpointError, match="quantized already; give the bf16 original, or --scheme keep"):
            quantized(tmp_path / "out", tmp_path / "again", Recipe.uniform("mxfp4"))

    def test_keep(self, source: Path, tools: Any, tmp_path: Path) -> None:
        """A compressed-tensors checkpoint in our own format: the same bits, the same schemes."""
        quantized(source, tmp_path / "ours", Recipe.uniform("mxfp8"), max_shard_bytes=10_000)
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        tensors = tools.canonical(tmp_path / "ours")
        save_file({n: t.contiguous() for n, t in tensors.items()}, foreign / "model.safetensors")
        mx = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        group = {"targets": ["Linear"], "weights": mx, "input_activations": mx | {"dynamic": True}}
        quantization = {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": ["lm_head"]}
        (foreign / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
        keep_job(Folder.open(foreign), tmp_path / "kept", 10_000).execute(silent)
        kept = tools.canonical(tmp_path / "kept")
        assert set(kept) == set(tensors)
        assert all(torch.equal(kept[n].view(torch.uint8), tensors[n].view(torch.uint8)) for n in kept)
        reader = Folder.open(tmp_path / "kept").reader()
        assert reader is not None
        assert reader.name == "amd_mx"
        assert reader.recipe.to_dict() == {"default": "mxfp8", "rules": {"lm_head": "bf16"}}

    def test_keep_refuses_nan(self, source: Path, tmp_path: Path) -> None:
        quantized(source, tmp_path / "ours", Recipe.uniform("mxfp8"))
        (file,) = (tmp_path / "ours").glob("*.safetensors")
        tensors = load_file(file)
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name].view(torch.uint8)[3, 7] = 0xFF
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=rf"{name} \[.*\]: holds NaN .*, as at \[3, 7\]; quantize the source"):
            keep_job(Folder.open(tmp_path / "ours"), tmp_path / "kept").execute(silent)
        assert not (tmp_path / "kept").exists()

    def test_keep_needs_a_quantized_source(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nothing to keep"):
            keep_job(Folder.open(source), tmp_path / "kept")

    def test_a_recipe_alone_quantizes_nothing(self, source: Path, tmp_path: Path) -> None:
        """A bf16 checkpoint whose config.json has a recipe, for a server to quantize by."""
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = quantization_config(Recipe.uniform("mxfp4"))
        (source / "config.json").write_text(json.dumps(config))
        message = "nothing quantized, so there is nothing to keep; take quantization_config out of config.json"
        with pytest.raises(CheckpointError, match=message):
            keep_job(Folder.open(source), tmp_path / "kept")
        with pytest.raises(CheckpointError, match=r"no tensor is; take quantization_config out of config\.json$"):
            quantize_job(Folder.open(source), tmp_path / "out", Recipe.uniform("mxfp4"))
