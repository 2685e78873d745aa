"""`amd-mx`: dispatches to one module per command, importing only the one that is asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from textwrap import indent

from sglang_amd_quant import __version__
from sglang_amd_quant.cli.ending import exit_code

COMMANDS: dict[str, str] = {
    "quantize": "convert a bf16 checkpoint to MX formats or int4",
    "inspect": "say what a checkpoint holds, and what is wrong with it",
    "build": "compile the HIP kernels, and say what they cost",
    "doctor": "say what is installed, and what would serve here",
    "shapes": "list every GEMM of a model for TP x EP, with bytes, floors and pads",
    "explain": "say which kernel a GEMM gets, and why",
    "coverage": "say what every GEMM of a model would run on, and what is untuned",
    "packs": "check, compare and join packs of tuned entries",
}
"""Command name -> one line of help. The code of command `x` is `sglang_amd_quant.cli.x`, which offers
`DESCRIPTION`, `EXAMPLE`, `add_arguments(parser)` and `run(args) -> exit code`."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 good, 1 problems found, 2 the command could not be carried out."""
    argv = sys.argv[1:] if argv is None else argv
    program = f"amd-mx {argv[0]}" if argv and argv[0] in COMMANDS else "amd-mx"
    return exit_code(program, lambda: _run(argv))


def _run(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an arrow or a file's name may be beyond the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="amd-mx",
        description="Quantize, inspect and explain MX and int4 models for SGLang on AMD GPUs.",
        epilog="amd-mx COMMAND --help tells more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"amd-mx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        if argv and argv[0] == name:
            module = importlib.import_module(f"sglang_amd_quant.cli.{name}")
            command = commands.add_parser(
                name,
                help=line,
                description=module.DESCRIPTION,
                epilog=f"example:\n{indent(module.EXAMPLE, '  ')}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=line)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
