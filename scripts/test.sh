#!/usr/bin/env bash
# Install, lint and test. Arguments are passed to pytest:
#   bash scripts/test.sh                 all tests but the slow ones
#   bash scripts/test.sh -m slow         the slow tests
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

ruff check .
ruff format --check .
# Tests start processes of their own. With more than one thread each, they would compete for cores.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
[ $# -gt 0 ] || set -- -m "not slow"
python -m pytest -n 2 --durations=15 "$@"
