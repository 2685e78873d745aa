"""Every `amd-mx` command that the README, the docs and the help show is one that `amd-mx` takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from sglang_amd_quant.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
_SHOWN = re.compile(r"`(amd-mx [^`\n]+)`|^(?:    )?(?:\$ )?(amd-mx [^|#\n]+)", re.MULTILINE)
_NO_COMMAND = re.compile(r"\.\.\.|\[|: ")


def shown() -> list[str]:
    """Whole commands: not those that leave something out, a message, or a bare name."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [page.read_text() for page in pages]
    texts += [str(importlib.import_module(f"sglang_amd_quant.cli.{command}").EXAMPLE) for command in COMMANDS]
    found = {(a or b).strip() for text in texts for a, b in _SHOWN.findall(text)}
    return sorted(line for line in found if len(line.split()) > 2 and not _NO_COMMAND.search(line))


def test_there_are_some() -> None:
    assert len(shown()) > 20


@pytest.mark.parametrize("line", shown())
def test_shown_commands_are_taken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, command, *arguments = shlex.split(line.replace("--tp N", "--tp 8").replace("--tp T --ep P", "--tp 8 --ep 2"))
    monkeypatch.setattr(f"sglang_amd_quant.cli.{command}.run", lambda args: 0)
    assert main([command, *arguments]) == 0
