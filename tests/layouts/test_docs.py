"""The pictures and the table of docs/layouts.md are what the code does.

`python tests/layouts/test_docs.py` prints them all, for pasting.
"""

from pathlib import Path

import pytest
import torch

from sglang_amd_quant.layouts import SCALE_LAYOUTS, SOURCE_LAYOUTS, VALUE_LAYOUTS
from sglang_amd_quant.layouts.registry import SCALES, SOURCES, VALUES
from sglang_amd_quant.schemes import MX_BLOCK

DOCS = Path(__file__).parents[2] / "docs" / "layouts.md"

GRIDS = {
    # name: (matrix, rows to show, bytes that one cell of the picture stands for)
    "strided": ((32, 8), (0, 1, 2), 1),
    "cdna4_scale": ((64, 16), (0, 1, 15, 16, 17, 31, 32), 1),
    "preshuffle": ((32, 64), (0, 1, 15, 16), 16),
    "mxfp8_lane": ((32, 128), (0, 1, 15, 16), 16),
    "mma_tile": ((32, 64), (0, 1, 8, 16), 8),
    "cdna3_e2m1": ((32, 64), (0, 1, 15, 16), 4),
    "cdna3_e4m3": ((32, 64), (0, 1, 15, 16), 8),
    "tile_scale": ((32, 8), (0, 1, 15, 16), 1),
}


def grid(name: str) -> str:
    """Where each byte of a small matrix lies in storage."""
    (n, cols), shown, unit = GRIDS[name]
    layout = (VALUES | SCALES)[name]
    ids = torch.arange(n * cols).view(n, cols)
    low, high = (layout.pack((ids >> shift & 0xFF).to(torch.uint8)).flatten().long() for shift in (0, 8))
    offset = torch.empty(n * cols, dtype=torch.long)
    offset[low | high << 8] = torch.arange(n * cols)
    offset = offset.view(n, cols)[:, ::unit]
    heads = [str(k) if unit == 1 else f"{k}-{k + unit - 1}" for k in range(0, cols, unit)]
    lines = ["k =    " + "".join(f"{head:>8}" if unit > 1 else f"{head:>5}" for head in heads)]
    for previous, row in zip((None, *shown), shown, strict=False):
        if previous is not None and row != previous + 1:
            lines.append("  ...")
        lines.append(f"n = {row:<3}" + "".join(f"{int(at):>8}" if unit > 1 else f"{int(at):>5}" for at in offset[row]))
    return "\n".join(lines)


def slots(name: str) -> str:
    """Which element each nibble of a word holds, highest bits first."""
    ids = torch.arange(8, dtype=torch.uint8)
    if name in VALUES:
        axis, words = "k", VALUES[name].pack((ids[0::2] | ids[1::2] << 4).view(1, 4))
    elif name == "awq":
        axis, words = "n", SOURCES[name].pack((ids | ids << 4).view(8, 1).expand(8, 4))[0]
    else:
        axis, words = "k", SOURCES[name].pack((ids[0::2] | ids[1::2] << 4).view(1, 4).expand(8, 4))[0, 0]
    held = [int(words.flatten()[0]) >> 4 * slot & 15 for slot in reversed(range(8))]
    bits = "".join(f"{f'{4 * slot + 3}-{4 * slot}':>7}" for slot in reversed(range(8)))
    return f"bits   {bits}\n{axis} % 8  " + "".join(f"{element:>7}" for element in held)


PICTURES = dict.fromkeys(GRIDS, grid) | dict.fromkeys(("exllama", "awq", "gptq"), slots)


def table() -> str:
    """One row for each layout."""
    rows = ["| name | of | holds | padded to | pad byte | a kernel reads at least |", "|---|---|---|---|---|---|"]
    for spec in (*VALUE_LAYOUTS.values(), *SCALE_LAYOUTS.values(), *SOURCE_LAYOUTS.values()):
        unit = MX_BLOCK if spec.role == "scale" else None
        cols = f"{spec.tile_cols * unit} of K" if unit else f"{spec.tile_cols} bytes of K"
        tiles = "-" if (spec.tile_n, spec.tile_cols) == (1, 1) else f"{spec.tile_n} of N, {cols}"
        block = f"{spec.block_n} of N, " + (
            f"{spec.block_cols * unit} of K" if unit else f"{spec.block_cols} bytes of K"
        )
        pad = f"0x{spec.pad_byte:02X}" if spec.pads else "refused instead"
        rows.append(
            f"| `{spec.name}` | {spec.role}s | {', '.join(spec.elements)} | {tiles} | {pad} "
            f"| {'-' if spec.role == 'source' else block} |"
        )
    return "\n".join(rows)


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_what_the_code_does(name):
    assert f"```text\n{PICTURES[name](name)}\n```" in DOCS.read_text()


def test_the_table_is_what_the_code_says():
    assert table() in DOCS.read_text()


if __name__ == "__main__":
    print(table())
    for name, picture in PICTURES.items():
        print(f"\n{name}\n```text\n{picture(name)}\n```")
