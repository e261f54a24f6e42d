#!/usr/bin/env bash
# Makes a virtual environment and installs requirements.txt into it, if that has changed.
#
#   bash launch/setup.sh      VENV=DIR     where it lies (default: .venv)
#                             PYTHON=NAME  what makes it (default: the first of python3.11,
#                                          python3.12 and python3 that is 3.11 or later)
#
# local.sh and test.sh source this file: they then stand in the repository's root and have $python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
python=$venv/bin/python
stamp=$venv/requirements.sha256

fail() {
    echo "error: $*" >&2
    exit 1
}

# Runs it, for a name on PATH may be a shim of pyenv with nothing behind it.
is_usable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local name names=(python3.11 python3.12 python3)
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        is_usable "$name" && command -v "$name" && return
    done
    fail "${PYTHON:-none of python3.11, python3.12 and python3} is not a Python 3.11 or later that" \
         "runs; install Python 3.11 or 3.12, or name one: PYTHON=/path/to/python3.12"
}

make_venv() {
    local base version
    base=$(find_python)
    version=$("$base" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments: its module venv or ensurepip is missing;" \
             "install it (Debian and Ubuntu: apt-get install $version-venv)"
    echo "setup: making $venv with $base"
    if [[ -e $venv && ! -e $venv/pyvenv.cfg ]]; then
        fail "$venv exists and is no virtual environment; remove it, or choose another: VENV=DIR"
    fi
    "$base" -m venv --clear "$venv" || fail "$base could not make the virtual environment $venv"
}

install() {
    local digest
    digest=$("$python" -c \
        'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())')
    if [[ -e $stamp && $(<"$stamp") == "$digest" ]]; then
        echo "setup: $venv is up to date"
        return
    fi
    echo "setup: installing requirements.txt into $venv (some minutes the first time)"
    "$python" -m pip install -qq --disable-pip-version-check -r requirements.txt ||
        fail "pip could not install requirements.txt (see above); the same line again tries again"
    echo "$digest" >"$stamp"
}

# An interrupted start can leave an environment without pip: it is made anew.
if ! is_usable "$python" || ! "$python" -c 'import pip' 2>/dev/null; then
    make_venv
fi
install
