#!/usr/bin/env bash
# Sets up a virtual environment and runs the tests in two processes.
#
#   bash launch/test.sh [--all] [pytest arguments]
#
# Tests marked slow run with --all alone. Paths are relative to the repository's root.
# The exit status is pytest's.
set -euo pipefail
case ${1:-} in
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --all) selection=(); shift ;;
    *) selection=(-m "not slow") ;;
esac
export JAX_PLATFORMS=cpu    # what tests/conftest.py says, before anything is installed
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Beside the environment, not in it: see the file. Tests that compile for TPUs look for it there.
install requirements-tpu.txt "$venv/libtpu" --no-deps --upgrade --target "$venv/libtpu"
exec "$python" -m pytest -q -n 2 --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
