"""A Hugging Face tokenizer from the SentencePiece-BPE vocabulary that a GGUF carries.

SentencePiece-BPE joins, again and again, the neighbouring symbols whose concatenation is the vocabulary's best-scored
piece. `tokenizers` wants that as an ordered list of merges; every way of splitting a piece into two others is one.
User-defined pieces (runs of newlines and blanks, HTML tags) are cut out first and never merged, control pieces
(`<bos>`, `<end_of_turn>`) are single ids, and what no piece covers falls back to UTF-8 bytes.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""SentencePiece writes a blank as U+2581."""

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}
{%- elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\n' }}
{%- else %}{{ 'Answer: ' + message['content'] + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"""
"""Questions and answers in plain words, for a GGUF without a template of its own. A pretrained model has never seen
Gemma's `<start_of_turn>` (it repeats the question for ever), but knows how a list of questions and answers goes on."""


class PieceType(IntEnum):
    """`tokenizer.ggml.token_type` (llama.cpp's `llama_token_type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def merges(pieces: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Merges in the order SentencePiece would prefer them: by falling score of the piece they make.

    The pieces of one merge are both in the vocabulary; a piece of n characters has up to n - 1 of them, which rank next
    to each other, earlier halves first.
    """
    normal = {p: i for i, (p, t) in enumerate(zip(pieces, types, strict=True)) if t == PieceType.NORMAL}
    ranked: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda p: -scores[normal[p]]):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in normal and right in normal]
        ranked += sorted(pairs, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return ranked


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer described by a GGUF's `tokenizer.ggml.*` fields (`tokenizer.ggml.model` = `llama`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces: list[str] = meta["tokenizer.ggml.tokens"]
    types: list[int] = meta["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges(pieces, meta["tokenizer.ggml.scores"], types),
            unk_token=pieces[meta["tokenizer.ggml.unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # Control pieces are looked for in the text as written, user-defined ones after blanks became U+2581.
    of_type = {kind: [p for p, t in zip(pieces, types, strict=True) if t == kind] for kind in set(types)}
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in of_type[PieceType.CONTROL]])
    tokenizer.add_tokens([AddedToken(p, normalized=True) for p in of_type[PieceType.USER_DEFINED]])
    if meta["tokenizer.ggml.add_bos_token"]:
        bos = meta["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pieces[bos]} $A",
            pair=f"{pieces[bos]} $A {pieces[bos]}:1 $B:1",
            special_tokens=[(pieces[bos], bos)],
        )
    return tokenizer


def write_tokenizer(meta: dict[str, Any], out: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json, with the chat template, to a directory. Returns the tokenizer."""
    tokenizer = build_tokenizer(meta)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    pieces = meta["tokenizer.ggml.tokens"]
    config = {
        "tokenizer_class": "GemmaTokenizer",  # by name: SGLang loads a nameless one four times over, 14 s a process
        "bos_token": pieces[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": pieces[meta["tokenizer.ggml.eos_token_id"]],
        "unk_token": pieces[meta["tokenizer.ggml.unknown_token_id"]],
        "pad_token": pieces[meta["tokenizer.ggml.padding_token_id"]],
        "add_bos_token": meta["tokenizer.ggml.add_bos_token"],
        "model_max_length": meta["gemma3.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template", CHAT_TEMPLATE),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer
