#!/usr/bin/env bash
# A TPU pod slice of Google Cloud, from nothing to a run and back to nothing.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/tpu_pod.sh [--dry-run] COMMAND [--detach] [TRAINING ARGUMENTS]

  create        asks for the slice (a queued resource) and waits until it is there
  setup         copies this checkout's last commit to all hosts and installs it there
  run ARGS      python -m irg_jax.train ARGS on all hosts, shows host 0's log until it ends;
                Ctrl-C stops the run on all of them, saved. With SPOT=1, a slice that is taken away
                is asked for again, set up, and the run resumed. --detach: starts it and returns
  logs          shows host 0's log from its beginning until the run ends; Ctrl-C stops only the showing
  status        of the slice, and of the run on every host
  stop          stops the run on all hosts, saved
  delete        gives the slice back
  --dry-run     prints every command, as it could be typed, and does nothing

From the environment, required:
  PROJECT, ZONE        of Google Cloud
  NAME                 of the queued resource, yours to choose
  ACCELERATOR_TYPE     v5p-128, v6e-64, v5litepod-256, ...: see the table `topologies` of the config
and, if wanted:
  SLICES=1             more are one training over several slices
  SPOT=0               1: cheaper, and may be taken away
  RUNTIME_VERSION      of the machines' software (default: the one for the accelerator)
  PREPARE=''           a line that setup runs on every host first, e.g. to mount the disk of the workdir
END
}

dry='' words=()
for word in "$@"; do    # wherever it stands: the training's own is --dry_run
    [[ $word == --dry-run ]] && dry=yes || words+=("$word")
done
set -- ${words[@]+"${words[@]}"}
command=${1:-}
[[ -n $command && $command != -h && $command != --help ]] || { usage; exit; }
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

[[ $command == run ]] || (($# == 0)) || fail "unexpected '$1' after $command; --help lists what there is"
needs PROJECT ZONE NAME ACCELERATOR_TYPE
slices=${SLICES:-1}
spot=${SPOT:-0}
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "SLICES is '$slices'; give a number from 1"
[[ $spot == [01] ]] || fail "SPOT is '$spot'; give 0 or 1"
place=(--project "$PROJECT" --zone "$ZONE")
everywhere=(--worker all --node all)

resources() { # VERB [ARGUMENT...]
    act gcloud compute tpus queued-resources "$1" "$NAME" "${place[@]}" "${@:2}"
}

on_hosts() { # WHICH COMMAND: one line for the shell there
    if [[ $1 == all ]]; then
        resources ssh "${everywhere[@]}" --command "$2"
    else
        resources ssh --worker 0 --node 0 --command "$2"
    fi
}

worker() { # VERB [ARGUMENT...], as a line that the shell of a host splits again
    local line
    printf -v line '%q ' bash irg_jax/launch/worker.sh "$@"
    echo "${line% }"
}

runtime() {
    case $ACCELERATOR_TYPE in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) fail "no RUNTIME_VERSION is known for ACCELERATOR_TYPE '$ACCELERATOR_TYPE'; set it" ;;
    esac
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE if there is no such resource.
state() {
    gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format 'value(state.state)' \
        2>/dev/null || echo NONE
}

create() {
    local version nodes=(--node-id "$NAME")
    version=${RUNTIME_VERSION:-$(runtime)}
    ((slices == 1)) || nodes=(--node-count "$slices" --node-prefix "$NAME")
    [[ $spot == 0 ]] || nodes+=(--spot)
    # Cloud TPU names v5e by another name than everybody else.
    resources create --accelerator-type "${ACCELERATOR_TYPE/#v5e-/v5litepod-}" --runtime-version "$version" \
        "${nodes[@]}"
    [[ -z $dry ]] || return 0
    local now last=''
    while now=$(state); [[ $now != ACTIVE ]]; do
        [[ $now == "$last" ]] || echo "$(date +%T) $NAME is $now"
        last=$now
        case $now in
            FAILED | SUSPENDED | SUSPENDING | DELETING | NONE)
                fail "$NAME is $now and will not come; see bash launch/tpu_pod.sh status" ;;
        esac
        sleep "${POLL_SECONDS:-30}"
    done
    echo "$(date +%T) $NAME is ACTIVE"
}

setup() {
    local archive=${TMPDIR:-/tmp}/irg_jax_$NAME.tar.gz
    [[ -z $(git status --porcelain) ]] || echo "note: what is not committed is not copied" >&2
    # shellcheck disable=SC2064
    [[ -n $dry ]] || trap "rm -f $(printf %q "$archive")" EXIT
    act git archive --format tar.gz --output "$archive" HEAD
    act gcloud compute tpus queued-resources scp "$archive" "$NAME:irg_jax.tar.gz" "${place[@]}" "${everywhere[@]}"
    [[ -z ${PREPARE:-} ]] || on_hosts all "$PREPARE"
    on_hosts all 'mkdir -p irg_jax && tar -xzf irg_jax.tar.gz -C irg_jax && bash irg_jax/launch/worker.sh setup'
    act rm -f "$archive"
}

stop() {
    on_hosts all "$(worker stop)"
}

# Was the slice taken away? A slice that is there had a run that failed by itself.
is_lost() {
    [[ -z $dry && $spot == 1 && $(state) != ACTIVE ]]
}

run() {
    local detach='' code follower=''
    [[ ${1:-} != --detach ]] || { detach=yes; shift; }
    (($#)) || fail "run needs the arguments of the training: --config FILE --workdir DIR"
    while true; do
        code=0
        [[ -n $detach ]] || trap 'trap - INT TERM; echo "stopping the run on all hosts"; stop; wait; exit 130' INT TERM
        on_hosts all "$(worker start --distributed "$@")" || code=$?
        [[ -z $detach ]] || return "$code"
        # A connection that breaks ends no run: as long as it goes on, its log is looked at again.
        while ((code == 0)); do
            # In the background, for bash heeds no signal while it runs a command.
            on_hosts first "$(worker follow)" &
            follower=$!
            wait "$follower" || code=$?
            [[ $code == 255 && -z $dry ]] || break
            is_lost && break
            code=0
            sleep "${POLL_SECONDS:-30}"
        done
        trap - INT TERM
        ((code)) && is_lost || return "$code"
        echo "$(date +%T) $NAME was taken away; asking for it again"
        resources delete --force --quiet || true
        create
        setup
    done
}

case $command in
    create | setup | stop) $command ;;
    run) run "$@" ;;
    logs) on_hosts first "$(worker follow)" ;;
    status)
        resources describe --format 'value(state.state)'
        on_hosts all "$(worker status)" ;;
    delete) resources delete --force --quiet ;;
    *) fail "unknown command '$command'; --help lists the commands" ;;
esac
