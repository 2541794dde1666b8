#!/usr/bin/env bash
# Set up and run all tests: ./scripts/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_python
install_once tests -r requirements-test.txt
install_drawings
exec "$PYTHON" -m pytest "$@"
