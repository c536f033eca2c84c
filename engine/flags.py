"""Flags: an argparse parser with one flag for each field of a configuration.

The parser only assigns the words of the command line to flags. `engine.config` converts and checks
them with pydantic.
"""

import argparse
import difflib
import inspect
import types
from collections.abc import Container, Iterable, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.errors import UsageError

__all__ = [
    "COMMON",
    "HIDDEN",
    "NONE_WORDS",
    "POSITIONAL",
    "FlagParser",
    "allowed_types",
    "describe",
    "flag_of",
    "suggest",
]

NONE_WORDS = ("none", "null")

POSITIONAL = "positional"
"""Metadata of a field that is an argument without a flag: `Annotated[str, POSITIONAL]`."""

COMMON = "common"
"""Metadata of a field in the first group of `--help`, `Run`."""

HIDDEN = "hidden"
"""Metadata of a field that `--help` leaves out: only old command lines have it."""

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text in quotes",  # Only for YAML, since the values of flags are always text.
}


class FlagParser(argparse.ArgumentParser):
    """A parser with `--config` and one flag for each field, grouped by the class of the field.

    The common options of all classes are the first group, and those of old command lines are not
    shown. A mark also applies where a subclass defines the field again.

    It raises UsageError, while its base class prints the usage before every error.

    Args:
        cls: Class of the configuration.
        prog: Name of the command in `--help`.
        description: Description of the command in `--help`.
    """

    def __init__(self, cls: type[BaseModel], prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"%(prog)s {_positionals(cls)}[--config FILE.yaml] [--option VALUE ...]",
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.add_argument(
            "--config", action="append", metavar="FILE.yaml", help="YAML file with options"
        )
        self.add_argument(
            "--print-config", action="store_true", help="print all options as YAML and exit"
        )
        self._fields = cls.model_fields
        owners = {name: _defining_class(cls, name) for name in self._fields}
        common = {name for name in self._fields if _is_marked(cls, name, COMMON)}
        groups: dict[str, list[str]] = {"Run": []} if common else {}
        for owner in cls.__mro__:
            for name in (name for name in self._fields if owners[name] is owner):
                title = "Run" if name in common else _title(owner)
                groups.setdefault(title, []).append(name)
        for title, names in groups.items():
            group = self.add_argument_group(title)
            for name in names:
                hidden = _is_marked(cls, name, HIDDEN)
                _add_flag(group, name, self._fields[name], hidden=hidden)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the words of the given flags, by the names of their fields.

        Raises:
            UsageError: A flag is unknown or has no value, or a word belongs to no flag.
            SystemExit: After `--help`.
        """
        flags = self._option_string_actions
        argv = self._with_values(_with_dashes(argv, flags))
        for flag, _, value in (word.partition("=") for word in argv):
            # Versions of argparse read this as no value, as an empty list or as text.
            if flag in flags and value == "--":
                raise UsageError(f"{flag} must have a value, got --")
        # Positional arguments may be before, between and after the flags.
        mixed = any(POSITIONAL in field.metadata for field in self._fields.values())
        parse = self.parse_known_intermixed_args if mixed else self.parse_known_args
        given, extras = parse(argv)
        if not extras:
            return {name: self._unpack(name, words) for name, words in vars(given).items()}
        unknown = next((extra for extra in extras if extra.startswith("-")), None)
        if unknown is None:
            raise UsageError(f"unexpected argument {extras[0]!r}: every option starts with --")
        unknown = unknown.partition("=")[0]
        raise UsageError(f"unknown flag {unknown}{suggest(unknown.replace('_', '-'), flags)}")

    def _with_values(self, argv: list[str]) -> list[str]:
        """Add the value true to each flag of a boolean with other words that is given alone."""
        words = []
        for i, word in enumerate(argv):
            field = self._fields.get(word.removeprefix("--").replace("-", "_"))
            if word.startswith("--") and field is not None and _words_of_boolean(field):
                following = argv[i + 1] if i + 1 < len(argv) else ""
                if following not in _words_of_boolean(field):
                    word = f"{word}=true"
            words.append(word)
        return words

    def _unpack(self, name: str, words: Any) -> Any:
        """Return a single word instead of a list of one, if the field allows a single value."""
        if name not in self._fields or not isinstance(words, list) or len(words) > 1:
            return words
        allowed = allowed_types(self._fields[name].annotation)
        is_none = NoneType in allowed and words[0].lower() in NONE_WORDS
        is_single = any(get_origin(kind) is not tuple for kind in _described(allowed))
        return words[0] if is_none or is_single else words

    def error(self, message: str) -> NoReturn:
        """Raise an error that the base class would print."""
        raise UsageError(message)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the most similar known name, or help."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {near[0]}?" if near else " (--help lists all)"


def _with_dashes(argv: Sequence[str], known: Container[str]) -> list[str]:
    """Replace `_` by `-` in known flags, so that `--batch_size` and `--batch-size` are the same."""
    words = []
    for word in argv:
        head, equals, tail = word.partition("=")
        flag = head.replace("_", "-")
        words.append(flag + equals + tail if head.startswith("--") and flag in known else word)
    return words


def flag_of(name: str) -> str:
    """Return the flag of a field: `--batch-size` for `batch_size`, `--json` for `json_`."""
    return "--" + name.rstrip("_").replace("_", "-")


def allowed_types(annotation: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: `int | None` gives `(int, NoneType)`.

    A generic type is followed by its origin: `tuple[int, int]` gives `(tuple[int, int], tuple)`.
    """
    if get_origin(annotation) is Annotated:
        return allowed_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for part in get_args(annotation) for kind in allowed_types(part))
    if get_origin(annotation) is None:
        return (annotation,)
    return annotation, get_origin(annotation)


def describe(annotation: Any) -> str:
    """Return what an annotation allows, in words: `2 values (each a number) or none`."""
    allowed = allowed_types(annotation)
    words = [_describe_type(kind) for kind in _described(allowed)]
    return " or ".join([*words, "none"] if NoneType in allowed else words)


def _describe_type(kind: Any) -> str:
    """Return a type in words: `a number` for float."""
    if get_origin(kind) is Literal:
        return " or ".join(str(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        count = "any number of" if parts[-1] is Ellipsis else len(parts)
        return f"{count} values (each {describe(parts[0])})"
    return _WORDS.get(kind) or getattr(kind, "__name__", str(kind))


def _positionals(cls: type[BaseModel]) -> str:
    """Return the positional arguments of a configuration for the usage line."""
    fields = cls.model_fields.items()
    names = [name.upper() for name, field in fields if POSITIONAL in field.metadata]
    return "".join(f"{name} " for name in names)


def _add_flag(group: Any, name: str, field: FieldInfo, *, hidden: bool) -> None:
    """Add the flag, or the positional argument, of a field to a group of the parser."""
    allowed = allowed_types(field.annotation)
    if POSITIONAL in field.metadata:
        count = {"nargs": "+"} if tuple in allowed else {}
        group.add_argument(name, metavar=name.upper(), help=_help(field), **count)
        return
    text = argparse.SUPPRESS if hidden else _help(field)
    options: dict[str, Any] = {"dest": name, "help": text}
    if words := _words_of_boolean(field):
        group.add_argument(
            flag_of(f"no_{name}"), dest=name, action="store_false", help=argparse.SUPPRESS
        )
        options["metavar"] = "{" + ",".join(words) + "}"
    elif bool in allowed:
        options["action"] = argparse.BooleanOptionalAction
    else:
        kinds = dict.fromkeys(_metavar(kind) for kind in _described(allowed))
        options["metavar"] = "|".join(kinds) or "NONE"
        if tuple in allowed:
            options["nargs"] = "+"
    group.add_argument(flag_of(name), **options)


def _words_of_boolean(field: FieldInfo) -> list[str]:
    """Return the values of a boolean that also has other words; no values for all other fields."""
    allowed = allowed_types(field.annotation)
    words = [word for kind in allowed if get_origin(kind) is Literal for word in get_args(kind)]
    return ["true", "false", *words] if bool in allowed and words else []


def _described(allowed: tuple[Any, ...]) -> list[Any]:
    """Return allowed types without None and without the origins of generic types."""
    return [kind for kind in allowed if kind not in (NoneType, tuple, Literal)]


def _metavar(kind: Any) -> str:
    """Return the name of a value in `--help`: `FLOAT`, or `{a,b}` for the choices a and b."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(str(value) for value in get_args(kind)) + "}"
    if get_origin(kind) is tuple:
        return _metavar(get_args(kind)[0])
    return getattr(kind, "__name__", str(kind)).upper()


def _help(field: FieldInfo) -> str:
    """Return the help text of a field: its docstring and its default."""
    if field.is_required():
        note = "required"
    else:
        note = f"default: {_plain(field.get_default(call_default_factory=True))}"
    text = " ".join((field.description or "").split())
    return f"{text} ({note})".strip().replace("%", "%%")


def _plain(value: Any) -> str:
    """Return a default as it is written in a flag."""
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return "empty" if value == "" else str(value)


def _defining_class(cls: type[BaseModel], name: str) -> type:
    """Return the first class with the field, so that a new default does not change its group."""
    return [base for base in cls.__mro__ if name in inspect.get_annotations(base)][-1]


def _is_marked(cls: type[BaseModel], name: str, mark: str) -> bool:
    """Return whether a class or one of its bases has a mark in the metadata of a field."""
    fields = (getattr(base, "model_fields", {}).get(name) for base in cls.__mro__)
    return any(field is not None and mark in field.metadata for field in fields)


def _title(cls: type) -> str:
    """Return the title of the group of a class: the first line of its docstring."""
    doc = cls.__dict__.get("__doc__")
    return doc.strip().splitlines()[0].rstrip(".") if doc else cls.__name__
