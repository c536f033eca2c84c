"""Mutations of bytes and of nested values, driven by a random generator."""

import copy
import struct
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

__all__ = ["HOSTILE", "mutate_bytes", "mutate_value", "nested", "resize_png"]

HOSTILE: tuple[Any, ...] = (
    *(None, True, "", "text", "1", "é\n\t", "x" * 5000, b"bytes", [], {}, [[]], [None], {"a": 1}),
    *(0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30)),
    *(0.5, -0.0, float("nan"), float("inf"), float("-inf"), 1e308),
)
"""Values that take the place of valid ones."""


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Return changed bytes: flipped, cut, inserted, doubled or overwritten."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 50))):
        if not changed:
            break
        place = rng.randrange(len(changed))
        length = rng.choice((1, 2, 4, 8, 100))
        kind = rng.choice(
            ("flip", "flip", "byte", "cut", "end", "insert", "double", "ones", "zeros")
        )
        if kind == "flip":
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[place] = rng.randrange(256)
        elif kind == "cut":
            del changed[place : place + length]
        elif kind == "end":
            del changed[max(place, 1) :]
        elif kind == "insert":
            changed[place:place] = rng.randbytes(length)
        elif kind == "double":
            changed[place:place] = changed[place : place + length]
        else:
            part = changed[place : place + length]
            changed[place : place + length] = (b"\xff" if kind == "ones" else b"\0") * len(part)
    return bytes(changed)


def mutate_value(rng: Random, tree: Any, hostile: Sequence[Any] = HOSTILE) -> tuple[Any, str]:
    """Return a changed copy of nested dicts and lists, and the place of the change.

    A value at a random place is replaced, removed, doubled, renamed or nested deeply.
    """
    changed = copy.deepcopy(tree)
    node, key, place = {"": changed}, "", ""
    root = node
    while isinstance(node[key], (dict, list)) and node[key] and (not place or rng.random() < 0.8):
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        place = f"{place}.{key}" if place else str(key)
    kind = rng.choice(("replace",) * 5 + ("remove", "double", "rename", "nest", "number"))
    value = node[key]
    if kind == "remove" and place:
        del node[key]
    elif kind == "double" and isinstance(node, list):
        node.insert(key, copy.deepcopy(value))
    elif kind == "rename" and isinstance(node, dict) and place:
        node[rng.choice([one for one in hostile if _is_hashable(one)])] = node.pop(key)
    elif kind == "nest":
        node[key] = nested(value, rng.choice((1, 3, 200)))
    elif kind == "number" and type(value) in (int, float):
        node[key] = value * rng.choice((-1, 2, 1000)) + rng.choice((0, 1, 0.5))
    else:
        node[key] = rng.choice(hostile)
    return root[""], place


def nested(value: Any, depth: int) -> Any:
    """Return a value inside lists."""
    for _ in range(depth):
        value = [value]
    return value


def resize_png(data: bytes, width: int, height: int) -> bytes:
    """Return a PNG that claims another size; the checksum of its header is right."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _is_hashable(value: Any) -> bool:
    """Return whether a value can be the key of a dict."""
    return not isinstance(value, (list, dict))
