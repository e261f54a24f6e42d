#!/usr/bin/env bash
# What one host of a pod does for tpu_pod.sh; lies there as ~/irg_jax/launch/worker.sh.
#
#   setup          installs, with what TPUs need
#   start ARGS     ends what still runs, then starts python -m irg_jax.train ARGS and returns
#   follow         shows the log from its beginning until the run ends; its exit status is the run's
#   status         running or ended, and the last line of the log
#   stop           SIGTERM to the run's process group, so that it saves; SIGKILL after STOP_SECONDS=300
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${RUN_FOLDER:-$HOME/irg_run}
log=$folder/log.txt

# The process group of the run; empty if none is alive.
group() {
    local id
    id=$(cat "$folder/group" 2>/dev/null || true)
    # One that only waits to be collected is dead.
    [[ -z $id ]] || ps -A -o pgid=,stat= | awk -v id="$id" '$1 == id && $2 !~ /^Z/ { print id; exit }'
}

status_of_run() {
    cat "$folder/status" 2>/dev/null || echo 137 # it was killed before it could tell
}

stop() {
    local id
    id=$(group)
    [[ -n $id ]] || { echo "$HOSTNAME: no run"; return; }
    kill -TERM -- "-$id"
    for ((second = 0; second < ${STOP_SECONDS:-300}; second++)); do
        [[ -n $(group) ]] || { echo "$HOSTNAME: stopped"; return; }
        sleep 1
    done
    kill -KILL -- "-$id" 2>/dev/null || true
    while [[ -n $(group) ]]; do sleep 0.1; done
    echo "$HOSTNAME: killed after ${STOP_SECONDS:-300} seconds"
}

case ${1:-} in
    setup)
        # shellcheck source=launch/setup.sh
        source launch/setup.sh
        "$python" -m pip install -qq --disable-pip-version-check -c requirements.txt '.[tpu]' ;;
    start)
        shift
        [[ -z $(group) ]] || stop
        mkdir -p "$folder"
        rm -f "$folder/status"
        # The shell of the group passes SIGTERM on by outliving it, and keeps the run's status.
        # shellcheck disable=SC2016
        setsid bash -c '
            trap : TERM INT
            "${@:2}" &
            child=$!
            wait "$child"; code=$?
            while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
            echo "$code" >"$1/status"
        ' run "$folder" "${PYTHON:-.venv/bin/python}" -u -m irg_jax.train "${@}" >"$log" 2>&1 </dev/null &
        echo $! >"$folder/group"
        echo "$HOSTNAME: started" ;;
    follow)
        id=$(group)
        if [[ -n $id ]]; then
            tail -n +1 -F --pid "$id" "$log"
        else
            cat "$log"
        fi
        exit "$(status_of_run)" ;;
    status)
        if [[ -n $(group) ]]; then
            echo "$HOSTNAME: running: $(tr '\r' '\n' <"$log" | tail -n 1)"
        elif [[ -e $log ]]; then
            echo "$HOSTNAME: ended with status $(status_of_run): $(tr '\r' '\n' <"$log" | tail -n 1)"
        else
            echo "$HOSTNAME: no run yet"
        fi ;;
    stop) stop ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
