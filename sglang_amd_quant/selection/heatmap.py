"""A coverage report as one HTML file with an SVG heat map: GEMM x M, coloured by the source of the choice."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from sglang_amd_quant.selection.coverage import Report, Row
from sglang_amd_quant.selection.problem import SOURCES, KernelChoice

LETTERS = dict(zip(SOURCES, "EPNBRHD-", strict=True))
"""One letter a source, so that a map can be read without its colours."""

COLOURS = {
    "exact": "#00473d",
    "padded_m": "#1f7a63",
    "nearest_e": "#8fd3b6",
    "borrowed": "#c9c3e6",
    "rule": "#3f62ad",
    "heuristic": "#f6c667",
    "default": "#e58a3c",
    "reference": "#b33a3a",
}
"""Greens are tuned, blues know the neighbourhood, warm ones guess; letters tell them apart in any colour vision."""

MEANING = {
    "exact": "an entry for this GEMM at this M",
    "padded_m": "an entry at the M that this one is padded to",
    "nearest_e": "an entry for another E on the same side of every threshold",
    "borrowed": "an entry for a neighbour, checked and staged again",
    "rule": "a measured rule for a range of shapes",
    "heuristic": "the arch's heuristic tile",
    "default": "the kernel's conservative default",
    "reference": "no kernel: torch reference",
}

CELL_W, CELL_H, LABEL_W, HEAD_H = 46, 26, 430, 46

_DARK = ("exact", "padded_m", "rule", "reference")
"""Sources whose colour takes white letters."""

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px; color: #1b1f24; background: #fff; }
h1 { font-size: 18px; margin: 0 0 4px; } p { margin: 4px 0; } .legend { margin: 16px 0; border-collapse: collapse; }
.legend td { padding: 2px 10px 2px 0; vertical-align: middle; } .legend td.n { text-align: right; }
svg { display: block; } svg text { font-family: inherit; }
.label { font-size: 13px; fill: #1b1f24; } .sub { font-size: 11px; fill: #5b6470; }
.m { font-size: 12px; fill: #1b1f24; }
.letter { font-size: 12px; font-weight: 600; text-anchor: middle; }
"""


_HATCHES = (
    '<svg width="0" height="0"><defs>'
    + "".join(
        f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<line x1="0" y1="0" x2="0" y2="6" stroke="{ink}" stroke-opacity="{opacity}" stroke-width="2.4"/></pattern>'
        for name, ink, opacity in (("on-dark", "#fff", 0.5), ("on-light", "#000", 0.16))
    )
    + "</defs></svg>"
)


def html(report: Report) -> str:
    """The whole file as text; nothing is loaded from elsewhere."""
    tuned, cells = report.tuned_percent, len(report.choices)
    told = [f"{tuned:.1f} % of {cells} cells are tuned for their GEMM (exact, padded M or nearest E)."]
    if report.without_binary:
        told.append(
            f"{report.without_binary} of {cells} cells plan a published mechanism of which this build has no kernel "
            "binary; there the torch reference would run."
        )
    if report.bf16:
        told.append(f"Not quantized, run by the engine: {', '.join(report.bf16)}.")
    kind = "recorded" if report.recorded else "planned"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>Coverage: {escape(report.title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>Kernel coverage, {kind}: {escape(report.title)}</h1>",
            *(f"<p>{escape(line)}</p>" for line in told),
            _HATCHES,
            *_legend(report),
            *_svg(report),
            "</body></html>",
            "",
        )
    )


def _legend(report: Report) -> Iterator[str]:
    yield '<table class="legend">'
    for source, count in report.totals().items():
        swatch = f'<svg width="{CELL_W}" height="22">{_box(source, 0, 0, 20, False)}</svg>'
        yield f'<tr><td>{swatch}</td><td><b>{source}</b></td><td class="n">{count}</td><td>{MEANING[source]}</td></tr>'
    if report.without_binary:
        swatch = f'<svg width="{CELL_W}" height="22">{_box("borrowed", 0, 0, 20, True, letter="")}</svg>'
        told = "no kernel binary in this build: the torch reference would run"
        count = report.without_binary
        yield f'<tr><td>{swatch}</td><td><b>hatched</b></td><td class="n">{count}</td><td>{told}</td></tr>'
    yield "</table>"


def _svg(report: Report) -> Iterator[str]:
    width = LABEL_W + CELL_W * len(report.ms) + 8
    height = HEAD_H + (CELL_H + 14) * len(report.rows) + 8
    yield f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    yield f'<text class="sub" x="{LABEL_W - 12}" y="{HEAD_H - 14}" text-anchor="end">tokens M</text>'
    for i, m in enumerate(report.ms):
        x = LABEL_W + CELL_W * i + CELL_W / 2 - 1
        yield f'<text class="m" x="{x}" y="{HEAD_H - 14}" text-anchor="middle">{m}</text>'
    for j, row in enumerate(report.rows):
        yield from _row(report, row, HEAD_H + (CELL_H + 14) * j)
    yield "</svg>"


def _row(report: Report, row: Row, y: int) -> Iterator[str]:
    layers = ", ".join(row.layers)
    where = f"{row.count} x {layers}" if layers else "recorded"
    if len(where) > 62:
        where = where[:61] + "…"
    yield f'<text class="label" x="0" y="{y + 13}">{escape(row.label)}</text>'
    yield f'<text class="sub" x="0" y="{y + 27}">{escape(where)} · {escape(row.layout.layout or "any layout")}</text>'
    for i, m in enumerate(report.ms):
        choice = row.choices.get(m)
        if choice:
            x = LABEL_W + CELL_W * i
            yield f"<g><title>{escape(_tip(row, m, choice))}</title>"
            yield f"{_box(choice.source, x, y, CELL_H, not choice.in_build)}</g>"


def _tip(row: Row, m: int, choice: KernelChoice) -> str:
    lines = (f"{row.label} M={m}", f"{choice.source}: {choice.kernel}", str(choice.config), *choice.why)
    return "\n".join(lines)


def _box(source: str, x: int, y: int, height: int, hatched: bool, letter: str | None = None) -> str:
    dark = source in _DARK
    box = f'x="{x}" y="{y}" width="{CELL_W - 2}" height="{height}" rx="3"'
    hatch = f'<rect {box} fill="url(#{"on-dark" if dark else "on-light"})"/>' if hatched else ""
    mark = LETTERS[source] if letter is None else letter
    ink, middle = "#fff" if dark else "#1b1f24", f'x="{x + CELL_W / 2 - 1}" y="{y + height / 2 + 4}"'
    text = f'<text class="letter" {middle} fill="{ink}">{mark}</text>'
    return f'<rect {box} fill="{COLOURS[source]}"/>{hatch}{text}'
