#!/usr/bin/env bash
# The main job on the miniature: data, both IRGL stages, pictures, scores, export, report.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/local.sh [--quick] [--seed N] [--out DIR]

Sets up a virtual environment, then runs the main job on the miniature, each step a public
command. Interrupted, the same line again resumes.

  --quick     the same path, cut short: under 5 minutes after installation
  --seed N    of drafts, training and noise (default: 0); the prompts stay the same
  --out DIR   where the run goes (default: runs/shapes)
  -h, --help  this text

VENV and PYTHON choose the environment: see launch/setup.sh.
END
}

out=runs/shapes
size=full
seed=0
while (($#)); do
    case $1 in
        --quick) size=quick ;;
        --seed=?*) seed=${1#--seed=} ;;
        --seed)
            [[ -n ${2:-} ]] || { echo "error: --seed needs a number" >&2; exit 2; }
            seed=$2
            shift ;;
        --out=?*) out=${1#--out=} ;;
        --out)
            [[ -n ${2:-} ]] || { echo "error: --out needs a folder" >&2; exit 2; }
            out=$2
            shift ;;
        -h | --help) usage; exit ;;
        *) echo "error: unknown option '$1'; --help lists the options" >&2; exit 2 ;;
    esac
    shift
done

[[ $seed =~ ^[0-9]{1,6}$ ]] || { echo "error: --seed is '$seed'; give a whole number below a million" >&2; exit 2; }

# The commands run in the repository's root; DIR is meant where the caller stands.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ $out == /* || $PWD == "$root" ]] || out=$PWD/$out

# shellcheck source=launch/setup.sh
source "$root/launch/setup.sh"
exec "$python" launch/job.py "$size" "$out" "$seed"
