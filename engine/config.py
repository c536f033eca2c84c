"""Configuration: a frozen pydantic model with values from defaults, a YAML file and flags.

Each field of a `Config` is a YAML key and a flag of the same name, written with `-` or `_`. A flag
overrides the file, and the file overrides the default. Configurations are flat: a large one
inherits from several small ones, which are the groups of `--help`. pydantic validates values from
the file and from flags together, so the errors of both have the same form: one line with the
option, its value and what is allowed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from engine import cli
from engine.errors import UsageError
from engine.flags import NONE_WORDS, FlagParser, allowed_types, describe, flag_of, suggest

__all__ = ["AnyConfig", "Config", "dump", "make_config", "parse_config", "read_config"]

_LARGEST_FILE = 100_000  # characters, and values
_MOST_BITS = 64  # of an integer; PyYAML reads any number of digits, but Python does not print it
_LONGEST_SHOWN = 200  # characters of a value in an error
_WRONG_BOOL = "wrong_bool_type"
_NUL = "nul_character"
_BOOLEAN_NOTE = " (YAML reads on, off, yes and no as true and false: put the word in quotes)"


class Config(BaseModel):
    """Base class of configurations. A docstring under each field is the help text of its flag."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # Allow names such as `model_ema`.
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert `none` to None where None is allowed; reject a boolean where it is not."""
        allowed = allowed_types(cls.model_fields[info.field_name].annotation)
        if isinstance(value, str) and value.lower() in NONE_WORDS and NoneType in allowed:
            return None
        if isinstance(value, str) and "\0" in value:
            raise PydanticCustomError(_NUL, "must not contain a NUL character")
        if isinstance(value, bool) and bool not in allowed:
            # pydantic would convert the true of `epochs: yes` to 1.
            raise PydanticCustomError(_WRONG_BOOL, "must not be a boolean")
        return value


class _Loader(yaml.SafeLoader):
    """A loader whose errors about values are those of YAML, with the line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; PyYAML raises any exception for `!!int abc` or a month 13."""
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"a value must be a valid {kind}, got {_show(node.value)} (put text in "
                "quotes)",
                problem_mark=node.start_mark,
            ) from error
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise yaml.MarkedYAMLError(
                problem=f"an integer must have at most {_MOST_BITS} bits, got {_show(node.value)}",
                problem_mark=node.start_mark,
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; PyYAML would silently keep the last of several equal keys."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse_config(
    cls: type[AnyConfig], argv: Sequence[str] | None = None, *, prog: str, description: str = ""
) -> AnyConfig:
    """Create a configuration from flags and, with `--config FILE.yaml`, from a file.

    Args:
        cls: Class of the configuration.
        argv: Flags; None for those of the process.
        prog: Name of the command in `--help`.
        description: Description of the command in `--help`.

    Raises:
        SystemExit: With code 0 after `--help` and `--print-config`; with code 2 after an error,
            which is printed as one line on stderr.
    """
    try:
        return _parse(cls, sys.argv[1:] if argv is None else argv, prog, description)
    except UsageError as error:
        cli.fail(error)


def make_config(cls: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
    """Create a configuration from Python values.

    Raises:
        UsageError: An option is unknown or has a wrong value.
    """
    for name in values:
        if name not in cls.model_fields:
            raise UsageError(f"{name} is not an option{suggest(name, cls.model_fields)}")
    return _validated(cls, values, {name: name for name in values})


def read_config(cls: type[AnyConfig], path: str) -> AnyConfig:
    """Create a configuration from a YAML file alone.

    Raises:
        UsageError: The file cannot be read, or an option is unknown or has a wrong value.
    """
    return _validated(cls, *_read_file(cls, path))


def dump(config: Config) -> dict[str, Any]:
    """Return all options as plain types (tuples as lists), for checkpoints and YAML."""
    return config.model_dump(mode="json")


def _parse(cls: type[AnyConfig], argv: Sequence[str], prog: str, description: str) -> AnyConfig:
    """Create a configuration, and raise UsageError for a mistake (see `parse_config`)."""
    parser = FlagParser(cls, prog, description)
    flags = parser.parse(argv)
    files, print_config = flags.pop("config", []), flags.pop("print_config", False)
    if len(files) > 1:
        raise UsageError(f"--config must be given once, got {len(files)} files")
    values, places = _read_file(cls, files[0], "--config") if files else ({}, {})
    values.update(flags)
    places.update((name, flag_of(name)) for name in flags)
    config = _validated(cls, values, places)
    if print_config:
        print(yaml.safe_dump(dump(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _validated(cls: type[AnyConfig], values: dict[str, Any], places: dict[str, str]) -> AnyConfig:
    """Create a configuration from values with known places, and raise UsageError for a mistake."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UsageError(_explain(cls, error, values, places)) from error


def _read_file(
    cls: type[Config], path: str, flag: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a YAML file and their places (`file, line 3: key`), both by option.

    Errors about the whole file begin with the flag that names it, if there is one.
    """
    named = f"{flag} {path}".strip()
    if "\0" in path:
        raise UsageError(f"{flag or 'the file'} must not contain a NUL character, got {path!r}")
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise UsageError(f"{named}: must have at most {_LARGEST_FILE:,} characters")
        loader = _Loader(text)
        node = _root(loader)
        if _count(node) > _LARGEST_FILE:
            raise UsageError(f"{named}: its aliases stand for too many values")
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{path} must contain `option: value` lines, got a {node.id}")
        # A dict would not have the line numbers, nor the keys that are given twice.
        pairs = [(key, loader.construct_object(value, deep=True)) for key, value in node.value]
    except OSError as error:
        raise UsageError(f"{named}: {error.strerror}") from error
    except RecursionError as error:
        raise UsageError(f"{named}: too deeply nested") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{named}: not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value in pairs:
        name = str(key.value).replace("-", "_")
        place = f"{path}, line {key.start_mark.line + 1}: {key.value}"
        if name not in cls.model_fields:
            raise UsageError(f"{place} is not an option{suggest(name, cls.model_fields)}")
        if name in values:
            raise UsageError(f"{place} is given twice")
        values[name], places[name] = value, place
    return values, places


def _root(loader: yaml.SafeLoader) -> yaml.Node | None:
    """Return the root of a YAML document; PyYAML raises ValueError for a wrong escape sequence."""
    try:
        return loader.get_single_node()
    except ValueError as error:
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=loader.get_mark()) from error


def _count(node: yaml.Node | None, counts: dict[int, int] | None = None) -> int:
    """Count the values of a YAML document; an alias counts as all that it stands for."""
    counts = {} if counts is None else counts
    if id(node) not in counts and isinstance(node, yaml.CollectionNode):
        # An alias within its own value has no end.
        counts[id(node)] = _LARGEST_FILE
        parts = [part for one in node.value for part in (one if isinstance(one, tuple) else [one])]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    return counts.get(id(node), 1)


def _explain(
    cls: type[Config], error: ValidationError, values: dict[str, Any], places: dict[str, str]
) -> str:
    """Return one line for all errors of pydantic: the place, the value and what is allowed."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors():
        found.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
    sentences = []
    for name, details in found.items():
        if not name:
            sentences.append(_message(details[0]))
        elif name not in values:
            sentences.append(f"{flag_of(name)} is required")
        else:
            place, value = places[name], _show(values[name])
            reason = _reason(details, cls.model_fields[name].annotation)
            if reason.startswith("must "):
                sentence = f"{place} {reason}, got {value}"
            else:
                sentence = f"{place} {value}: {reason}"
            is_wrong_bool = details[0]["type"] == _WRONG_BOOL
            sentences.append(sentence + (_BOOLEAN_NOTE if is_wrong_bool else ""))
    return "; ".join(sentences)


def _reason(details: list[ErrorDetails], annotation: Any) -> str:
    """Return what is allowed: the first violated constraint, else the type in words.

    For a union, pydantic reports an error for each type in it. Only violated constraints say more
    than the types.
    """
    for detail in details:
        kind = detail["type"]
        if kind == "literal_error" and len(details) > 1:
            continue
        if not kind.endswith(("_type", "_parsing")) and kind not in ("missing", "too_long"):
            return _message(detail)
    return f"must be {describe(annotation)}"


def _message(detail: ErrorDetails) -> str:
    """Return pydantic's message in the form of this package."""
    return detail["msg"].removeprefix("Value error, ").replace("Input should", "must")


def _show(value: Any) -> str:
    """Return a value as it is written in YAML."""
    plain = value is None or isinstance(value, bool)
    text = json.dumps(value) if plain else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
