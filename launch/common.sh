# shellcheck shell=bash
# What the scripts for pods and clusters share; they source it.

fail() {
    echo "error: $*" >&2
    exit 1
}

# needs VARIABLE...: ends with the name of the first that is not set.
needs() {
    local variable
    for variable in "$@"; do
        [[ -n ${!variable:-} ]] || fail "$variable is not set; --help lists what is needed"
    done
}

# act COMMAND...: runs it, or prints it, as it could be typed, if $dry is set.
act() {
    if [[ -n ${dry:-} ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
