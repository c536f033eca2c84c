#!/usr/bin/env bash
# Install everything into .venv. Sourced by test.sh and quickstart.sh; repeated only after changes.
#   PYTHON=python3.12 bash scripts/install.sh     with another interpreter than python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed
wanted=$(cat requirements*.txt constraints.txt | cksum)
kernels=$(cat rpe_ops/setup.py rpe_ops/csrc/* | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "Installing into .venv (some minutes: PyTorch is large)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -r requirements-dev.txt -c constraints.txt
    echo "$wanted" > "$stamp"
fi
if [ ! -f "$stamp-kernels" ] || [ "$(cat "$stamp-kernels")" != "$kernels" ]; then
    echo "Compiling the operators of rpe_ops (about a minute)"
    # A previous build may contain modules that were removed since.
    rm -rf rpe_ops/build
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ./rpe_ops
    echo "$kernels" > "$stamp-kernels"
fi
export PATH="$PWD/.venv/bin:$PATH"
