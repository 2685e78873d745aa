"""How a program ends: one line where it could not be carried out. Commands, benches and examples share it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from sglang_amd_quant.errors import AmdMxError


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Run a program, and return the exit code that it gives.

    Args:
        program: its name, which lines on stderr begin with.
        run: carries it out and returns its exit code.

    Returns:
        That code; 2 where it raised an `AmdMxError` or met a file, folder or disk that does not serve; 130 where a user
        stopped it; 0 where whoever read its output has read enough. Other exceptions are bugs and pass.
    """
    try:
        return run()
    except AmdMxError as error:
        line, code = str(error), 2
    except BrokenPipeError:
        return 0
    except OSError as error:
        what, why = error.filename or type(error).__name__, error.strerror or error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room, then repeat the command" if full else "check the path and its rights"
        line, code = f"{what}: {why}; {remedy}", 2
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    print(f"{program}: {line}", file=sys.stderr)
    return code
