"""Before and after through real servers: the same model in bf16 and in MX schemes, timed by `sglang.bench_serving`.

    python -m bench.serving --model qwen3-8b --variants bf16,amd_w4a16,amd_mxfp8 --concurrency 1,4,16 --out results
    python -m bench.serving --model gpt-oss-20b --variants checkpoint_mxfp4,amd_w4a16 --concurrency 1,16,64
    python -m bench.serving --model /path/to/model --flags "--attention-backend aiter" --input 1024 --output 1024

`--model` is a folder, or one of the shapes below, which is served with random weights (`--load-format dummy`): right
for speed, meaningless for quality. One server runs at a time; each concurrency is one run of `random-ids` prompts of
exactly the lengths asked for, after batches of every size that do not count. Measured: output tokens a second over the
whole run, and the median time between tokens of a request.

A variant is `bf16`, a value of `--quantization` (SGLang's own `mxfp4` is one), or `checkpoint_mxfp4`: the model as if
it came in MXFP4, which SGLang serves by itself, by the flags of `--own-flags`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from examples.server import Server, ServerError
from examples.tiny_models import make_tokenizer
from sglang_amd_quant.cli.arguments import above_zero, whole, wholes
from sglang_amd_quant.cli.ending import exit_code

_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        **_QWEN3, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "attention_bias": True, "vocab_size": 201088,
        "max_position_embeddings": 131072, "initial_context_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 150000,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
        "eos_token_id": 0,
    },
}  # fmt: skip
"""Public configs of models, to be served with random weights."""


CHECKPOINT_MXFP4 = "checkpoint_mxfp4"


def shape_folder(name: str, out: Path, variant: str) -> Path:
    """A folder with the config of `SHAPES[name]`, as this variant's checkpoint has it, and a small tokenizer."""
    own = {"quantization_config": {"quant_method": "mxfp4"}} if variant == CHECKPOINT_MXFP4 else {}
    folder = out / f"{name}-{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | own, indent=2))
    make_tokenizer(folder)
    return folder


CLIENT = """
import contextlib, json, sys
from sglang.bench_serving import cli_main
for line in sys.stdin:
    sys.argv = ["sglang.bench_serving", *json.loads(line)]
    with contextlib.redirect_stdout(sys.stderr):
        cli_main()
    print("done", flush=True)
"""


class Client:
    """sglang.bench_serving in a process that imports it once, while a server starts: that takes longer than a run."""

    def __init__(self, work: Path) -> None:
        self.log, self.work = work / "client.log", work
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                cwd=work,
            )  # fmt: skip

    def run(self, server: Server, model: Path, concurrency: int, args: argparse.Namespace) -> dict[str, Any]:
        """One run. Raises ServerError with its last words if it fails."""
        file = self.work / "run.jsonl"
        file.unlink(missing_ok=True)
        options = {
            "backend": "sglang", "host": "127.0.0.1", "port": server.port, "model": model, "tokenizer": model,
            "output-file": file, "dataset-name": "random-ids", "random-input-len": args.input,
            "random-range-ratio": 1.0, "random-output-len": args.output, "num-prompts": args.rounds * concurrency,
            "max-concurrency": concurrency, "warmup-requests": min(concurrency, 2), "seed": 42,
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([s for k, v in options.items() for s in (f"--{k}", str(v))]) + "\n")
            self._process.stdin.flush()
        if self._process.stdout.readline() != "done\n" or not file.exists():
            last = self.log.read_text(errors="replace").strip()[-200:]
            raise ServerError("sglang.bench_serving", f"failed ({last})", f"see {self.log} and {server.log}")
        result = json.loads(file.read_text().splitlines()[-1])
        # Not the client's times to first token and between tokens: those are of pieces of text, which the server holds
        # back until they are whole characters; tokens of random weights seldom are.
        kept = {name: result[name] for name in ("output_throughput", "median_e2e_latency_ms", "completed")}
        return kept | {"ms_per_token": result["median_e2e_latency_ms"] / args.output}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def warm_up(server: Server, args: argparse.Namespace) -> None:
    """Prompts in batches of 1, 2, 4 ... up to the largest concurrency: kernels compile on first use."""
    for power in range(max(args.concurrency).bit_length()):
        prompts = [[(7 * i + j) % 500 for j in range(args.input)] for i in range(1 << power)]
        sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        try:
            server.post("/generate", {"input_ids": prompts, "sampling_params": sampling}, args.timeout)
        except OSError as error:
            raise ServerError(f"{len(prompts)} prompts", f"not answered ({error})", f"see {server.log}") from None


def variant(name: str, args: argparse.Namespace, work: Path, scratch: Path) -> dict[str, Any]:
    """All runs of one variant, or the reason why there are none."""
    model = shape_folder(args.model, scratch, name) if args.model in SHAPES else Path(args.model)
    flags = [] if name in ("bf16", CHECKPOINT_MXFP4) else ["--quantization", name]
    flags += shlex.split(args.own_flags) if name == CHECKPOINT_MXFP4 else []
    flags += ["--load-format", "dummy"] if args.model in SHAPES else []
    server = Server.start(model, work / f"{name}.log", flags=[*flags, *shlex.split(args.flags)])
    client = Client(work)
    try:
        server.wait(args.timeout)
        warm_up(server, args)
        return {str(c): client.run(server, model, c, args) for c in args.concurrency}
    except ServerError as error:
        return {"why": str(error), "log": server.log_text()[-3000:]}
    finally:
        client.close()
        server.stop()


def table(results: dict[str, dict[str, Any]], concurrency: list[int]) -> str:
    """Output tokens a second, and how they compare with the first variant."""
    first = next(iter(results.values()))
    lines = [
        "variant        "
        + "".join(f"{f'conc {c}':>24}" for c in concurrency)
        + "   (output tokens/s, x first, ms of a request's latency / token)"
    ]
    for name, runs in results.items():
        if "why" in runs:
            lines.append(f"{name:15} {runs['why']}")
            continue
        cells = []
        for c in map(str, concurrency):
            r = runs[c]
            ratio = f"{r['output_throughput'] / first[c]['output_throughput']:.2f}x" if c in first else "-"
            cells.append(f"{r['output_throughput']:9.1f} {ratio:>6} {r['ms_per_token']:6.2f}")
        lines.append(f"{name:15}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Serve, measure, print. Returns 0, or 1 if a variant could not be served."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"a folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("--variants", default="bf16,amd_mx", help="see above; the baseline first")
    parser.add_argument("--concurrency", default="1,4,16", type=wholes, help="requests at a time")
    parser.add_argument("--input", type=whole, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=whole, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=whole, default=4, help="prompts a run, times the concurrency")
    parser.add_argument("--flags", default="", help="more flags of sglang.launch_server")
    parser.add_argument("--own-flags", default="", help=f"more of them, for {CHECKPOINT_MXFP4} alone")
    parser.add_argument("--timeout", type=above_zero, default=300, help="seconds that a server may take to start")
    parser.add_argument("--out", type=Path, help="write serving.json and the servers' logs into this folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.model not in SHAPES and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model}: neither a folder with a config.json nor one of {', '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as scratch:
        work = args.out or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        results: dict[str, dict[str, Any]] = {}
        for name in args.variants.split(","):
            print(f"serving {args.model} as {name}", file=sys.stderr, flush=True)
            results[name] = variant(name, args, work, Path(scratch))
            if args.out:
                (work / "serving.json").write_text(json.dumps({"args": vars(args) | {"out": None}, "results": results}))
        print(json.dumps(results, indent=1) if args.json else table(results, args.concurrency))
        return int(any("why" in runs for runs in results.values()))


if __name__ == "__main__":
    sys.exit(exit_code("bench.serving", main))
