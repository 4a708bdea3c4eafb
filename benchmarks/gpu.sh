#!/usr/bin/env bash
# All that needs a GPU, within 9 minutes: bash benchmarks/gpu.sh
#
#   PYTHON   the interpreter; default: that of .venv, else python3. It needs requirements.txt, pytest and diffusers.
#   OUT      a folder that gets a copy of what was written
#
# Each step has its seconds; one that fails or takes longer is named at the end, and the others run all the same.
# Everything is written to benchmarks/results/, and the tables to benchmarks/README.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
export PYTHONUNBUFFERED=1

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
if [ -z "$device" ]; then
    printf 'NO GPU: PyTorch of %s finds none here, so nothing was tested or measured.\n' "$PYTHON" >&2
    exit 1
fi

results=benchmarks/results
prefix=$results/$(date +%F)-$(printf %s "$device" | tr -cs '[:alnum:]' '-')
failed=()
mkdir -p "$results"

step() {  # step NAME SECONDS COMMAND...
    local name=$1 seconds=$2 status
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$seconds"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$prefix-$name.txt"
    status=${PIPESTATUS[0]}
    [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || printf '%s: the time was up\n' "$name" | tee -a "$prefix-$name.txt"
    [ "$status" -eq 0 ] || failed+=("$name (exit status $status)")
}

step kernel-tests 120 "$PYTHON" -m pytest -q -rs tests/kernels tests/nodes/test_clip.py
step server-tests 90 "$PYTHON" -m pytest -q -rs tests/comfy/test_memory_modes.py
step memory 55 "$PYTHON" -m benchmarks.memory --measure
step training 105 "$PYTHON" -m benchmarks.training --device cuda --measure --rounds 6 --minutes 1.2
step speed 150 "$PYTHON" -m benchmarks.run --device cuda --minutes 1.9
# Stopped in the middle of a row, it has written the JSON but no table: without a row to begin, it does that alone.
timeout 20 "$PYTHON" -m benchmarks.run --device cuda --minutes 0 >/dev/null 2>&1

[ -z "${OUT:-}" ] || cp "$prefix"* benchmarks/README.md "$OUT"/
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFAILED:\n' >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
fi
printf '\nAll GPU tests passed; the figures are in benchmarks/README.md\n'
