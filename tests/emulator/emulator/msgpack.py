"""Decoder for the MessagePack subset that AMDGPU code-object notes use (https://msgpack.org, spec v5)."""

from __future__ import annotations

import struct
from typing import Any

_FIXED = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LITERAL = {0xC0: None, 0xC2: False, 0xC3: True}
# tag -> (kind, struct format of the length that follows)
_SIZED = {
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


def unpack(data: bytes) -> Any:
    """The first object in `data`. Raises ValueError on a tag outside the subset."""
    return _object(data, 0)[0]


def _object(data: bytes, at: int) -> tuple[Any, int]:
    tag = data[at]
    at += 1
    if tag <= 0x7F:
        return tag, at
    if tag >= 0xE0:
        return tag - 0x100, at
    if tag in _LITERAL:
        return _LITERAL[tag], at
    if tag in _FIXED:
        form = _FIXED[tag]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if tag in _SIZED:
        kind, form = _SIZED[tag]
        length = struct.unpack_from(form, data, at)[0]
        at += struct.calcsize(form)
    elif tag <= 0x8F:
        kind, length = "map", tag & 0x0F
    elif tag <= 0x9F:
        kind, length = "array", tag & 0x0F
    elif tag <= 0xBF:
        kind, length = "str", tag & 0x1F
    else:
        raise ValueError(f"MessagePack tag {tag:#x} at offset {at - 1} is not used by code-object notes")
    if kind == "str":
        return data[at : at + length].decode(), at + length
    items = []
    for _ in range(length * (2 if kind == "map" else 1)):
        item, at = _object(data, at)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at
