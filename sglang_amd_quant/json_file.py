"""Reading a JSON file that somebody wrote or fetched: whatever is wrong with it is one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_amd_quant.errors import AmdMxError, CheckpointError


def read_json(path: Path, remedy: str, error: type[AmdMxError] = CheckpointError) -> Any:
    """What the file holds.

    Args:
        path: the file.
        remedy: what the message says to do where there is no readable file.
        error: what to raise.

    Raises:
        AmdMxError: `error`, where there is no such file, or no JSON in it.
    """
    broken = "mend the file, or fetch it again"
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_contradiction)
    except OSError as problem:
        raise error(str(path), problem.strerror or "cannot be read", remedy) from None
    except json.JSONDecodeError as problem:
        raise error(f"{path}:{problem.lineno}", f"no JSON ({problem.msg})", broken) from None
    except UnicodeDecodeError:
        raise error(str(path), "no UTF-8 text", broken) from None
    except ValueError as problem:  # a number of thousands of digits, or a contradiction
        raise error(str(path), str(problem).partition(";")[0], broken) from None
    except RecursionError:
        raise error(str(path), "nested too deeply", broken) from None


def without_contradiction(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as the `object_pairs_hook` of json, which by itself keeps the last of several values of a key.

    Raises:
        ValueError: a key stands there twice, with different values.
    """
    made: dict[str, Any] = {}
    for key, value in pairs:
        if made.setdefault(key, value) != value:
            raise ValueError(f"{key!r} stands there twice, with different values")
    return made
