"""Sets of packs: which files there are, the index that lookups go by, and who owns a shape."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path

from sglang_amd_quant.selection.pack_csv import (
    ENV_PACKS,
    MEASURED,
    At,
    PackError,
    PackRow,
    Shape,
    load_file,
    no_collection,
)

logger = logging.getLogger(__name__)


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

    @no_collection()
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
