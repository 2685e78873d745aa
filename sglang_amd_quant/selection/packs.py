"""Tuned entries as CSV: one schema for all ops, checked row by row with file and line. See `docs/packs.md`."""

from __future__ import annotations

import csv
import datetime
import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from itertools import chain, repeat
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

logger = logging.getLogger(__name__)


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
            datetime.date.fromisoformat(text)
        except ValueError:
            raise ValueError("is no date of the form YYYY-MM-DD") from None
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
    "us": _number,
    "err": _number,
    "peer_us": _number,
    "device": str,
    "versions": str,
    "date": _date,
    "source": _one_of((MEASURED, PUBLISHED)),
    "note": str,
}
"""Column -> how its text is read; raises ValueError with the reason. Each distinct text is parsed once."""

_NAMES = tuple(COLUMNS)
_CONFIG = slice(_NAMES.index("block_m"), _NAMES.index("params") + 1)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection off: a hundred thousand tuples that all live on would be walked again and again (2 x time)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_no_collection()
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
    header = next(csv.reader(lines[i - 1] for i in numbers[:1]), [])
    if header != list(_NAMES):
        raise PackError(f"{path}:{numbers[0] if numbers else 1}", "wrong header", f"write {','.join(_NAMES)}")
    del numbers[0]
    cells = _cells([lines[i - 1] for i in numbers], numbers, path)
    columns = [_parse_column(name, cells[i :: len(_NAMES)], path, numbers) for i, name in enumerate(_NAMES)]
    columns[_CONFIG] = [_configs(columns[_CONFIG])]
    entries = list(map(PackRow._make, zip(*columns, repeat(str(path)), numbers, strict=False)))
    _check_rows(entries)
    return entries


def _cells(lines: list[str], numbers: list[int], path: Path) -> list[str]:
    """All cells, row after row: as csv has them, or where nothing is quoted by a plain split (2 x as fast)."""
    quoted = any('"' in line for line in lines)
    rows = list(csv.reader(lines)) if quoted else []
    widths = [len(row) for row in rows] if quoted else [line.count(",") + 1 for line in lines]
    for number, width in zip(numbers, widths, strict=False):
        if width != len(_NAMES):
            raise PackError(f"{path}:{number}", f"{width} columns", f"write {len(_NAMES)} columns, one line a row")
    if quoted:
        return list(chain.from_iterable(rows))
    return ",".join(lines).split(",") if lines else []


def _parse_column(name: str, column: Sequence[str], path: Path, numbers: list[int]) -> list[Any]:
    parse, values = COLUMNS[name], {}
    for text in set(column):
        try:
            values[text] = parse(text.strip())
        except ValueError as error:
            place = f"{path}:{numbers[column.index(text)]}"
            raise PackError(place, f"{name} {text!r} {error}", "see docs/packs.md") from None
    return list(map(values.__getitem__, column))


def _configs(columns: Sequence[Sequence[Any]]) -> list[Config]:
    values = list(zip(*columns, strict=True))
    known = {value: Config._make(value) for value in set(values)}
    return list(map(known.__getitem__, values))


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


def pack_files(places: Iterable[str | Path]) -> list[Path]:
    """The pack files that files and folders name, in order; those of a folder sorted by path.

    Raises:
        PackError: a place that does not exist.
    """
    files: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            files += sorted(place.rglob("*.csv"))
        elif place.is_file():
            files.append(place)
        else:
            raise PackError(str(place), "no such file or folder", f"check {ENV_PACKS}, or name another")
    return files


def shipped_dir() -> Path:
    """The folder of the packs that come with this package."""
    return Path(str(resources.files("sglang_amd_quant.configs"))) / "packs"


class Packs:
    """A set of packs, indexed for lookup.

    Rows of one shape stand in the order in which they win a tie: measured before published; among those, extra packs
    in the order given before the shipped ones; then by file and line. The order never depends on anything else.
    """

    def __init__(self, rows: Iterable[PackRow]) -> None:
        self.rows = sorted(rows, key=lambda row: row.source != MEASURED)
        self._index: dict[Shape, dict[At, list[PackRow]]] = {}
        for row in self.rows:
            by_at = self._index.setdefault((row.arch, row.op, row.scheme, row.n, row.k), {})
            by_at.setdefault(row.at, []).append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def shape(self, shape: Shape) -> Mapping[At, list[PackRow]]:
        """The entries of one shape by what their M is, each list in the order of precedence."""
        return self._index.get(shape, {})

    def duplicates(self) -> Iterator[list[PackRow]]:
        """Entries that share a key: each list holds its rows in the order of precedence."""
        owners: dict[tuple[object, ...], list[PackRow]] = {}
        for by_at in self._index.values():
            for rows in by_at.values():
                if len(rows) > 1:
                    for row in rows:
                        owners.setdefault(row.key, []).append(row)
        return (rows for rows in owners.values() if len(rows) > 1)


@lru_cache(maxsize=8)
def load_packs(places: tuple[str, ...]) -> Packs:
    """Read and index pack files and folders, earlier ones first in precedence.

    Entries with two owners are said in one warning; the first in precedence wins. Nothing is ever written.

    Raises:
        PackError: a place or row that cannot be read.
    """
    packs = Packs(row for path in dict.fromkeys(pack_files(places)) for row in load_file(path))
    doubled = [rows for rows in packs.duplicates() if rows[0].source == rows[1].source]
    if doubled:
        first = doubled[0]
        logger.warning(
            "%d pack entries have two owners, the first in order wins: e.g. %s over %s; `amd-mx packs lint` lists them",
            len(doubled), first[0].place, first[1].place,
        )  # fmt: skip
    return packs


def installed_packs() -> Packs:
    """The packs that serve here: those of `SGLANG_AMD_MX_PACKS`, then the shipped ones."""
    extra = [place for place in os.environ.get(ENV_PACKS, "").split(os.pathsep) if place]
    return load_packs((*extra, str(shipped_dir())))


def write_file(path: Path, rows: Iterable[PackRow]) -> None:
    """Write a pack, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(VERSION_LINE + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_NAMES)
        writer.writerows(map(to_texts, rows))
    partial.replace(path)


def to_texts(row: PackRow) -> list[str]:
    """The row as the texts of its columns."""
    config = [*row.config[:-1], ";".join(f"{name}={value}" for name, value in row.config.params)]
    values = [*row[: _CONFIG.start], *config, *row[_CONFIG.start + 1 : -2]]
    return ["" if value is None else str(value) for value in values]
