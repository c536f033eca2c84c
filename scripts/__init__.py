"""Commands around the trainers: export, benchmarks, the model zoo and the quickstart."""

from pathlib import Path

from engine.optional import require_own

# The former commands `python -m scripts.benchmark_train` and others are still found.
__path__.append(str(Path(__file__).with_name("former")))

require_own("datasets", __name__)
