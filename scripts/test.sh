#!/usr/bin/env bash
# Install, lint, test. Arguments go to pytest:
#   bash scripts/test.sh                 everything but the slow tests
#   bash scripts/test.sh -m slow         the slow ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

ruff check .
ruff format --check .
# One thread per process: the tests start processes of their own, and two busy OpenMP pools on two
# cores wait for each other.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
[ $# -gt 0 ] || set -- -m "not slow"
python -m pytest -n 2 --durations=15 "$@"
