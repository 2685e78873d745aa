"""Peak memory of quantizing a bf16 checkpoint while SGLang loads it, in a process of its own.

    python -m bench.online_memory [--layout dense experts fused] [--gigabytes 2] [--scheme w4a16] [--json]

The bound to keep is 1.1 x the quantized model + the largest tensor of a layer in bf16. What is counted is anonymous
memory of the process (RssAnon, sampled every millisecond) beyond what it held before, after a tiny model of the same
kind was loaded for its imports. The checkpoint itself is mapped from files: those pages the kernel can drop. CPU only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sglang_amd_quant.cli.arguments import above_zero
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.integration.cpu_platform import declare_torchvision_ops

SHARD_BYTES = 10**9
VOCABULARY = 32768

TINY = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
"""What a small twin of a layout's model has instead."""

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (
        "Qwen3",
        {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128},
    ),
    "experts": (
        "Qwen3Moe",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128}
        | {"num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
    ),
    "fused": (
        "GptOss",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
    ),
}
"""Name -> (prefix of transformers' classes, sizes of a layer): Qwen3-4B; Qwen3-30B-A3B, expert by expert; gpt-oss-20b,
all experts of a layer in one tensor, as transformers saves them."""


def config_of(layout: str, layers: int, tiny: bool = False) -> Any:
    """transformers' config of the layout with so many layers."""
    declare_torchvision_ops()
    import transformers

    prefix, sizes = LAYOUTS[layout]
    changed = TINY | {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1} if tiny else {}
    rest = {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "tie_word_embeddings": layout == "dense"}
    config = getattr(transformers, f"{prefix}Config")(**sizes | rest | changed, dtype="bfloat16")
    config.architectures = [f"{prefix}ForCausalLM"]
    return config


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of its checkpoint, as `save_pretrained` would write it."""
    declare_torchvision_ops()
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "qwen3_moe" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found |= dict(_expert_by_expert(name, tuple(tensor.shape)))
        else:
            found[name] = tuple(tensor.shape)
    return found


def _expert_by_expert(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    stem, _, part = name.rpartition(".")
    experts, n, k = shape
    parts = [("gate_proj", n // 2), ("up_proj", n // 2)] if part == "gate_up_proj" else [("down_proj", n)]
    for expert in range(experts):
        yield from ((f"{stem}.{expert}.{projection}.weight", (rows, k)) for projection, rows in parts)


def make_checkpoint(folder: Path, config: Any) -> tuple[int, int]:
    """Write a random bf16 checkpoint in shards. Returns its bytes, and those of the largest tensor of a layer."""
    from safetensors.torch import save_file

    config.save_pretrained(folder)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    size = total = largest = 0

    def flush() -> None:
        nonlocal shard, size
        name = f"model-{len(set(index.values())):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, shape in tqdm(shapes(config).items(), desc=folder.name, unit="tensor"):
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        size += shard[name].nbytes
        total += shard[name].nbytes
        largest = max(largest, shard[name].nbytes if ".layers." in name else 0)
        if size >= SHARD_BYTES:
            flush()
    flush()
    weight_map = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    return total, largest


# ---- in the child ----


def load(folder: Path, scheme: str, first: bool) -> torch.nn.Module:
    """The model, loaded and quantized as a scheduler process of one rank does it."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_loader import get_model
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path=str(folder), quantization=f"amd_{scheme}", skip_tokenizer_init=True)
    args.resolve_once()
    runtime_context._CONTEXT.set_server_args(args)
    if first:
        ranks = ("tp", "pp", "moe_ep", "moe_tp", "moe_dp", "attn_tp", "attn_dp", "attn_cp")
        runtime_context.get_parallel().override_permanently(**{f"{name}_rank": 0 for name in ranks})
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
    config = ModelConfig.from_server_args(args)
    return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """While open, the largest `anonymous()` is kept in `value`."""

    def __enter__(self) -> Peak:
        self.value, self._stop = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.value = max(self.value, anonymous())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.value = max(self.value, anonymous())


def child(tiny: Path, folder: Path, scheme: str) -> dict[str, Any]:
    """Load the tiny twin, then the model, and say what the latter took."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    load(tiny, scheme, first=True)
    before, started = anonymous(), time.perf_counter()
    with Peak() as peak:
        model = load(folder, scheme, first=False)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "model_bytes": sum(tensors.values()),
        "peak_bytes": peak.value - before,
    }


# ---- in the parent ----


def measure(folder: Path, layout: str, gigabytes: float, scheme: str) -> dict[str, Any]:
    """Make the checkpoints, load them in a child, and compare with the bound.

    Raises:
        UnsupportedError: the child failed.
    """
    layers = 1
    while 2 * sum(torch.Size(s).numel() for s in shapes(config_of(layout, layers)).values()) < gigabytes * 1e9:
        layers += 1
    make_checkpoint(folder / "tiny", config_of(layout, 1, tiny=True))
    source, largest = make_checkpoint(folder / layout, config_of(layout, layers))
    command = [sys.executable, "-m", "bench.online_memory", "--child", str(folder / "tiny"), str(folder / layout)]
    done = subprocess.run([*command, "--scheme", scheme], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UnsupportedError(f"loading {layout}", f"exit code {done.returncode}", "see what it said above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    bound = int(1.1 * found["model_bytes"] + largest)
    return {
        "layout": layout,
        "scheme": scheme,
        "layers": layers,
        "source_bytes": source,
        "largest_tensor_bytes": largest,
        **found,
        "bound_bytes": bound,
        "within_bound": found["peak_bytes"] <= bound,
        "measured": f"torch {torch.__version__}, CPU",
    }


def main() -> int:
    """Command line. Returns 0, or 1 where the bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--gigabytes", type=above_zero, default=2.0, help="size of the bf16 checkpoint (default: 2)")
    parser.add_argument("--scheme", default="w4a16", choices=["mxfp4", "mxfp8", "w4a8", "w4a16"])
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints (default: the temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child, args.scheme)))
        return 0
    results = []
    for layout in args.layout:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results.append(measure(Path(folder), layout, args.gigabytes, args.scheme))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        keys = ("source_bytes", "model_bytes", "largest_tensor_bytes", "peak_bytes", "bound_bytes")
        print(f"{'layout':8} {'scheme':7} " + " ".join(f"{key.removesuffix('_bytes'):>14}" for key in keys) + "  (MB)")
        for r in results:
            print(f"{r['layout']:8} {r['scheme']:7} " + " ".join(f"{r[key] / 1e6:14.0f}" for key in keys))
    return 0 if all(r["within_bound"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(exit_code("bench.online_memory", main))
