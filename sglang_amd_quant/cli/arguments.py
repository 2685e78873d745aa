"""Kinds of arguments that commands and benches share, each with an error that says what to write."""

from __future__ import annotations

import argparse
import math
import sys

from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.selection.arch import ARCHES, canonical
from sglang_amd_quant.selection.problem import MOST
from sglang_amd_quant.shapes.facts import ModelFacts
from sglang_amd_quant.shapes.recipes import unmatched

LEAST = 1e-9
"""The smallest fraction that anybody means."""


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


def tcp_port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r}: write a port from 1 to 65535")
    return int(text)


def wholes(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas; each counts once."""
    parts = text.split(",")
    if any(part.isdecimal() and (len(part) > len(str(MOST)) or int(part) > MOST) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers of at most {MOST}, as 1,16,64")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers of at least 1, as 1,16,64")
    return tuple(dict.fromkeys(map(int, parts)))


def above_zero(text: str) -> float:
    """A finite number above 0, and so far above that what is divided by it stays finite."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not LEAST <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number above 0, of at least {LEAST:g}")
    return value


def recipe_file(path: str, facts: ModelFacts) -> Recipe:
    """The recipe in a file. Where a server would stop, a pattern of no layer is told on stderr here: a plan lists GEMMs
    of the language model only, and the pattern may be about others."""
    recipe = Recipe.load(path)
    for pattern in unmatched(facts, recipe):
        print(f"note: {path}: {pattern!r} matches no layer of {facts.name} that is planned", file=sys.stderr)
    return recipe
