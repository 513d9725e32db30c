#!/usr/bin/env bash
# Set up a virtual environment with streamprep in it: tools/setup.sh VENV
#
# torch goes first: whatever depends on it would else choose a build of its own. torchcodec needs FFmpeg's shared
# libraries, which are installed where apt-get can, and asked for where it can't.
set -euo pipefail

venv=$1
: "${PYTHON:=python3}" "${TORCH:=torch==2.13.0}" "${PIP_ARGS:=}"

has_ffmpeg() {
    ldconfig -p 2>/dev/null | grep -q 'libavcodec\.so\.' || command -v ffmpeg >/dev/null
}

if ! has_ffmpeg; then
    sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
        echo "installing FFmpeg's libraries"
        { $sudo apt-get update && $sudo apt-get install -y ffmpeg; } >/dev/null || true
    fi
fi
if ! has_ffmpeg; then
    echo "FFmpeg's shared libraries (version 4 to 8) are missing and could not be installed from here." >&2
    echo "Install them, then run the same command again: apt-get install ffmpeg | dnf install ffmpeg-libs |" >&2
    echo "conda install ffmpeg | brew install ffmpeg" >&2
    exit 1
fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "streamprep needs Python 3.11 or newer; name one by PYTHON=python3.12 make ..." >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
# shellcheck disable=SC2086  # several arguments
"$venv/bin/python" -m pip install --quiet $PIP_ARGS "$TORCH"
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --quiet $PIP_ARGS -e '.[dev]'
"$venv/bin/python" -c 'import torchcodec.decoders' || {
    echo "torchcodec cannot load: it needs FFmpeg 4 to 8 as shared libraries, and the torch it was built for" >&2
    exit 1
}
