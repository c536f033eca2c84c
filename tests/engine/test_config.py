"""Configuration: the values from file and flags, their precedence, and errors in one line."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from engine import Config, UsageError, dump, parse_config
from engine.config import read_config
from engine.flags import COMMON, HIDDEN, POSITIONAL


class Data(Config):
    """Data."""

    data_path: str = ""
    """Path of the data set: 100% of it."""
    input_size: Annotated[int, Field(gt=0)] | tuple[int, int] = 224
    """Side of the images, or height and width."""


class Optimization(Config):
    """Optimization."""

    lr: float = Field(5e-4, gt=0)
    """Learning rate."""
    opt_betas: tuple[float, float] | None = None
    """Betas."""
    clip_grad: float | None = None
    """Largest norm of the gradients."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type."""
    model_ema: bool = True
    """Track an EMA of the weights."""
    scales: tuple[int, ...] = (1, 2)
    """Sizes of the images."""
    batch_size: int = Field(64, gt=0)
    """Input batch size."""


class Run(Data, Optimization):
    """Run."""

    batch_size: int = Field(32, gt=0)
    """Smaller input batch size."""
    seed: int = 0
    """Random seed."""

    @model_validator(mode="after")
    def _check(self) -> "Run":
        if self.seed == 13 and self.model_ema:
            raise ValueError("seed 13 and model_ema cannot be given together")
        return self


def parse(*argv: str) -> Run:
    return parse_config(Run, argv, prog="run", description="A run.")


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "some.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]):
    def error_of(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("error: ")
        return err

    return error_of


def test_a_flag_overrides_the_file_and_the_file_overrides_the_default(write):
    path = write("lr: 0.25\nbatch_size: 7\n")
    config = parse("--config", path, "--batch-size", "9")
    assert (config.lr, config.batch_size, config.seed) == (0.25, 9, 0)


def test_a_flag_equal_to_the_default_overrides_the_file(write):
    assert parse("--config", write("batch_size: 7"), "--batch-size", "32").batch_size == 32


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"], ids=["dash", "underscore"])
@pytest.mark.parametrize("equals", [True, False], ids=["equals", "space"])
def test_flags_accept_dashes_and_underscores(flag, equals):
    assert parse(*([f"{flag}=5"] if equals else [flag, "5"])).batch_size == 5


@pytest.mark.parametrize("key", ["batch-size", "batch_size"], ids=["dash", "underscore"])
def test_files_accept_dashes_and_underscores(write, key):
    assert parse("--config", write(f"{key}: 5")).batch_size == 5


@pytest.mark.parametrize("flag", ["--no-model-ema", "--no_model_ema"], ids=["dash", "underscore"])
def test_a_no_flag_disables_a_boolean(flag):
    assert parse().model_ema
    assert not parse(flag).model_ema


def test_a_boolean_flag_overrides_the_file(write):
    assert not parse("--config", write("model_ema: off")).model_ema
    assert parse("--config", write("model_ema: off"), "--model-ema").model_ema


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_the_word_none_is_none_for_optional_fields(write, word):
    path = write(f"clip_grad: {word}\nopt_betas: {word}")
    config = parse("--config", path)
    assert (config.clip_grad, config.opt_betas) == (None, None)
    config = parse("--config", write("clip_grad: 1\nopt_betas: [0, 1]"), "--clip-grad", word)
    assert (config.clip_grad, config.opt_betas) == (None, (0.0, 1.0))
    assert parse("--config", path, "--opt-betas", word).opt_betas is None


def test_tuples_accept_several_values(write):
    assert parse("--opt-betas", "0.9", "0.95").opt_betas == (0.9, 0.95)
    assert parse("--config", write("opt_betas: [0.9, 0.95]")).opt_betas == (0.9, 0.95)
    assert parse("--scales", "4").scales == (4,)
    assert parse("--scales", "4", "5", "6", "--seed", "1").scales == (4, 5, 6)


def test_one_word_is_a_value_and_several_are_a_tuple():
    assert parse("--input-size", "96").input_size == 96
    assert parse("--input-size", "96", "160").input_size == (96, 160)


@pytest.mark.parametrize("source", ["file", "flag"])
@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_a_number_may_be_written_in_several_ways(write, source, text):
    argv = ["--lr", text] if source == "flag" else ["--config", write(f"lr: {text}")]
    assert parse(*argv).lr == 1e-4


@pytest.mark.parametrize("text", ["", "# only a header\n"], ids=["nothing", "comment"])
def test_an_empty_file_gives_the_defaults(write, text):
    assert parse("--config", write(text)) == Run()


def test_a_dump_has_plain_types_and_gives_the_same_configuration():
    config = parse("--opt-betas", "0.9", "0.95", "--input-size", "96", "160")
    plain = dump(config)
    assert plain["opt_betas"] == [0.9, 0.95]
    assert {type(value) for value in plain.values()} <= {int, float, bool, str, list, type(None)}
    assert Run(**plain) == config


@pytest.mark.parametrize("flag", ["--print-config", "--print_config"])
def test_the_printed_configuration_is_a_file_that_gives_the_same_configuration(write, capsys, flag):
    path = write("batch_size: 7\nopt_betas: [0.9, 0.95]")
    with pytest.raises(SystemExit) as stop:
        parse("--config", path, "--lr", "3e-4", flag)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert [line.partition(":")[0] for line in printed.splitlines() if line[0] != "-"] == list(
        Run.model_fields
    )
    config = parse("--config", write(printed))
    assert config == parse("--batch-size", "7", "--lr", "3e-4", "--opt-betas", "0.9", "0.95")


def test_configurations_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        parse().seed = 3


def test_help_lists_every_field_by_group_with_docstring_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(title) for title in ("Run:", "Data:", "Optimization:")]
    assert positions == sorted(positions)
    for name in Run.model_fields:
        flag = "--" + name.replace("_", "-")
        assert text.count(f"  {flag}") == 1
        assert "_" not in flag
    assert "Path of the data set: 100% of it. (default: empty)" in text
    assert "Smaller input batch size. (default: 32)" in text
    assert text.index("--batch-size") > positions[2]  # In the group that defines it first.
    assert "{float32,bfloat16}" in text


class Marked(Config):
    """Training."""

    seed: int = 0
    """Seed."""
    epochs: Annotated[int, COMMON] = 3
    """Epochs."""
    panoptic: Annotated[bool, HIDDEN] = False
    """Not supported."""


class Redefined(Marked):
    """Trainer."""

    data_path: Annotated[str, COMMON] = ""
    """Folder."""
    epochs: int = Field(4, ge=1)
    """Epochs again."""
    panoptic: bool = False
    """Still not supported."""


@pytest.mark.parametrize("cls", [Marked, Redefined])
def test_common_options_come_first_in_help_and_hidden_ones_are_accepted(capsys, cls):
    with pytest.raises(SystemExit):
        parse_config(cls, ["--help"], prog="x")
    text = capsys.readouterr().out
    assert text.index("Run:") < text.index("--epochs") < text.index("Training:")
    assert text.index("Training:") < text.index("--seed")
    assert "panoptic" not in text
    assert "Trainer:" not in text  # All of its options are common.
    assert parse_config(cls, ["--panoptic"], prog="x").panoptic
    assert "panoptic" in dump(cls())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-sise", "3"], "unknown flag --batch-sise: did you mean --batch-size?"),
        (["--batch_sise=3"], "unknown flag --batch_sise: did you mean --batch-size?"),
        (["--zzz"], "unknown flag --zzz (--help lists all)"),
        (["--batch", "3"], "unknown flag --batch: did you mean --batch-size?"),
        (["ImageNet"], "unexpected argument 'ImageNet'"),
        (["--lr"], "--lr: expected one argument"),
        (["--lr", "fast"], "--lr must be a number, got 'fast'"),
        (["--lr", "0"], "--lr must be greater than 0, got '0'"),
        (["--lr", "nan"], "--lr must be a finite number, got 'nan'"),
        (["--seed", "1.5"], "--seed must be an integer, got '1.5'"),
        (["--clip-grad", "x"], "--clip-grad must be a number or none, got 'x'"),
        (["--dtype", "fp16"], "--dtype must be 'float32' or 'bfloat16', got 'fp16'"),
        (
            ["--opt-betas", "0.9"],
            "--opt-betas must be 2 values (each a number) or none, got ['0.9']",
        ),
        (["--input-size", "-5"], "--input-size must be greater than 0, got '-5'"),
        (
            ["--input-size", "x"],
            "--input-size must be an integer or 2 values (each an integer), got 'x'",
        ),
        (["--seed", "13"], "seed 13 and model_ema cannot be given together"),
        (["--seed", "x", "--lr", "y"], "--lr must be a number, got 'y'; --seed must be an integer"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
        (["--config", "/"], "--config /: Is a directory"),
        (["--config", "a", "--config", "b"], "--config must be given once, got 2 files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_in_a_flag_is_one_line_that_says_what_is_allowed(error_of, argv, words):
    assert words in error_of(*argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1\nbatch_sise: 3", "some.yaml, line 2: batch_sise is not an option: did you mean"),
        ("optim: {lr: 1}", "line 1: optim is not an option"),
        ("? [1]\n: 2", "is not an option"),
        ("batch_size: 0", "some.yaml, line 1: batch_size must be greater than 0, got 0"),
        ("lr: fast", "lr must be a number, got 'fast'"),
        ("lr:", "lr must be a number, got null"),
        ("seed: yes", "seed must be an integer, got true (YAML reads on, off, yes and no as"),
        ("data_path: off", "data_path must be text in quotes, got false (YAML reads on, off"),
        ("dtype: on", "dtype must be float32 or bfloat16, got true (YAML reads on, off"),
        ("data_path: 5", "data_path must be text in quotes, got 5"),
        ("- lr\n- seed", "some.yaml must contain `option: value` lines, got a sequence"),
        ("lr: 1\nlr: 2", "some.yaml, line 2: lr is given twice"),
        ("batch-size: 1\nbatch_size: 1", "some.yaml, line 2: batch_size is given twice"),
        ("lr: [1\nseed: 2", "some.yaml, line 2: not valid YAML"),
        ("lr: !!python/object/apply:os.getpid []", "not valid YAML"),
        (b"\xff\xfe\x00lr", "some.yaml: not a text file"),
    ],
    ids=[
        "unknown key", "nested group", "key is a list", "out of range", "bad value", "empty value",
        "boolean as integer", "boolean as text", "boolean as choice", "number as text",
        "not a mapping", "twice", "twice in two spellings", "syntax", "python tag", "binary",
    ],
)  # fmt: skip
def test_an_error_in_a_file_is_one_line_that_names_file_key_and_value(error_of, write, text, words):
    assert words in error_of("--config", write(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
            "its aliases stand for too many values",
        ),
        ("scales: &a [1, *a]", "its aliases stand for too many values"),
        ("scales: " + "[" * 5000 + "]" * 5000, "too deeply nested"),
        ("# " + "x" * 100_000, "must have at most 100,000 characters"),
    ],
    ids=["billion laughs", "endless", "deep", "large"],
)
def test_a_file_that_needs_unbounded_memory_is_refused(error_of, write, text, words):
    assert words in error_of("--config", str(write(text)))


@pytest.mark.parametrize(
    "value",
    [
        *("!!int abc", "!!int ''", "!!int 0x", "!!float", "!!float abc", "!!float ''", "!!bool"),
        *("!!bool maybe", "!!timestamp", "!!timestamp abc", "0000-01-01", "2020-13-45"),
        *("2020-01-01 25:61:61", "2020-01-01T00:00:00+99:99", '"\\U00110000"', "!!binary é"),
        *("!!set [a]", "!!omap [1]", "!!pairs 1", "!!map [a]", "!!str [a]", "!!foo x", "9" * 5000),
        *("0x" + "f" * 5000, "[1, !!int abc]", "{<<: [1]}", "{{a: 1}: 2}", "{[a]: 1}"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("option", ["seed", "lr", "data_path", "model_ema", "scales"])
def test_a_value_that_yaml_cannot_read_is_one_short_line_with_its_place(
    error_of, write, option, value
):
    error = error_of("--config", write(f"dtype: float32\n{option}: {value}\n"))
    assert "some.yaml, line 2" in error
    assert len(error) < 1000


def test_text_with_a_nul_character_is_refused(error_of, write):
    error = error_of("--config", write('data_path: "a\\0b"'))
    assert "data_path must not contain a NUL character, got 'a\\x00b'" in error
    assert "--data-path must not contain a NUL" in error_of("--data-path", "a\0b")
    assert "--config must not contain a NUL" in error_of("--config", "a\0b")


@pytest.mark.parametrize(
    "option", [*(name.replace("_", "-") for name in Run.model_fields), "config"]
)
def test_two_dashes_are_not_the_value_of_a_flag(error_of, option):
    assert f"--{option} must have a value, got --" in error_of(f"--{option}=--")


def test_a_device_is_not_read_to_its_end(error_of):
    assert "must have at most" in error_of("--config", "/dev/zero")


def test_an_error_in_several_processes_names_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit):
        parse("--lr", "fast")
    assert capsys.readouterr().err.startswith("error [rank 3]: --lr must be a number")


def test_a_missing_required_field_is_an_error(capsys):
    class Strict(Config):
        weights: str
        """Path of the weights."""

    with pytest.raises(SystemExit):
        parse_config(Strict, [], prog="strict")
    assert capsys.readouterr().err == "error: --weights is required\n"


class Positional(Config):
    """Options of a command with arguments."""

    source: Annotated[str, POSITIONAL]
    """Source."""
    images: Annotated[tuple[str, ...], POSITIONAL]
    """Images."""
    size: int = 3
    """Size."""
    json_: str = ""
    """File."""


@pytest.mark.parametrize(
    "argv",
    ["a b c --size 4 --json x", "--size 4 a --json x b c", "a b --json=x --size 4 c"],
)
def test_arguments_without_a_flag_may_be_anywhere(argv):
    config = parse_config(Positional, argv.split(), prog="x")
    assert config == Positional(source="a", images=("b", "c"), size=4, json_="x")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("a", "IMAGES"),
        ("a b --seize 4", "unknown flag --seize: did you mean --size?"),
        ("a b --size x", "--size must be an integer, got 'x'"),
    ],
)
def test_mistakes_among_arguments_are_named(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_config(Positional, argv.split(), prog="x")
    assert words in capsys.readouterr().err


class Nested(Config):
    """Nested."""

    groups: dict[str, dict[str, int]]
    """Groups."""


def test_a_file_is_read_without_flags(tmp_path):
    path = tmp_path / "nested.yaml"
    path.write_text("groups:\n  a: {x: 1}\n  b: {x: 1}\n")
    assert read_config(Nested, str(path)).groups == {"a": {"x": 1}, "b": {"x": 1}}
    with pytest.raises(UsageError, match=r"^.*missing\.yaml: No such file or directory$") as caught:
        read_config(Nested, str(tmp_path / "missing.yaml"))
    assert "--config" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [("groups:\n  a: {x: 1}\n  a: {x: 2}\n", 3), ("groups:\n  a: {x: 1, x: 2}\n", 2)],
)
def test_a_nested_key_that_is_given_twice_is_an_error(text, line, tmp_path):
    path = tmp_path / "nested.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf", line {line}: not valid YAML: [ax] is given twice$"):
        read_config(Nested, str(path))
