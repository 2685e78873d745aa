"""Reading a JSON file that somebody wrote or fetched: whatever is wrong with it is one line."""

from __future__ import annotations

import json
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
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(str(path), problem.strerror or "cannot be read", remedy) from None
    except json.JSONDecodeError as problem:
        raise error(
            f"{path}:{problem.lineno}", f"no JSON ({problem.msg})", "mend the file, or fetch it again"
        ) from None
    except UnicodeDecodeError:
        raise error(str(path), "no UTF-8 text", broken) from None
    except RecursionError:
        raise error(str(path), "nested too deeply", broken) from None
