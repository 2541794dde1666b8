#!/usr/bin/env bash
# Set up and run all tests: ./scripts/test.sh [arguments of pytest]
# A process per core, up to 4; each file's tests stay together. One process, for a debugger: ./scripts/test.sh -n 0 --pdb …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_python
install_once tests -r requirements-test.txt
install_drawings
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
