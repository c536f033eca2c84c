"""Train variants with several seeds, and compare their metrics.

    python -m scripts.ablate FILE.yaml --dry_run
    python -m scripts.ablate FILE.yaml --jobs 2
    python -m scripts.ablate FILE.yaml --print_commands > commands.txt
    python -m scripts.ablate FILE.yaml --report

docs/ablate.md explains the file. Exit code: 0 on success, 1 if cells failed, 2 for a mistake in the
file or in an option, 128 plus the number of the signal if one stopped the command.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from engine import Config, UsageError, parse_config, run
from engine.flags import POSITIONAL

if TYPE_CHECKING:
    from scripts.ablate.cells import Ablation, Cell
    from scripts.ablate.run import RunOptions

__all__ = ["AblateConfig", "main"]

_DESCRIPTION = """
Train variants with several seeds by the trainers, and compare their metrics, paired by seed.
docs/ablate.md explains the file, the options and the report.
"""


class AblateConfig(Config):
    """Ablate."""

    file: Annotated[str, POSITIONAL]
    """YAML file with variants, seeds and metric."""
    output_dir: str = ""
    """Folder for cells and report; empty uses outputs/ablations/ and the name of the file."""
    jobs: int = Field(1, ge=1)
    """Number of cells to run at once; they share the CPU cores."""
    launcher: str = ""
    """Command that replaces python, such as "torchrun --nproc_per_node=8"."""
    device: str = ""
    """Device of the trainers: auto, cuda, cuda:N or cpu; empty is that of their options."""
    dry_run: bool = False
    """Check everything and print the cells, without running them."""
    print_commands: bool = False
    """Print one command for each cell, for an array job."""
    report: bool = False
    """Write the report again from the finished cells, without running any."""
    reference: str = ""
    """Variant that the others are compared with; empty is the first."""
    cell: str = ""
    """Name of the folder of the only cell to run, as --print_commands writes it."""

    @model_validator(mode="after")
    def _check_one_mode(self) -> "AblateConfig":
        """Refuse several of the options that replace a run of all cells."""
        names = ("dry_run", "print_commands", "report", "cell")
        given = [f"--{name}" for name in names if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    """Run an ablation, or print or report what the flags say."""
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse_config(
        AblateConfig, argv, prog="python -m scripts.ablate", description=_DESCRIPTION
    )
    # Importing torch takes seconds, so `--help` and mistakes in flags come before.
    from pathlib import Path

    from scripts.ablate.cells import check_models, check_recorded, load_ablation
    from scripts.ablate.processes import Launcher
    from scripts.ablate.report import write_report  # noqa: F401  (an error shows before the cells)
    from scripts.ablate.results import check_folder
    from scripts.ablate.run import RunOptions

    ablation = load_ablation(config.file, config.reference)
    folder = Path(config.output_dir or Path("outputs", "ablations", ablation.name))
    options = RunOptions(folder, Launcher(config.launcher, config.jobs), config.jobs, config.device)
    cells = [cell for cell in ablation.cells if config.cell in ("", cell.folder)]
    if not cells:
        raise UsageError(
            f"--cell must be a folder such as {ablation.cells[0].folder}, got {config.cell!r}"
        )
    check_folder(ablation, folder)
    check_recorded(cells, folder)
    if config.report:
        _report(ablation, options, config)
        return
    check_models(config.file, cells)
    if config.dry_run:
        _dry_run(ablation, options)
    elif config.print_commands:
        for cell in cells:
            print(shlex.join(_command(config, cell)))
    else:
        _run(ablation, cells, options, config)


def _run(
    ablation: "Ablation", cells: "list[Cell]", options: "RunOptions", config: AblateConfig
) -> None:
    """Run the cells, and report them unless only one was named."""
    from contextlib import ExitStack

    from engine import UserError, check_writable
    from engine.folder_lock import lock_folder
    from scripts.ablate.results import claim_folder
    from scripts.ablate.run import run_cells

    folder = check_writable(options.output_dir)
    with ExitStack() as stack:
        # Commands of single cells run at the same time; the lock of the trainer separates them.
        lock = None if config.cell else lock_folder(folder)
        if lock is not None:
            stack.enter_context(lock)
        claim_folder(ablation, folder)
        try:
            run_cells(ablation, cells, options)
        except UserError:
            if not config.cell:
                _try_report(ablation, options, config)
            raise
        if not config.cell:
            _report(ablation, options, config)


def _try_report(ablation: "Ablation", options: "RunOptions", config: AblateConfig) -> None:
    """Report the other cells after one has failed, if there are any."""
    from contextlib import suppress

    from engine import UserError

    with suppress(UserError):
        _report(ablation, options, config)


def _report(ablation: "Ablation", options: "RunOptions", config: AblateConfig) -> None:
    """Write the report and print its table."""
    # `main` has imported it before the cells ran.
    from scripts.ablate.report import write_report

    print(write_report(ablation, options.output_dir, shlex.join(_shown_command(config))))
    print(f"{options.output_dir}: table.md, cells.csv, results.json, plot.png")


def _dry_run(ablation: "Ablation", options: "RunOptions") -> None:
    """Print the cells and the commands of the first."""
    from scripts.ablate.results import finished
    from scripts.ablate.run import commands_of

    for cell in ablation.cells:
        done = " (done)" if finished(cell, options.output_dir) else ""
        print(f"{cell.name}{done}")
    points = f", each evaluated at {len(ablation.file.points)}" if ablation.file.evaluate_at else ""
    print(f"{len(ablation.cells)} cells{points}; the first runs")
    for command in commands_of(ablation, ablation.cells[0], options):
        print(f"  {shlex.join(command)}")


def _command(config: AblateConfig, cell: "Cell") -> list[str]:
    """Return the command that runs one cell."""
    words = [sys.executable, "-m", "scripts.ablate", config.file, "--cell", cell.folder]
    return words + _flags(config)


def _shown_command(config: AblateConfig) -> list[str]:
    """Return the command of the whole ablation, for the report."""
    reference = ["--reference", config.reference] if config.reference else []
    return ["python", "-m", "scripts.ablate", config.file, *_flags(config), *reference]


def _flags(config: AblateConfig) -> list[str]:
    """Return the flags that the printed commands share."""
    names = ("output_dir", "launcher", "device")
    given = {name: getattr(config, name) for name in names}
    return [word for name, value in given.items() if value for word in (f"--{name}", value)]


if __name__ == "__main__":
    run(main)
