#!/usr/bin/env bash
# Makes the virtual environment .venv in the repository: the pinned PyTorch, ComfyUI's requirements and the pack's;
# with --test also what the tests need. Takes a moment when the environment already holds just that.
#
#   PYTHON          the interpreter to build it with (default: python3, else python3.13 down to python3.10)
#   COMFYUI_PATH    a ComfyUI to use instead of the pinned one, see comfyui.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/progress.sh

TORCH=(torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0)
TESTS=(
    "diffusers==0.42.1; python_version >= '3.11'" "diffusers==0.41.0; python_version < '3.11'" # 0.42 left 3.10 behind
    peft==0.21.2 playwright==1.65.2 pytest==9.2.0 ruff==0.17.5 torch-fidelity==0.4.0 torchmetrics==1.9.0
    came-pytorch==0.1.3 prodigyopt==1.1.2 webdataset==1.0.2
)

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "needs Python 3.10, 3.11, 3.12 or 3.13; found $("${PYTHON:-python3}" --version 2>&1 || true)." \
        "Install one and name it: PYTHON=/path/to/python3.12 bash scripts/demo.sh"
}

# Debian splits ensurepip off into python3-venv; there, the system's pip fills a bare environment from outside.
create_environment() {
    local python
    python=$(find_python) || exit 1
    printf 'Creating .venv with %s (%s)\n' "$("$python" --version)" "$python" >&2
    rm -rf .venv
    "$python" -m venv .venv >/dev/null 2>&1 && return
    rm -rf .venv
    "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install --quiet pip && return
    rm -rf .venv
    fail "$python cannot make a virtual environment: it has neither ensurepip nor a pip of 22.3 or later." \
        "On Debian and Ubuntu: apt-get install python3-venv"
}

main() {
    local purpose=run packages=("${TORCH[@]}") comfyui wanted stamp
    if [ "${1:-}" = "--test" ]; then
        purpose=test
        packages+=("${TESTS[@]}")
    fi
    .venv/bin/python -m pip --version >/dev/null 2>&1 || create_environment
    comfyui=$(bash scripts/comfyui.sh)

    stamp=.venv/installed-$purpose
    wanted=$(cat scripts/environment.sh requirements.txt "$comfyui/requirements.txt" | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    rm -f "$stamp"
    with_progress "Installing PyTorch and ComfyUI's requirements (6 GB on disk, some minutes)" .venv/install.log \
        .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
        "${packages[@]}" --requirement "$comfyui/requirements.txt" --requirement requirements.txt
    # torch-fidelity installs its own tests as a package `tests`, which Python would take for ours.
    rm -rf .venv/lib/python3.*/site-packages/tests
    printf '%s\n' "$wanted" >"$stamp"
}

main "$@"
