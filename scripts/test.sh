#!/usr/bin/env bash
# Sets everything up and runs all tests: bash scripts/test.sh [pytest's arguments, instead of the whole suite]
#
#   CI              when set, a test that cannot run here (no browser, no emoji font) is a failure, not a skip
#   COMFYUI_PATH    a ComfyUI to test with instead of the pinned one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/progress.sh

EMOJI_FONT=/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

# The browser tests need Chromium, the scene tests the emoji font. Only root can install them, on Debian's family only.
install_system_packages() {
    local packages=()
    command -v chromium >/dev/null || packages+=(chromium)
    [ -f "$EMOJI_FONT" ] || packages+=(fonts-noto-color-emoji)
    [ ${#packages[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        printf '\n*** Not installed: %s. The tests that need it are SKIPPED (they FAIL where CI is set). ***\n' "${packages[*]}" >&2
        printf '*** To run them: sudo apt-get install %s ***\n\n' "${packages[*]}" >&2
        return 0
    fi
    with_progress "Updating the list of system packages" /tmp/comfyui-sana-apt.log apt-get update
    with_progress "Installing ${packages[*]}" /tmp/comfyui-sana-apt.log \
        env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${packages[@]}"
}

# The cheap tests come first, so that a plain mistake shows in seconds.
run_tests() {
    .venv/bin/python -m ruff check .
    if [ $# -gt 0 ]; then
        .venv/bin/python -m pytest "$@"
        return
    fi
    .venv/bin/python -m pytest -x tests/test_architecture.py tests/test_workflows.py
    .venv/bin/python -m pytest -m "not server and not browser" --durations=10
    .venv/bin/python -m pytest -m server --durations=10
    .venv/bin/python -m pytest -m browser -rs
}

install_system_packages
bash scripts/environment.sh --test
run_tests "$@" || fail "tests FAILED"
printf 'ComfyUI-Sana: all tests passed\n'
