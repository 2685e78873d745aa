"""The CSV schema of tuned entries: one for all ops, checked row by row with file and line. See `docs/packs.md`."""

from __future__ import annotations

import csv
import datetime
import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sglang_amd_quant.errors import AmdMxError, SchemeError
from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.problem import OPS, Config

SCHEMA_VERSION = 1
VERSION_LINE = f"# amd-mx pack {SCHEMA_VERSION}"

ENV_PACKS = "SGLANG_AMD_MX_PACKS"
"""Further pack files or folders, in order, separated by `:`; they add to the shipped ones."""

MEASURED, PUBLISHED = "measured", "published"


class PackError(AmdMxError, ValueError):
    """A pack file that cannot be read, or a row that breaks the schema. `what` holds file:line."""


Shape = tuple[str, str, str, int, int]
"""arch, op, scheme, N, K."""

At = tuple[str, int]
"""What an entry's M is given as, and its value."""


class PackRow(NamedTuple):
    """One tuned entry. None = not stated: for a dimension, any.

    Attributes are the columns, but for the config columns, which are one `config`. `e` is E_local.
    """

    arch: str
    cu_num: int | None
    op: str
    scheme: str
    n: int
    k: int
    e: int | None
    top_k: int | None
    tp: int | None
    ep: int | None
    m: int | None
    m_routed: int | None
    group: int | None
    layout: str | None
    kernel: str
    config: Config
    us: float | None
    err: float | None
    peer_us: float | None
    device: str
    versions: str
    date: str
    source: str
    note: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def shape(self) -> Shape:
        """What the index is by."""
        return self.arch, self.op, self.scheme, self.n, self.k

    @property
    def at(self) -> At:
        """The M that it is for: `M`, `M_routed`, or where neither is stated the `block_m` that routing must give."""
        if self.m is not None:
            return "M", self.m
        if self.m_routed is not None:
            return "M_routed", self.m_routed
        return "block_m", self.config.block_m or 0

    @property
    def key(self) -> tuple[object, ...]:
        """What has one owner in a set of packs: everything a lookup can tell apart.

        tp and ep say where a shape comes from and do not count. BLOCK_M counts where no M is given: it is then the M.
        """
        return (*self.shape, self.cu_num, self.e, self.top_k, *self.at, self.group, self.layout)


def _one_of(known: Iterable[str]) -> Callable[[str], str]:
    names = frozenset(known)

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"is none of {', '.join(sorted(names))}")
        return text

    return parse


def _integer(least: int) -> Callable[[str], int | None]:
    def parse(text: str) -> int | None:
        if not text:
            return None
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"is no whole number of at least {least}")
        return int(text)

    return parse


def _dimension(text: str) -> int:
    value = _integer(1)(text)
    if value is None:
        raise ValueError("must not be empty")
    return value


def _number(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("is no finite number of at least 0")
    return value


def _time(text: str) -> float | None:
    value = _number(text)
    if value == 0:
        raise ValueError("is no time above 0")
    return value


def _layout(text: str) -> str | None:
    if not text:
        return None
    try:
        return TensorLayout.parse(text).name
    except SchemeError as error:
        raise ValueError(error.reason) from None


def _params(text: str) -> tuple[tuple[str, int], ...]:
    pairs = [part.partition("=") for part in text.split(";") if part]
    if any(not name.isidentifier() or not value.isdecimal() for name, _, value in pairs):
        raise ValueError("is not of the form name=1;other=2")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError("names a parameter twice")
    return tuple(sorted((name, int(value)) for name, _, value in pairs))


def _name(text: str) -> str:
    if not text.isidentifier():
        raise ValueError("is no kernel name")
    return text


def _date(text: str) -> str:
    if text:
        try:
            same = datetime.date.fromisoformat(text).isoformat() == text  # other forms of ISO 8601 are read too
        except ValueError:
            same = False
        if not same:
            raise ValueError("is no date of the form YYYY-MM-DD")
    return text


_optional, _zero = _integer(1), _integer(0)

COLUMNS: dict[str, Callable[[str], Any]] = {
    "arch": _one_of(ARCHES),
    "cu_num": _optional,
    "op": _one_of(OPS),
    "scheme": _one_of(SCHEMES),
    "N": _dimension,
    "K": _dimension,
    "E": _optional,
    "top_k": _optional,
    "tp": _optional,
    "ep": _optional,
    "M": _optional,
    "M_routed": _optional,
    "group": _optional,
    "layout": _layout,
    "kernel": _name,
    "block_m": _zero,
    "block_n": _zero,
    "block_k": _zero,
    "split_k": _zero,
    "num_warps": _zero,
    "num_stages": _zero,
    "waves_per_eu": _zero,
    "nonkdim": _zero,
    "params": _params,
    "us": _time,
    "err": _number,
    "peer_us": _time,
    "device": str,
    "versions": str,
    "date": _date,
    "source": _one_of((MEASURED, PUBLISHED)),
    "note": str,
}
"""Column -> how its text is read; raises ValueError with the reason."""

_NAMES = tuple(COLUMNS)
_CONFIG = slice(_NAMES.index("block_m"), _NAMES.index("params") + 1)

_GROUPS = (10, 4, 10, 3, 5)
"""Columns are read in groups: shape; M and layout; kernel and config; figures; where they come from. Of most groups
many rows hold the same text, and each distinct text is parsed once. Only the last group's cells may be quoted."""

_LINE = re.compile(",".join([*(rf"([^,]*(?:,[^,]*){{{size - 1}}})" for size in _GROUPS[:-1]), "(.*)"]))


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage collection off: a hundred thousand tuples that all live on would be walked again and again (2 x time)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@no_collection()
def load_file(path: Path) -> list[PackRow]:
    """Read one pack.

    Raises:
        PackError: naming file and line: unreadable, of another version, or a row that breaks the schema.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(str(path), f"cannot be read ({error})", f"check {ENV_PACKS}, or name another file") from None
    first = lines[0].strip() if lines else ""
    if first != VERSION_LINE:
        raise PackError(f"{path}:1", f"begins with {first!r}", f"a pack of this version begins with {VERSION_LINE!r}")
    numbers = [i for i, line in enumerate(lines, 1) if line and line[0] != "#"]
    header = lines[numbers[0] - 1] if numbers else ""
    if header.split(",") != list(_NAMES):
        raise PackError(f"{path}:{numbers[0] if numbers else 1}", "wrong header", f"write {','.join(_NAMES)}")
    del numbers[0]
    matches = [_LINE.fullmatch(lines[i - 1]) for i in numbers]
    if None in matches:
        number = numbers[matches.index(None)]
        raise _width_error(f"{path}:{number}", lines[number - 1].count(",") + 1)
    groups = [
        _parse_group(group, texts, path, numbers)
        for group, texts in enumerate(zip(*(match.groups() for match in matches if match), strict=True))
    ]
    file = str(path)
    entries = [
        PackRow._make((*shape, *m, kernel, Config._make(config), *figures, *origin, file, line))
        for shape, m, (kernel, *config), figures, origin, line in zip(*groups, numbers, strict=True)
    ]
    _check_rows(entries)
    return entries


def _parse_group(group: int, texts: Sequence[str], path: Path, numbers: list[int]) -> list[tuple[Any, ...]]:
    """The values of one group of columns, row by row."""
    first, last = sum(_GROUPS[:group]), group == len(_GROUPS) - 1
    names = _NAMES[first : first + _GROUPS[group]]
    parsed: dict[str, tuple[Any, ...]] = {}
    for text in dict.fromkeys(texts):
        try:
            cells = next(csv.reader([text])) if last else text.split(",")
        except csv.Error as error:
            raise PackError(f"{path}:{numbers[texts.index(text)]}", f"no CSV ({error})", "see docs/packs.md") from None
        if len(cells) != len(names):
            raise _width_error(f"{path}:{numbers[texts.index(text)]}", first + len(cells))
        values = []
        for name, cell in zip(names, cells, strict=True):
            try:
                values.append(COLUMNS[name](cell.strip()))
            except ValueError as error:
                place = f"{path}:{numbers[texts.index(text)]}"
                raise PackError(place, f"{name} {cell!r} {error}", "see docs/packs.md") from None
        parsed[text] = tuple(values)
    return [parsed[text] for text in texts]


def _width_error(place: str, width: int) -> PackError:
    return PackError(place, f"{width} columns", f"write {len(_NAMES)} columns, one line a row")


def _check_rows(rows: list[PackRow]) -> None:
    """What takes more than one column to tell."""
    for row in rows:
        wrong = None
        if row.op == "linear":
            if row.m is None or row.m_routed is not None:
                wrong = "a linear entry states M, not M_routed"
            elif row.e is not None or row.top_k is not None:
                wrong = "a linear entry has no E and no top_k"
        elif row.m is not None and row.m_routed is not None:
            wrong = "states both M and M_routed"
        elif row.m is None and row.m_routed is None and row.config.block_m is None:
            wrong = "states neither M nor M_routed nor block_m"
        if row.source == PUBLISHED:
            if not row.note:
                wrong = "a published entry names its origin in note"
        elif row.us is None or row.err is None or not (row.device and row.versions and row.date):
            wrong = "a measured entry states us, err, device, versions and date"
        if wrong:
            raise PackError(row.place, wrong, "see docs/packs.md")


def write_file(path: Path, rows: Iterable[PackRow]) -> None:
    """Write a pack, whole or not at all; to a device or a pipe, as it comes."""
    if path.exists() and not path.is_file():
        _write(path, rows)
        return
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    partial = target.with_name(target.name + ".partial")
    _write(partial, rows)
    try:
        partial.replace(target)
    except OSError:
        partial.unlink()
        raise


def _write(path: Path, rows: Iterable[PackRow]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(VERSION_LINE + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_NAMES)
        writer.writerows(map(to_texts, rows))


def to_texts(row: PackRow) -> list[str]:
    """The row as the texts of its columns."""
    config = [*row.config[:-1], ";".join(f"{name}={value}" for name, value in row.config.params)]
    values = [*row[: _CONFIG.start], *config, *row[_CONFIG.start + 1 : -2]]
    return ["" if value is None else str(value) for value in values]
