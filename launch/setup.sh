#!/usr/bin/env bash
# Makes a virtual environment and installs requirements.txt into it, if that has changed;
# where there is an NVIDIA GPU (nvidia-smi -L) requirements-cuda.txt, too.
#
#   bash launch/setup.sh      VENV=DIR     where it lies (default: .venv)
#                             PYTHON=NAME  what makes it (default: the first of python3.11,
#                                          python3.12 and python3 that is 3.11 or later)
#                             JAX_PLATFORMS=cpu  leaves a GPU alone
#
# local.sh and test.sh source this file: they then stand in the repository's root and have $python.
set -euo pipefail
if [[ ${BASH_SOURCE[0]} == "$0" ]] && (($#)); then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    [[ $1 == -h || $1 == --help ]] && exit
    echo "error: unexpected '$1'; it takes no arguments" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
python=$venv/bin/python

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
    # Nobody else's files are cleared away: of other names only what was installed here once.
    if [[ -e $venv && ! -e $venv/pyvenv.cfg ]] ||
        [[ -e $venv && $venv != .venv && ! -e $venv/requirements.sha256 ]]; then
        fail "$venv exists and is no virtual environment of ours that works; remove it, or choose another: VENV=DIR"
    fi
    echo "setup: making $venv with $base"
    "$base" -m venv --clear "$venv" || fail "$base could not make the virtual environment $venv"
}

# install FILE DIR [OPTION...]: what FILE lists into DIR, if FILE has changed; the options are pip's.
install() {
    local file=$1 folder=$2 digest stamp
    shift 2
    stamp=$folder/${file%.txt}.sha256
    digest=$("$python" -c \
        'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
    if [[ -e $stamp && $(<"$stamp") == "$digest" ]]; then
        echo "setup: $folder is up to date"
        return
    fi
    echo "setup: installing $file into $folder (some minutes the first time)"
    "$python" -m pip install -qq --disable-pip-version-check -r "$file" "$@" ||
        fail "pip could not install $file (see above); the same line again tries again"
    mkdir -p "$folder"
    echo "$digest" >"$stamp"
}

# An interrupted start can leave an environment without pip: it is made anew.
if ! is_usable "$python" || ! "$python" -c 'import pip' 2>/dev/null; then
    make_venv
fi
install requirements.txt "$venv"
if [[ ${JAX_PLATFORMS:-cuda} == *@(cuda|gpu)* && $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
    install requirements-cuda.txt "$venv"
fi
