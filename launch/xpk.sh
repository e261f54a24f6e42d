#!/usr/bin/env bash
# A training as a workload of XPK on a GKE cluster of TPUs.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/xpk.sh [--dry-run] TRAINING ARGUMENTS

Submits python -m irg_jax.train ARGUMENTS to all hosts of the workload's slices (pip install xpk).
This folder becomes the image; a workdir outside it must be one that all pods see, such as a
bucket that the cluster mounts.

From the environment, required:
  CLUSTER, PROJECT, ZONE    of GKE
  WORKLOAD                  the name of this run
  TPU_TYPE                  v5p-128, v6e-64, v5litepod-256, ...
and, if wanted:
  SLICES=1                  more are one training over several slices
  IMAGE=python:3.11         what the layer with this folder is put on
  RESTARTS=10               how often the workload starts again after a host was lost; it resumes
  --dry-run                 prints the command, as it could be typed, and does nothing

Then: xpk workload list, xpk workload delete --workload NAME --cluster CLUSTER.
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
needs CLUSTER PROJECT ZONE WORKLOAD TPU_TYPE

printf -v train '%q ' .venv/bin/python -u -m irg_jax.train --distributed "$@"
# exec: the pod's SIGTERM is to reach the training, which then saves.
line="bash launch/worker.sh setup && exec ${train% }"
submit=(xpk workload create --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE"
    --workload "$WORKLOAD" --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}"
    --base-docker-image "${IMAGE:-python:3.11}" --script-dir . --max-restarts "${RESTARTS:-10}"
    --command "$line")
act "${submit[@]}"
