"""Kinds of arguments that commands share, each with an error that says what to write."""

from __future__ import annotations

import argparse

from sglang_amd_quant.selection.arch import ARCHES, canonical


def known_arch(text: str) -> str:
    """An architecture that selection has facts of, by family name."""
    if canonical(text) not in ARCHES:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown: use one of {', '.join(ARCHES)}, or a member as gfx1151")
    return canonical(text)


def device_arch(text: str) -> str:
    """An architecture as a driver reports it, of which code objects may be there, or a family's name."""
    known_arch(text)
    return text.partition(":")[0]


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number of at least 1")
    return int(text)


def wholes(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas; each counts once."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers of at least 1, as 1,16,64")
    return tuple(dict.fromkeys(map(int, parts)))
