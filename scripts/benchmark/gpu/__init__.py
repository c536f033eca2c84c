"""The GPU benchmark: correctness, speed and training on one GPU in eight minutes.

Modules of the parent process, which import only the standard library: `command` (options),
`sections` (the sections and their time), `schedule` (which check runs when), `client` (processes
that run checks), `results` (the JSON file) and `report` (the Markdown file). Modules of these
processes: `worker` (the loop), `setup` (device and errors) and one module per section.
"""

from scripts.benchmark.gpu.command import main, parse_args

__all__ = ["main", "parse_args"]
