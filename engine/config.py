"""Configuration: a frozen pydantic model that is filled from defaults, a YAML file and flags.

Every field of a `Config` is a YAML key and a flag of the same name, with `-` or `_` alike; a flag
beats the file, the file beats the default. Configurations are flat: a big one inherits from several
small ones, which become the groups of `--help`. Files and flags take one road: both are collected
as plain values and validated together by pydantic, so both give the same messages, each one line
that names the option, its value and what is allowed.
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
from engine.flags import NONE_WORDS, FlagParser, arms, dashed, describe, suggest

_UNMEANT_BOOL = "unmeant_bool_type"
_BOOLEAN_NOTE = " (YAML reads on, off, yes and no as true and false: put the word in quotes)"


class Config(BaseModel):
    """Base of all configurations: frozen, without unknown keys, documented under each field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # `model_ema` and its like are good names here
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads `none` as None where that is allowed, and refuses booleans as numbers."""
        allowed = arms(cls.model_fields[info.field_name].annotation)
        if isinstance(value, str) and value.lower() in NONE_WORDS and NoneType in allowed:
            return None
        if isinstance(value, bool) and bool not in allowed:
            # Else pydantic would take `epochs: yes` for 1.
            raise PydanticCustomError(_UNMEANT_BOOL, "must not be a boolean")
        return value


AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse_config(
    cls: type[AnyConfig], argv: Sequence[str] | None = None, *, prog: str, description: str = ""
) -> AnyConfig:
    """Fills a configuration from flags and, with `--config FILE.yaml`, from a file.

    Args:
        cls: the configuration to fill.
        argv: the flags; None takes those of the process.
        prog: the command's name for `--help`.
        description: one paragraph for `--help`.

    Raises:
        SystemExit: With code 0 after `--help` and `--print-config`; with code 2 after one line on
            stderr that says what is wrong.
    """
    try:
        return _parse(cls, sys.argv[1:] if argv is None else argv, prog, description)
    except UsageError as error:
        cli.fail(error)


def dump(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain types (tuples as lists), for checkpoints and YAML."""
    return config.model_dump(mode="json")


def _parse(cls: type[AnyConfig], argv: Sequence[str], prog: str, description: str) -> AnyConfig:
    parser = FlagParser(cls, prog, description)
    flags = parser.parse(argv)
    files, print_config = flags.pop("config", []), flags.pop("print_config", False)
    if len(files) > 1:
        raise UsageError(f"--config must be given once, got {len(files)} files")
    values, places = _read_file(cls, files[0]) if files else ({}, {})
    values.update(flags)
    places.update((name, dashed(name)) for name in flags)
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        raise UsageError(_explain(cls, error, values, places)) from error
    if print_config:
        print(yaml.safe_dump(dump(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _read_file(cls: type[Config], path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the values of a YAML file, and for each its place (`file, line 3: key`)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{path}: must hold `option: value` lines")
        # Pair by pair: a finished dict has lost the line numbers, and keys that are given twice.
        pairs = [(key, loader.construct_object(value, deep=True)) for key, value in node.value]
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value in pairs:
        name = str(key.value).replace("-", "_")  # a key that is no word is no option either
        place = f"{path}, line {key.start_mark.line + 1}: {key.value}"
        if name not in cls.model_fields:
            raise UsageError(f"{place} is not an option{suggest(name, cls.model_fields)}")
        if name in values:
            raise UsageError(f"{place} is given twice")
        values[name], places[name] = value, place
    return values, places


def _explain(
    cls: type[Config], error: ValidationError, values: dict[str, Any], places: dict[str, str]
) -> str:
    """One line for all that pydantic found: the place, the value and what is allowed."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors():
        found.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
    sentences = []
    for name, details in found.items():
        if not name:
            sentences.append(_message(details[0]))
        elif name not in values:
            sentences.append(f"{dashed(name)} is required")
        else:
            place, value = places[name], _show(values[name])
            reason = _reason(details, cls.model_fields[name].annotation)
            rule = f"{place} {reason}, got {value}" if reason.startswith("must ") else ""
            note = _BOOLEAN_NOTE if details[0]["type"] == _UNMEANT_BOOL else ""
            sentences.append((rule or f"{place} {value}: {reason}") + note)
    return "; ".join(sentences)


def _reason(details: list[ErrorDetails], annotation: Any) -> str:
    """What is allowed: the first constraint that was hurt, else the type in words.

    A union gives an error for each of its arms, of which only a hurt constraint says more than the
    type itself.
    """
    for detail in details:
        kind = detail["type"]
        if not kind.endswith(("_type", "_parsing")) and kind not in ("missing", "too_long"):
            return _message(detail)
    return f"must be {describe(annotation)}"


def _message(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ").replace("Input should", "must")


def _show(value: Any) -> str:
    plain = value is None or isinstance(value, bool)
    return json.dumps(value) if plain else repr(value)
