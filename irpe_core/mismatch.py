"""Description of weights that do not fit a model: the keys, and the likely cause.

The cause is derived from names and shapes alone: those of the encodings, and those that timm's
vision transformers and DETR (Carion et al., ECCV 2020) give their parts.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["TABLE", "describe_mismatch"]

Shapes = Mapping[str, tuple[int, ...]]

TABLE = re.compile(r"(?:^|\.)rpe_([qkv])\.(rp_rows\.|rp_cols\.)?lookup_table_(weight|bias)$")
_BLOCK = re.compile(r"^(.*?(?:blocks|layers))\.(\d+)\.")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# Pattern of a key, the axis of its shape to compare, and the text about checkpoint and model.
_SIZES = (
    (r"(^|\.)norm\d*\.weight$", 0, "is {} channels wide, the model {}"),
    (r"(^|\.)patch_embed\.proj\.weight$", -1, "has patches of {} pixels, the model of {}"),
    (r"(^|\.)pos_embed$", 1, "has {} position embeddings, the model {} (another image size)"),
    (r"(^|\.)(head|fc|class_embed)\.weight$", 0, "has {} class outputs, the model {}"),
    (r"(^|\.)query_embed\.weight$", 0, "has {} object queries, the model {}"),
)
# Prefixes of the keys of optional parts of a model.
_PARTS = {
    "dist_token": "distillation token",
    "pos_embed": "position embedding",
    "mask_head.": "mask head",
}


def describe_mismatch(
    found: Mapping[str, tuple[int, ...] | None], wanted: Shapes, method: str | None = None
) -> str | None:
    """Describe how a state dict differs from that of a model.

    Args:
        found: Shape of every entry of the state dict; None for an entry that is not a tensor.
        wanted: Shape of every entry of the state dict of the model.
        method: Method of the encodings of the model.

    Returns:
        Missing, unexpected and wrongly shaped keys, and the likely cause; None if the state dict
        fits.
    """
    problems = {
        "missing": [(key, "") for key in wanted if key not in found],
        "unexpected": [(key, "") for key in found if key not in wanted],
        "wrongly shaped": [
            (key, f" is {'not a tensor' if shape is None else shape}, the model's is {wanted[key]}")
            for key, shape in found.items()
            if key in wanted and shape != wanted[key]
        ],
    }
    parts = [f"{len(keys)} {kind}: {_abridge(keys)}" for kind, keys in problems.items() if keys]
    if not parts:
        return None
    tensors = {key: shape for key, shape in found.items() if shape is not None}
    causes = list(_causes(tensors, wanted, method))
    if causes:
        parts.append(f"likely cause: the checkpoint {', and '.join(causes[:3])}")
    return "; ".join(parts)


def _abridge(problems: list[tuple[str, str]], most: int = 3) -> str:
    """List at most `most` keys; keys that differ only in numbers become one, with stars."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, problem in problems:
        groups.setdefault((_NUMBER.sub("*", key), problem), []).append(key)
    texts = [
        (keys[0] if len(keys) == 1 else pattern) + problem
        for (pattern, problem), keys in groups.items()
    ]
    rest = sum(len(keys) for keys in list(groups.values())[most:])
    return ", ".join(texts[:most]) + (f" and {rest} more" if rest else "")


def _causes(found: Shapes, wanted: Shapes, method: str | None) -> Iterator[str]:
    """Yield the likely causes; each text continues the words "the checkpoint"."""
    if not found.keys() & wanted.keys():
        yield _why_nothing_is_common(found, wanted)
        return
    differing = {key for key in {*found, *wanted} if found.get(key) != wanted.get(key)}
    if all(key.endswith(".num_batches_tracked") for key in differing):
        # Only ordinary batch norms have this entry.
        kinds = ("ordinary", "frozen")[:: 1 if differing & found.keys() else -1]
        yield "has {} batch norms, the model {} ones".format(*kinds)
    elif any(key.startswith("backbone.") for key in differing):
        yield "has another backbone than the model"
    depths, own_depths = _depths(found), _depths(wanted)
    for name in own_depths:
        if depths.get(name, own_depths[name]) != own_depths[name]:
            yield f"has {depths[name]} {name}, the model {own_depths[name]}"
    for pattern, axis, text in _SIZES:
        for key in wanted:
            if re.search(pattern, key) and len(found.get(key, ())) == len(wanted[key]):
                sizes = found[key][axis], wanted[key][axis]
                if sizes[0] != sizes[1]:
                    yield text.format(*sizes)
                    break
    yield from _causes_in_tables(_tables(found), _tables(wanted), method)
    for start, part in _PARTS.items():
        has, needs = (any(key.startswith(start) for key in keys) for keys in (found, wanted))
        if has != needs:
            yield f"has a {part}, the model none" if has else f"has no {part}, the model has one"


def _why_nothing_is_common(found: Shapes, wanted: Shapes) -> str:
    """Describe why a checkpoint and a model have no name in common."""
    if not found:
        return "is empty"
    for prefix in {key.split(".")[0] + "." for key in {*found, *wanted}}:
        if any(prefix + key in wanted for key in found):
            return f"lacks {prefix!r} before its names, which the model has"
        if any(prefix + key in found for key in wanted):
            return f"has {prefix!r} before its names, which the model does not"
    return "is of another kind of model: they have no name in common"


def _depths(shapes: Shapes) -> dict[str, int]:
    """Count the blocks under each name, such as `transformer.encoder.layers`."""
    places = {match.groups() for match in map(_BLOCK.match, shapes) if match}
    return {name: sum(name == other for other, _ in places) for name, _ in sorted(places)}


class _Tables(NamedTuple):
    """The encodings of a state dict, as described by its first table."""

    letters: str
    attentions: int
    cross: bool
    bias: bool
    heads: int
    head_dim: int | None
    buckets: int


def _tables(shapes: Shapes) -> _Tables | None:
    """Describe the encodings of a state dict; None if it has none."""
    hits = [(match, shapes[key]) for key in shapes if (match := TABLE.search(key))]
    # An untrusted file may hold tensors of any shape under these names.
    hits = [(m, shape) for m, shape in hits if len(shape) == (2 if m[3] == "bias" else 3)]
    if not hits:
        return None
    (letter, axis, kind), shape = hits[0][0].groups(), hits[0][1]
    rest = shape[1:] if letter == "v" or kind == "bias" else shape[:0:-1]
    return _Tables(
        letters="".join(one for one in "qkv" if any(m[1] == one for m, _ in hits)),
        attentions=sum(m[1] == letter and m[2] == axis for m, _ in hits),
        cross=axis is not None,
        bias=kind == "bias",
        heads=shape[0],
        head_dim=None if kind == "bias" else rest[1],
        buckets=rest[0],
    )


def _causes_in_tables(
    found: _Tables | None, wanted: _Tables | None, method: str | None
) -> Iterator[str]:
    """Yield the differences of the encodings of a checkpoint and a model."""
    if found is None or wanted is None:
        if found:
            yield f"has iRPE on {_letters(found)}, the model has none"
        elif wanted:
            yield f"has no iRPE, the model has it on {_letters(wanted)}"
        return
    if found.letters != wanted.letters:
        yield f"has iRPE on {_letters(found)}, the model on {_letters(wanted)}"
    elif found.attentions != wanted.attentions:
        yield f"has iRPE in {found.attentions} attentions, the model in {wanted.attentions}"
    if found.cross != wanted.cross:
        yield f"{'has' if found.cross else 'has no'} iRPE of the method cross, unlike the model"
    elif found.buckets != wanted.buckets:
        yield _other_buckets(found.buckets, wanted.buckets, method)
    if found.bias != wanted.bias:
        modes = ("bias", "ctx") if found.bias else ("ctx", "bias")
        yield "has iRPE of mode {}, the model of {}".format(*modes)
    if found.heads != wanted.heads:
        yield f"has {_sharing(found)}, the model {_sharing(wanted)}"
    if None not in (found.head_dim, wanted.head_dim) and found.head_dim != wanted.head_dim:
        yield f"has heads of {found.head_dim} channels, the model of {wanted.head_dim}"


def _letters(tables: _Tables) -> str:
    """Return the letters with an encoding, separated by commas."""
    return ", ".join(tables.letters)


def _sharing(tables: _Tables) -> str:
    """Say in words whether the heads share a table."""
    if tables.heads == 1:
        return "tables that the heads share"
    return f"a table for each of {tables.heads} heads"


def _other_buckets(found: int, wanted: int, method: str | None) -> str:
    """Describe another number of buckets, and its cause if the numbers show it."""
    if abs(found - wanted) == 1:
        return (
            f"has tables of {found} buckets, the model of {wanted}: one bucket is for skipped "
            "tokens, such as a class token"
        )
    sides = _side(found), _side(wanted)
    if method == "product" and None not in sides:
        return (
            "has {0}×{0} product tables ({1} buckets), the model's spec asks for {2}×{2} ({3})"
        ).format(sides[0], found, sides[1], wanted)
    return f"has tables of {found} buckets, the model of {wanted}"


def _side(buckets: int) -> int | None:
    """Return the buckets per axis of a product table, with or without the one of skipped tokens."""
    for skipped in (0, 1):
        side = math.isqrt(max(buckets - skipped, 0))
        if side % 2 and side * side + skipped == buckets:
            return side
    return None
