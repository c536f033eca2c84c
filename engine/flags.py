"""Flags: an argparse parser with one option for each field of a configuration.

The parser only sorts words to options. It converts and checks nothing, which is left to pydantic
(see `engine.config`), and it notes only the flags that were given.
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

NONE_WORDS = ("none", "null")

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text in quotes",  # flags always are text, so only YAML meets this one
}


class FlagParser(argparse.ArgumentParser):
    """One option for each field of a model, grouped by the class that defines it, and `--config`.

    Unlike its base class it raises, instead of printing its usage above every error.
    """

    def __init__(self, cls: type[BaseModel], prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [--config FILE.yaml] [--option VALUE ...]",
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
        homes = {name: _defining_class(cls, name) for name in self._fields}
        for home in cls.__mro__:
            names = [name for name in self._fields if homes[name] is home]
            group = self.add_argument_group(_title(home)) if names else None
            for name in names:
                _add_flag(group, name, self._fields[name])

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Sorts the words to the options that are given, by the fields' names.

        Raises:
            UsageError: a flag is unknown or lacks its value, or a word belongs to no flag.
            SystemExit: after `--help`.
        """
        flags = self._option_string_actions
        given, extras = self.parse_known_args(_spell_alike(argv, flags))
        if not extras:
            return {name: self._unwrap(name, words) for name, words in vars(given).items()}
        unknown = next((extra for extra in extras if extra.startswith("-")), None)
        if unknown is None:
            raise UsageError(f"unexpected argument {extras[0]!r}: every option starts with --")
        unknown = unknown.partition("=")[0]
        raise UsageError(f"unknown flag {unknown}{suggest(unknown.replace('_', '-'), flags)}")

    def _unwrap(self, name: str, words: Any) -> Any:
        """One word for an option of several values is itself, if the option allows that."""
        if name not in self._fields or not isinstance(words, list) or len(words) > 1:
            return words
        allowed = arms(self._fields[name].annotation)
        is_none = NoneType in allowed and words[0].lower() in NONE_WORDS
        is_single = any(get_origin(arm) is not tuple for arm in _typed(allowed))
        return words[0] if is_none or is_single else words

    def error(self, message: str) -> NoReturn:
        """Raises what the base class would print."""
        raise UsageError(message)


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or where to look."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {near[0]}?" if near else " (--help lists all)"


def _spell_alike(argv: Sequence[str], known: Container[str]) -> list[str]:
    """Spells known flags with `-`, so that `--batch_size=8` and `--batch-size 8` are the same."""
    words = []
    for word in argv:
        head, equals, tail = word.partition("=")
        flag = head.replace("_", "-")
        words.append(flag + equals + tail if head.startswith("--") and flag in known else word)
    return words


def dashed(name: str) -> str:
    """The flag of a field: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


def arms(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: `int | None` gives `(int, NoneType)`.

    A generic alias gives its origin beside it, so that `tuple in arms(tuple[int, int])` holds.
    """
    if get_origin(annotation) is Annotated:
        return arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(arm for part in get_args(annotation) for arm in arms(part))
    if get_origin(annotation) is None:
        return (annotation,)
    return annotation, get_origin(annotation)


def describe(annotation: Any) -> str:
    """What an annotation allows, in words: `2 values (each a number) or none`."""
    allowed = arms(annotation)
    words = [_word(arm) for arm in _typed(allowed)]
    return " or ".join([*words, "none"] if NoneType in allowed else words)


def _word(arm: Any) -> str:
    if get_origin(arm) is Literal:
        return " or ".join(str(value) for value in get_args(arm))
    if get_origin(arm) is tuple:
        parts = get_args(arm)
        count = "any number of" if parts[-1] is Ellipsis else len(parts)
        return f"{count} values (each {describe(parts[0])})"
    return _WORDS.get(arm) or getattr(arm, "__name__", str(arm))


def _add_flag(group: Any, name: str, field: FieldInfo) -> None:
    allowed = arms(field.annotation)
    options: dict[str, Any] = {"dest": name, "help": _help(field)}
    if bool in allowed:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = "|".join(dict.fromkeys(_metavar(arm) for arm in _typed(allowed)))
        if tuple in allowed:
            options["nargs"] = "+"
    group.add_argument(dashed(name), **options)


def _typed(allowed: tuple[Any, ...]) -> list[Any]:
    """The types among the arms: without None and without the origins of generic aliases."""
    return [arm for arm in allowed if arm not in (NoneType, tuple, Literal)]


def _metavar(arm: Any) -> str:
    if get_origin(arm) is Literal:
        return "{" + ",".join(str(value) for value in get_args(arm)) + "}"
    if get_origin(arm) is tuple:
        return _metavar(get_args(arm)[0])
    return getattr(arm, "__name__", str(arm)).upper()


def _help(field: FieldInfo) -> str:
    if field.is_required():
        note = "required"
    else:
        note = f"default: {_plain(field.get_default(call_default_factory=True))}"
    text = " ".join((field.description or "").split())
    return f"{text} ({note})".strip().replace("%", "%%")


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return "empty" if value == "" else str(value)


def _defining_class(cls: type[BaseModel], name: str) -> type:
    """The class that names the field first, so that a changed default stays in its group."""
    return [base for base in cls.__mro__ if name in inspect.get_annotations(base)][-1]


def _title(cls: type) -> str:
    doc = cls.__dict__.get("__doc__")
    return doc.strip().splitlines()[0].rstrip(".") if doc else cls.__name__
