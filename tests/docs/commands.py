"""Check the shell commands of the documents without the work that they start.

Cheap commands really run. The flags of a trainer are parsed by the trainer, also behind torchrun; a
launcher runs with a stub of torchrun, whose arguments are also parsed. A command that
`CHECKS` does not list is an error.
"""

import argparse
import contextlib
import importlib
import io
import os
import runpy
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import yaml
from torch.distributed.run import get_args_parser

from engine import UserError

__all__ = ["Command", "CommandError", "check", "commands_of"]

ROOT = Path(__file__).parents[2]
# Programs that a launcher finds first on its PATH. torchrun writes its arguments to $RECORD.
STUBS = {
    "torchrun": 'printf \'%s\\0\' "$@" > "$RECORD"',
    "srun": 'SLURM_NODEID=0 exec "$@"',
    "scontrol": "echo node0",
}


class CommandError(Exception):
    """A command that would fail, or that no check exists for."""


class Command(NamedTuple):
    """One command of a block.

    Attributes:
        words: The program and its arguments.
        variables: Assignments before the program.
        folder: Folder that it runs in.
    """

    words: list[str]
    variables: dict[str, str]
    folder: Path = ROOT


def commands_of(block: str) -> Iterator[Command]:
    """Split a block into its commands, as bash does; `cd` changes the folder of later ones.

    Raises:
        CommandError: The block uses syntax other than words, comments, `&&` and continued lines.
    """
    folder = ROOT
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, "&&"]:
            if token != "&&":
                if set(token) & set("();<>|&") and set(token) <= set("();<>|&"):
                    raise CommandError(f"{token!r} is not supported in: {line}")
                words.append(token)
            elif words and words[0] == "cd":
                folder = folder / words[1]
                _require(folder)
                words = []
            elif words:
                variables = {}
                while "=" in words[0]:
                    name, _, value = words.pop(0).partition("=")
                    variables[name] = value
                yield Command(words, variables, folder)
                words = []


def check(command: Command) -> None:
    """Check one command.

    Raises:
        CommandError: The command is unknown or would fail.
    """
    for length in range(len(command.words), 0, -1):
        function = CHECKS.get(tuple(command.words[:length]))
        if function is not None:
            break
    else:
        raise CommandError(f"no check exists for: {shlex.join(command.words)}")
    try:
        function(command._replace(words=command.words[length:]))
    except SystemExit as leaving:
        if leaving.code:
            raise CommandError(f"exit code {leaving.code}: {shlex.join(command.words)}") from None
    except (UserError, ImportError) as error:
        raise CommandError(f"{error}: {shlex.join(command.words)}") from error


def _require(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise CommandError(f"{path} does not exist")


def _trainer(package: str) -> Callable[[Command], None]:
    """Return the check of a trainer: parse its flags; really print the help or configuration."""

    def check_flags(command: Command) -> None:
        printed = {"--help", "--print_config", "--print-config"} & set(command.words)
        if not printed:
            importlib.import_module(f"{package}.config").parse_args(command.words)
            return
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                importlib.import_module(f"{package}.main").main(command.words)
        except SystemExit as leaving:
            if leaving.code:
                raise
        if "--help" not in printed and "epochs" not in yaml.safe_load(output.getvalue()):
            raise CommandError(f"{package}.main prints no configuration")

    return check_flags


def _torchrun(command: Command) -> None:
    """Parse the flags of torchrun by its own parser, and check the command that it starts."""
    args = get_args_parser().parse_args(command.words)
    if not args.module:
        raise CommandError("torchrun must start a module: -m is missing")
    check(Command(["python", "-m", args.training_script, *args.training_script_args], {}))


def _launcher(script: str) -> Callable[[Command], None]:
    """Return the check of a launcher: run it with stubs, then check what it starts."""

    def run(command: Command) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            record = Path(scratch) / "record"
            for name, body in STUBS.items():
                stub = Path(scratch) / name
                stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
                stub.chmod(0o755)
            done = subprocess.run(
                ["bash", script, *command.words],
                cwd=command.folder,
                env={
                    **os.environ,
                    **command.variables,
                    "PATH": f"{scratch}:{os.environ['PATH']}",
                    "RECORD": str(record),
                },
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise CommandError(f"{script}: exit code {done.returncode}: {done.stderr.strip()}")
            words = record.read_text().split("\0")[:-1]
        _torchrun(Command(words, {}))

    return run


def _sbatch(command: Command) -> None:
    """Run the script as Slurm does on the first of its nodes."""
    words = list(command.words)
    options = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
    options.add_argument("--nodes", default="1")
    for name in ("--time", "--gpus-per-node"):
        options.add_argument(name)
    own = []
    while words and words[0].startswith("-"):
        own.append(words.pop(0))
    nodes = options.parse_args(own).nodes
    variables = {"SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NUM_NODES": nodes}
    _require(command.folder / words[0])
    _launcher(words[0])(command._replace(words=words[1:], variables=variables))


def _script(script: str) -> Callable[[Command], None]:
    """Return the check of a script that is too long to run: its syntax."""

    def check_syntax(command: Command) -> None:
        subprocess.run(["bash", "-n", script], cwd=command.folder, check=True)

    return check_syntax


def _pip_install(command: Command) -> None:
    """Check that every file and folder to install from exists."""
    words = iter(command.words)
    for word in words:
        if word in ("-r", "-c"):
            _require(command.folder / next(words))
        elif word == "-e" or word.startswith("."):
            folder = command.folder / (next(words) if word == "-e" else word)
            if not any((folder / name).exists() for name in ("pyproject.toml", "setup.py")):
                raise CommandError(f"{folder} is no Python package")
        elif word not in ("pre-commit", "--no-build-isolation"):
            raise CommandError(f"no check exists for: pip install {word}")


def _paths(*flags: str, with_value: tuple[str, ...] = ()) -> Callable[[Command], None]:
    """Return the check of a command whose arguments are existing paths and the given flags."""

    def check_paths(command: Command) -> None:
        words = iter(command.words)
        for word in words:
            if word in with_value:
                next(words)
            elif word not in flags:
                _require(command.folder / word.partition("::")[0])

    return check_paths


def _nothing(command: Command) -> None:
    """Accept the command as it is, without more arguments."""
    if command.words:
        raise CommandError(f"unexpected arguments: {shlex.join(command.words)}")


def _zoo(command: Command) -> None:
    """Really list the model zoo; of other commands parse the arguments and find the rows."""
    zoo = importlib.import_module("scripts.zoo.__main__")
    args = zoo.parse_args(command.words)
    if args.command == "list":
        with contextlib.redirect_stdout(io.StringIO()):
            zoo.main(command.words)
    elif args.command != "readme":
        zoo.load_zoo(args.zoo).choose(args.rows)


def _benchmark(command: Command) -> None:
    name, *flags = command.words
    importlib.import_module(f"scripts.benchmark.{name}").parse_args(flags)


def _plot(command: Command) -> None:
    importlib.import_module("scripts.plot").parse_args(command.words)


def _export(command: Command) -> None:
    """Parse the flags as those of a classifier or of a detector: the checkpoint decides."""
    models = importlib.import_module("scripts.export.models")
    engine = importlib.import_module("engine")
    for options in (models.ClassifierExport, models.DetectorExport):
        with contextlib.suppress(SystemExit):
            engine.parse_config(options, command.words, prog="scripts.export")
            return
    raise CommandError("flags of neither a classifier nor a detector")


def _predict(package: str) -> Callable[[Command], None]:
    """Return the check of a command that predicts: parse its flags."""

    def check_flags(command: Command) -> None:
        module = importlib.import_module(f"{package}.predict")
        kinds = {"classification": "ClassifierPredict", "detection": "DetectorPredict"}
        options = getattr(module, kinds[package])
        importlib.import_module("engine").parse_config(options, command.words, prog=package)

    return check_flags


def _inspect(command: Command) -> None:
    """Parse the flags of the pictures of iRPE."""
    options = importlib.import_module("scripts.inspect.__main__").InspectConfig
    importlib.import_module("engine").parse_config(options, command.words, prog="scripts.inspect")


def _ablate(command: Command) -> None:
    """Parse the flags of an ablation, and check its file."""
    options = importlib.import_module("scripts.ablate.__main__").AblateConfig
    parse = importlib.import_module("engine").parse_config
    config = parse(options, command.words, prog="scripts.ablate")
    importlib.import_module("scripts.ablate.cells").load_ablation(str(command.folder / config.file))


def _example(module: str) -> Callable[[Command], None]:
    """Return the check of a command that parses its arguments first: run it up to there."""

    class ParsedError(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: object) -> None:
        parse_args(parser, *args)
        raise ParsedError

    def parse(command: Command) -> None:
        main = importlib.import_module(module).main
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
            contextlib.suppress(ParsedError),
        ):
            main(command.words)

    return parse


def _parser(module: str) -> Callable[[Command], None]:
    """Return the check of a command whose module has `parse_args`: parse the arguments."""

    def parse(command: Command) -> None:
        importlib.import_module(module).parse_args(command.words)

    return parse


def _report(command: Command) -> None:
    """Really run `python -m rpe_ops`."""
    _nothing(command)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_module("rpe_ops", run_name="__main__")
    if "attention on cpu" not in output.getvalue():
        raise CommandError("python -m rpe_ops prints no report")


def _module(name: str) -> Callable[[Command], None]:
    """Return the check of a command without arguments that is too long to run: its import."""

    def import_it(command: Command) -> None:
        _nothing(command)
        importlib.import_module(name)

    return import_it


# First words → check of the rest. The longest match counts.
CHECKS: dict[tuple[str, ...], Callable[[Command], None]] = {
    ("torchrun",): _torchrun,
    ("sbatch",): _sbatch,
    ("bash", "scripts/train_classification.sh"): _launcher("scripts/train_classification.sh"),
    ("bash", "scripts/train_detection.sh"): _launcher("scripts/train_detection.sh"),
    ("bash", "scripts/quickstart.sh"): _script("scripts/quickstart.sh"),
    ("bash", "scripts/test.sh"): _script("scripts/test.sh"),
    ("python", "-m", "classification.main"): _trainer("classification"),
    ("python", "-m", "detection.main"): _trainer("detection"),
    ("python", "-m", "datasets.check"): _parser("datasets.check.command"),
    ("python", "-m", "datasets.convert"): _parser("datasets.convert"),
    ("python", "-m", "classification.predict"): _predict("classification"),
    ("python", "-m", "detection.predict"): _predict("detection"),
    ("python", "-m", "scripts.zoo"): _zoo,
    ("python", "-m", "scripts.benchmark"): _benchmark,
    ("python", "-m", "scripts.export"): _export,
    ("python", "-m", "scripts.inspect"): _inspect,
    ("python", "-m", "scripts.ablate"): _ablate,
    ("python", "-m", "scripts.plot"): _plot,
    ("python", "-m", "examples.equip_timm_vit"): _example("examples.equip_timm_vit"),
    ("python", "-m", "examples.draw_buckets"): _example("examples.draw_buckets"),
    ("python", "-m", "rpe_ops"): _report,
    ("python", "-m", "tests.campaign"): _parser("tests.campaign.__main__"),
    ("python", "-m", "tests.rpe_ops.aot"): _module("tests.rpe_ops.aot"),
    ("python", "-m", "pytest"): _paths("-q", "-x", with_value=("-m", "-k")),
    ("python3", "-m", "venv", ".venv"): _nothing,
    (".", ".venv/bin/activate"): _nothing,
    ("pip", "install"): _pip_install,
    ("python", "setup.py", "install"): lambda c: _require(c.folder / "setup.py"),
    ("ruff", "check"): _paths(),
    ("ruff", "format"): _paths("--check"),
    ("pre-commit", "install"): _nothing,
}
