#!/usr/bin/env bash
# Sets everything up and runs all tests: bash scripts/test.sh [pytest's arguments, instead of the whole suite]
#
#   CI              when set, a test that cannot run here (no browser, no emoji font) is a failure, not a skip
#   COMFYUI_PATH    a ComfyUI to test with instead of the pinned one
set -euo pipefail
[ -z "${COMFYUI_PATH:-}" ] || COMFYUI_PATH=$(realpath "$COMFYUI_PATH")  # it may be relative to here
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/progress.sh

EMOJI_FONT=/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

# The browser tests need Chromium, the scene tests the emoji font. Only root can install them, on Debian's family only.
install_system_packages() {
    local packages=() log
    command -v chromium >/dev/null || packages+=(chromium)
    [ -f "$EMOJI_FONT" ] || packages+=(fonts-noto-color-emoji)
    [ ${#packages[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        log=$(mktemp)
        (
            with_progress "Updating the list of system packages" "$log" apt-get update
            with_progress "Installing ${packages[*]}" "$log" \
                env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${packages[@]}"
        ) && return
    fi
    printf '\n*** NOT INSTALLED: %s. The tests that need it are SKIPPED, or FAIL where CI is set. ***\n' "${packages[*]}" >&2
    printf '*** As root on Debian: apt-get install %s ***\n\n' "${packages[*]}" >&2
}

run_pytest() {
    .venv/bin/python -m pytest --durations=10 -rfEs "$@" || fail "tests FAILED"
}

install_system_packages
bash scripts/environment.sh --test
.venv/bin/python -m ruff check . || fail "ruff check FAILED"
if [ $# -gt 0 ]; then
    run_pytest "$@"
    printf 'ComfyUI-Sana: the chosen tests passed\n'
    exit
fi
# The cheap tests come first, so that a plain mistake shows in seconds.
run_pytest tests/test_architecture.py tests/test_workflows.py
run_pytest -m "not server and not browser"
run_pytest -m server
run_pytest -m browser
printf 'ComfyUI-Sana: all tests passed\n'
