#!/usr/bin/env bash
# Draws a picture in a real ComfyUI from nothing: sets everything up, starts the server, queues the default workflow.
#
#   bash scripts/demo.sh [--prompt TEXT] [--seed N] [--serve] [--help]
#
#   PYTHON          the interpreter to build .venv with (Python 3.10 to 3.13)
#   COMFYUI_PATH    a ComfyUI to use instead of the pinned one
set -euo pipefail
[ -z "${COMFYUI_PATH:-}" ] || COMFYUI_PATH=$(realpath "$COMFYUI_PATH")  # it may be relative to here
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/environment.sh
COMFYUI_PATH=$(bash scripts/comfyui.sh)
export COMFYUI_PATH
exec .venv/bin/python scripts/demo.py "$@"
