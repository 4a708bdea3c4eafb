# Sourced by the other scripts: shows that a long command is alive, keeps its output for the case that it fails.

fail() {
    printf 'ComfyUI-Sana: %s\n' "$*" >&2
    exit 1
}

# with_progress LABEL LOG COMMAND...: run COMMAND with its output in LOG. On a terminal one line counts the seconds and
# shows what the command says last; elsewhere a line every 20 seconds. When it fails, the log's end is printed.
with_progress() {
    local label=$1 log=$2 status=0 last command
    shift 2
    SECONDS=0
    : >"$log" # before the command starts, since its end is read at once
    "$@" >"$log" 2>&1 &
    command=$!
    # shellcheck disable=SC2064  # the process id as it is now
    trap "kill $command 2>/dev/null; exit 130" INT TERM
    [ -t 2 ] || printf '%s ...\n' "$label" >&2
    local shown=0
    while kill -0 "$command" 2>/dev/null; do
        last=$(tail -n 1 "$log" | tr -d '\r' | cut -c1-60)
        if [ -t 2 ]; then
            printf '\r\033[K%s ... %d s  %s' "$label" "$SECONDS" "$last" >&2
        elif [ $((SECONDS - shown)) -ge 20 ]; then
            shown=$SECONDS
            printf '  %d s  %s\n' "$shown" "$last" >&2
        fi
        sleep 0.5
    done
    wait "$command" || status=$?
    trap - INT TERM
    [ ! -t 2 ] || printf '\r\033[K' >&2
    if [ "$status" -ne 0 ]; then
        tail -n 30 "$log" >&2
        fail "\"$label\" failed with status $status after $SECONDS s; its whole output is in $log"
    fi
    printf '%s: done in %d s\n' "$label" "$SECONDS" >&2
}
