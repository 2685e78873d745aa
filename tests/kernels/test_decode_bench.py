"""What bench.decode does around its measurements: arguments, operands, bounds, and what it hands to peers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sglang_amd_quant.kernels.hip.manifest import find
from sglang_amd_quant.kernels.triton.group_gemm import group_gemm_torch

from bench import decode_peers
from bench.arguments import names
from bench.decode import beside, parser, table
from bench.decode_peers import FOR, PEERS, _for_humming
from bench.decode_problem import NAMES, Problem, Reference
from bench.decode_warm_up import OURS, Task, tasks
from bench.timing import autotune_briefly, autotune_never
from sglang_amd_quant.formats import nibbles
from sglang_amd_quant.runtime.decode_plans import plans
from sglang_amd_quant.tensor import MxTensor

INT4 = [name for name in NAMES if name.startswith("int4")]


def small(name: str, k: int = 256, n: int = 48, **options: object) -> Problem:
    return Problem(name, k, n, seed=3, sets=2, device="cpu", **options)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_kernels_and_plans(name: str) -> None:
    assert find(f"decode_{name}_m8", "sm_90")
    assert plans(name, 8, 2304, 6144, 132)


def test_arguments() -> None:
    read = names(NAMES)
    assert read("w4a8,int4_*_g64,w4a8") == ["w4a8", "int4_w4a16_g64", "int4_w4a16_fp16_g64"]
    assert read("") == []
    with pytest.raises(argparse.ArgumentTypeError, match="int4_w4a16: not among mxfp8, "):
        read("w4a8,int4_w4a16")
    args = parser().parse_args([])
    assert (args.schemes, args.shapes[0], args.m[-1]) == (["mxfp8", "w4a8", "w4a16"], (6144, 2304), 64)
    with pytest.raises(SystemExit):
        parser().parse_args(["--shapes", "6144"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", INT4)
def test_int4_operands(name: str, symmetric: bool) -> None:
    """Bytes of the floor are those that kernels read, and peers' dtypes hold what kernels multiply."""
    p = small(name, symmetric=symmetric)
    group = int(name.rpartition("_g")[2])
    assert (p.scheme.block, p.dtype) == (group, torch.float16 if "fp16" in name else torch.bfloat16)
    for w, (data, words, factors) in zip(p.weights, p.packed, strict=True):
        assert (p.bytes, factors) == (data.nbytes + words.nbytes, None)
        assert torch.equal(w.scales.to(p.dtype).float(), w.scales.float())
        assert (w.zeros is None) == symmetric
        kept = w.with_words().to_layout("mma_int4+tile_group")
        assert torch.equal(kept.data, data)
        assert torch.equal(kept.dequantize(), w.dequantize())
    assert not torch.equal(p.weights[0].data, p.weights[1].data)
    x, exact = p.activations(3, 1)
    assert x.dtype == p.dtype
    assert torch.equal(x.double(), exact)


@pytest.mark.parametrize("name", INT4)
def test_int4_bound(name: str) -> None:
    """The torch twin in fp32 is within it; a zero point that is one off is not, nor an element that was not stored."""
    p = small(name, k=1024)
    reference = Reference(p, 5, seed=2)
    w = p.weights[0].with_words()

    def twin(x: torch.Tensor, y: torch.Tensor) -> None:
        y.copy_(group_gemm_torch(x, w.data, w.scales))

    def one_off(x: torch.Tensor, y: torch.Tensor) -> None:
        words = w.scales.clone()
        words[7, 2] ^= 1
        y.copy_(group_gemm_torch(x, w.data, words))

    assert reference.check(twin, "twin") < 1e-6
    with pytest.raises(AssertionError, match=rf"{name} M=5 N=48 K=1024 wrong: .* x bound"):
        reference.check(one_off, "wrong")
    with pytest.raises(AssertionError, match="not every output is finite"):
        reference.check(lambda x, y: y[:, :-1].zero_(), "unwritten")


@pytest.mark.parametrize("name", ["mxfp8", "w4a8", "mxfp4", "w4a16"])
def test_mx_bound(name: str) -> None:
    p = small(name, k=1024)
    reference = Reference(p, 5, seed=2)
    exact = p.activations(5, 2)[1]
    assert reference.check(lambda x, y: y.copy_(exact.float() @ p.values(0).T), "twin") < 1e-5
    data, scales, factors = p.packed[0]
    assert data.nbytes + (0 if scales is None else scales.nbytes) >= p.bytes - p.n * p.k // 32
    assert factors is not None


@pytest.mark.parametrize("name", INT4)
def test_humming_gets_rows_of_zero_points_in_words(name: str) -> None:
    w = small(name).weights[1]
    config, tensors = _for_humming(w, torch.float16)
    assert (config["has_zero_point"], config["group_size"]) == (True, w.scheme.block)
    assert tensors["weight"].shape == (w.n, w.k // 8)
    assert tensors["weight_scale"].dtype == torch.float16
    row, group = 8 * 3 + 5, 1
    assert tensors["zero_point"][3, group] >> 4 * 5 & 15 == w.zeros[row, group]
    assert tensors["weight"][row, 2] >> 4 * 6 & 15 == nibbles.unpack(w.data)[row, 8 * 2 + 6]
    config, tensors = _for_humming(small(name, symmetric=True).weights[0], torch.float16)
    assert not config["has_zero_point"]
    assert set(tensors) == {"weight", "weight_scale"}


def test_every_peer_has_weights_and_takes_mx_tensors() -> None:
    assert set(PEERS) == {name for known in FOR.values() for name in known}
    p = small("int4_w4a16_fp16_g32")
    x, exact = p.activations(3, 1)
    assert isinstance(p.weights[0], MxTensor)
    y = PEERS["cublas_bf16"](p.weights[0], p.dtype)(x)
    assert y.dtype == torch.float16
    assert (y.double() - exact @ p.values(0).double().T).abs().max() < 0.1


def test_what_is_compiled_ahead() -> None:
    every = tasks(["w4a8", "int4_w4a16_g32"], [(64, 32)], [16, 2], ["gemlite_a16w4", "gemlite_int4"])
    assert every == [
        Task(m, scheme, 64, 32, peer)
        for m in (2, 16)
        for scheme, peers in (("w4a8", ("gemlite_a16w4", OURS)), ("int4_w4a16_g32", ("gemlite_int4", OURS)))
        for peer in peers
    ]


def test_autotuners(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton calls what times a configuration: a launch and `quantiles`."""
    import triton.testing

    asked = {}
    monkeypatch.setattr(triton.testing, "do_bench", lambda launch, **options: asked.update(options))
    autotune_briefly()
    triton.testing.do_bench(lambda: None, quantiles=(0.5,))
    assert set(asked) == {"warmup", "rep", "quantiles"}
    autotune_never()
    launched = []
    assert triton.testing.do_bench(lambda: launched.append(1), quantiles=(0.5, 0.2, 0.8)) == [0.0] * 3
    assert launched == [1]


def test_tuned_triton_is_the_fastest_tile_that_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every M once; tiles are as high as M."""
    import triton

    tried = []

    def timed(launch, quantiles):  # type: ignore[no-untyped-def]
        *_, tile = launch.args
        tried.append(tile)
        if tile.block_n == 32:
            raise triton.OutOfResources(300000, 232448, "shared memory")
        return [tile.num_stages / tile.block_k] * 3

    monkeypatch.setattr(triton.testing, "do_bench", timed)
    monkeypatch.setattr(decode_peers, "_TUNED", {})
    w = small("w4a8").weights[0]
    for m, rows in ((1, 16), (17, 32), (64, 64), (300, 64)):
        for _ in range(2):
            tile = decode_peers._tuned(torch.empty(m, w.k), w, torch.bfloat16)
        assert (tile.block_m, tile.block_n, tile.block_k, tile.num_stages) == (rows, 64, 256, 2)
    assert len(tried) == len(set(tried)) + 24 == 4 * 24


def test_the_report_says_which_peers_have_no_time(tmp_path: Path) -> None:
    row = {
        "scheme": "int4_w4a16_fp16_g128",
        "K": 256,
        "N": 64,
        "us": 2.0,
        "alone": 3.0,
        "floor_us": 1.0,
        "of_floor": 0.5,
    }
    none, some = {"why": "ImportError: no gemlite"}, {"us": 4.0, "error": 0.0}
    rows = [row | {"M": m, "peers": {"gemlite_int4": none, "humming_bf16": some}} for m in (1, 2)]
    result = {"device": "a GPU", "torch": "2", "read_bandwidth_GB_s": 3000.0, "rows": rows}
    lines = table(result).splitlines()
    assert lines[-1] == ("no time of gemlite_int4 for int4_w4a16_fp16_g128 256 to 64: ImportError: no gemlite (M=1,2)")
    assert lines[-2].endswith("humming_bf16      4.00   2.00")
    file = tmp_path / "decode.json"
    file.write_text(json.dumps(result))
    shown = parser().parse_args(["--show", str(file)]).show
    assert beside(None, shown) == result
    assert table(beside(["gemlite_int4"], shown)).splitlines()[-2].rstrip().endswith("50")
