#!/usr/bin/env bash
# A training as a job of SLURM, one process on each node with all its GPUs.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/slurm.sh [--dry-run] TRAINING ARGUMENTS

Submits python -m irg_jax.train ARGUMENTS from this folder, which all nodes must see, as they must
see the workdir. Set the environment up once: bash launch/setup.sh, then
.venv/bin/python -m pip install -r requirements-cuda.txt, unless that was on a machine with a GPU.

From the environment, required:
  NODES           how many
  GPUS            of a node
  TIME            the limit, e.g. 24:00:00; three minutes before it the run is told to save, and
                  the job queues again, to resume
and, if wanted:
  JOB=irg_jax     its name; its output is JOB-NUMBER.log
  SBATCH=''       further options of sbatch: "--partition=a100 --account=me"
  --dry-run       prints the command, as it could be typed, and does nothing
END
}

dry='' words=()
for word in "$@"; do    # wherever it stands: the training's own is --dry_run
    [[ $word == --dry-run ]] && dry=yes || words+=("$word")
done
set -- ${words[@]+"${words[@]}"}
[[ -n ${1:-} && $1 != -h && $1 != --help ]] || { usage; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
needs NODES GPUS TIME
job=${JOB:-irg_jax}
read -r -a further <<<"${SBATCH:-}"

printf -v train '%q ' .venv/bin/python -u -m irg_jax.train "$@"
# srun in the background: only then does bash take the signal, which scancel passes on to all tasks. They end with
# 0 once they have saved, so it is known from the signal that the run is not at its end.
script="trap 'told=yes; scancel --signal TERM \$SLURM_JOB_ID' TERM; srun --kill-on-bad-exit=1 ${train% } & wait \$!;"
script+=" code=\$?; [[ -z \${told:-} ]] || { wait \$!; code=\$?; scontrol requeue \$SLURM_JOB_ID; }; exit \$code"
submit=(sbatch --job-name "$job" --nodes "$NODES" --ntasks-per-node 1 --gpus-per-node "$GPUS" --time "$TIME"
    --signal B:TERM@180 --requeue --open-mode append --output "$job-%j.log"
    ${further[@]+"${further[@]}"} --wrap "$script")
act "${submit[@]}"
