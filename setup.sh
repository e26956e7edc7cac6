#!/bin/sh
# Set up Troupe in .venv beside this file, on macOS or Debian/Ubuntu; needs Python 3.11 or newer.
#   ./setup.sh [EXTRA ...]        extras of pyproject.toml, such as test or dev; `browser` installs Chromium too
#   BACKEND=cuda ./setup.sh       for an NVIDIA card, BACKEND=cpu without one; later calls keep to what .venv has.
#                                 The default on Linux is cpu, macOS needs none
set -eu
cd "$(dirname "$0")"

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

find_python() {
    for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python3.14; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

# The backend that .venv has: what was chosen last, or else what is installed there.
present_backend() {
    if [ -r .venv/troupe-backend ]; then
        cat .venv/troupe-backend
        return
    fi
    for found in .venv/lib/python3*/site-packages/mlx_cuda* .venv/lib/python3*/site-packages/mlx_cpu*; do
        if [ -e "$found" ]; then
            case $found in *mlx_cuda*) echo cuda ;; *) echo cpu ;; esac
            return
        fi
    done
}

extras=""
backend=""
present=""
browser=""
for extra in "$@"; do [ "$extra" != browser ] || browser=yes; done
if [ "$(uname)" = Linux ]; then
    present=$(present_backend)
    backend=${BACKEND:-${present:-cpu}}
    extras=$backend
    packages=""
    command -v g++ >/dev/null || packages="$packages g++"
    ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0' || packages="$packages libopenblas0-pthread"
    python=$(find_python)
    if [ -z "$python" ]; then
        packages="$packages python3 python3-venv"
    elif ! "$python" -c 'import ensurepip' 2>/dev/null; then
        packages="$packages $(basename "$(readlink -f "$python")")-venv"
    fi
    [ -z "$browser" ] || command -v chromium >/dev/null || packages="$packages chromium"
    if [ -n "$packages" ]; then
        if command -v apt-get >/dev/null; then
            as_root apt-get update -q
            # shellcheck disable=SC2086
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages
        else
            echo "setup.sh: please install these with your package manager (names as on Debian):$packages" >&2
        fi
    fi
fi

python=$(find_python)
if [ -z "$python" ]; then
    echo "setup.sh: no Python 3.11 or newer found; install one (macOS: brew install python@3.13), or set PYTHON" >&2
    exit 1
fi
for extra in "$@"; do extras="${extras:+$extras,}$extra"; done
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ -n "$present" ] && [ "$present" != "$backend" ]; then
    echo "setup.sh: .venv gets the backend $backend in place of $present"
    # both have files of the same names, so that one would be left with parts of the other
    .venv/bin/python -m pip uninstall --quiet --disable-pip-version-check -y mlx mlx-cpu mlx-cuda-12 mlx-cuda-13
fi
echo "setup.sh: installing into .venv${extras:+ (with $extras)}; the first time this takes a minute or more"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
[ -z "$backend" ] || echo "$backend" >.venv/troupe-backend
echo "setup.sh: done; source .venv/bin/activate puts troupe on your PATH, troupe train shows what it does"
